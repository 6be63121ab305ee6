// The operators on the device; see hf_lopt/_plain.py and _plain_scheduler.py for what they compute.
#pragma once

#include <optional>
#include <tuple>

#include "../names.h"
#include "tables.h"

namespace hf_lopt {

// The arguments that both later passes share, in the order of the schema.
struct Common {
    Names features;
    Tensors params, grads, momenta, second_moments, diagonals, rows, cols, row_factors, col_factors;
    Ints row_axes, col_axes, slice_axes;
    Floats momentum_decays, second_decays, factored_decays;
    double clip, second_eps, diagonal_eps;
};

struct Weights {
    Tensors weights, biases;
    Tensor scale, decay;
    double exp_mult;
    Tensor skip;
    Tensors out;
};

struct AdamStep {
    double momentum_decay, second_decay, clip;
    Tensor scale, decay, momentum_correction, second_correction;
    double inner_eps, outer_eps;
    Tensor skip;
};

std::tuple<Tensors, Tensors, Tensor> sums(Tensors params, Tensors grads, Tensors momenta, Tensors second_moments,
                                          Ints row_axes, Ints col_axes, double clip, bool moments);
std::tuple<Tensors, Tensors, Tensors, Tensors> update_factored(Tensors rows, Tensors cols, Tensors row_sums,
                                                               Tensors col_sums, Tensors row_means, Ints row_sizes,
                                                               Ints col_sizes, Ints row_axes, Ints col_axes,
                                                               Floats decays);
Tensor feature_sums(const Common& common);
std::tuple<Tensor, Tensor> apply_network(const Common& common, const Weights& weights);
Tensor adam_step(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensors& second_moments,
                 const AdamStep& step);
void descend(Tensors params, Tensors steps, Tensor scale, Tensor decay, Tensor skip);
void assign(Tensors targets, Tensors values, Tensor skip);
void zero_nan(Tensors tensors);

std::tuple<Tensor, Tensor, Tensor> advance(Tensors stats, Tensors sums, std::optional<Tensor> bad,
                                           std::optional<Tensor> loss, Tensor counters, Tensors loss_buffer,
                                           double horizon, Floats corrected, Tensors own, int64_t p_column,
                                           int64_t rows);
Tensor pool(Tensor mixed, Tensors hidden);
std::tuple<Tensor, Tensor, Tensor> lstm_step(Tensor gates, Tensors hidden, Tensors cell, Tensor heads,
                                             Tensor heads_bias, Tensor bank, bool celo, Tensor skip);
std::tuple<Tensor, Tensor, Tensor> fold_network(Tensor networks, Ints sizes, int64_t outputs,
                                                std::optional<Tensor> constants, Tensor sums, Tensor numel,
                                                double norm_eps, Tensor lr, Tensor weight_decay, Tensors factors,
                                                std::optional<Tensor> floor, double step_mult, int64_t p_column);

}  // namespace hf_lopt
