// The operators that have kernels on every device, as C++ functions; see hf_lopt/kernels/reference for what they
// compute.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "names.h"

namespace hf_lopt {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

// The arguments that both later passes share, in the order of the schema.
struct CommonArguments {
    Names features;
    Tensors params, grads, momenta, second_moments, diagonals, rows, cols, row_factors, col_factors;
    Ints row_axes, col_axes, slice_axes;
    Floats momentum_decays, second_decays, factored_decays;
    double clip, second_eps, diagonal_eps;
    Tensors momentum_scales, second_scales;
};

// What is rounded at random; see hf_lopt/kernels/reference/formats.py.
struct Rounding {
    std::optional<Tensor> step;
    Ints places;
    bool params;
};

// The network of pass 2, and what becomes of its outputs.
struct NetworkArguments {
    Tensors weights, biases;
    Tensor scale, decay;
    double exp_mult;
    Tensor skip;
    Tensors out;
    Rounding rounding;
    bool tf32;  // products of many units may be in TF32, where a device has it
};

struct AdamArguments {
    double momentum_decay, second_decay, clip;
    Tensor scale, decay, momentum_correction, second_correction;
    double inner_eps, outer_eps;
    Tensor skip;
    Tensors momentum_scales, second_scales;
    Rounding rounding;
};

// What lies between the decision about a step and pass 2.
struct SpecializeArguments {
    Tensor networks;
    Ints sizes;
    int64_t outputs;
    std::optional<Tensor> constants;
    Tensor sums, numel;
    double norm_eps;
    Tensor lr, weight_decay;
    Tensors factors;
    std::optional<Tensor> floor;
    double step_mult;
    int64_t p_column;
};

std::tuple<Tensors, Tensors, Tensor> sums(Tensors params, Tensors grads, Tensors momenta, Tensors second_moments,
                                          Ints row_axes, Ints col_axes, double clip, bool moments,
                                          Tensors momentum_scales, Tensors second_scales);
std::tuple<Tensors, Tensors, Tensors, Tensors> update_factored(Tensors rows, Tensors cols, Tensors row_sums,
                                                               Tensors col_sums, Tensors row_means, Ints row_sizes,
                                                               Ints col_sizes, Ints row_axes, Ints col_axes,
                                                               Floats decays);
Tensor feature_sums(const CommonArguments& common);
std::tuple<Tensor, Tensor> apply_network(const CommonArguments& common, const NetworkArguments& network);
Tensor adam_step(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensors& second_moments,
                 const AdamArguments& step);
void descend(Tensors params, Tensors steps, Tensor lr, Tensor weight_decay, std::optional<Tensor> squares,
             std::optional<Tensor> numel, double norm_eps, Ints slice_axes, Tensor skip, const Rounding& rounding);
std::tuple<Tensor, Tensor, Tensor> specialize_networks(const SpecializeArguments& x);
std::tuple<Tensor, Tensor, Tensor> advance(Tensors stats, Tensors sums, std::optional<Tensor> bad,
                                           std::optional<Tensor> loss, Tensor counters, Tensors loss_buffer,
                                           double horizon, Floats corrected, Tensors tensor_inputs, int64_t p_column,
                                           int64_t rows);
Tensor pool(Tensor mixed, Tensors hidden);
std::tuple<Tensor, Tensor, Tensor> lstm_step(Tensor gates, Tensors hidden, Tensors cell, Tensor heads,
                                             Tensor heads_bias, Tensor bank, bool celo, Tensor skip);
void assign(Tensors targets, Tensors values, Tensor skip);

}  // namespace hf_lopt
