// The three passes over lists of tensors; see hf_lopt/_ops.py for what they compute.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../names.h"
#include "tensors.h"

namespace hf_lopt {

// The arguments that both later passes share, in the order of the schema.
struct Common {
    Names features;
    Tensors params, grads, momenta, second_moments, diagonals, rows, cols, row_factors, col_factors;
    std::vector<int64_t> row_axes, col_axes, slice_axes;
    std::vector<double> momentum_decays, second_decays, factored_decays;
    double clip, second_eps, diagonal_eps;
};

struct Weights {
    Tensors weights, biases;
    Tensor scale, decay;
    double exp_mult;
    Tensor skip;
    Tensors out;
};

std::tuple<Tensors, Tensors, Tensor> sums(Tensors params, Tensors grads, Tensors momenta, Tensors second_moments,
                                          std::vector<int64_t> row_axes, std::vector<int64_t> col_axes, double clip,
                                          bool moments);
using Sizes = std::vector<int64_t>;
std::tuple<Tensors, Tensors, Tensors, Tensors> update_factored(Tensors rows, Tensors cols, Tensors row_sums,
                                                               Tensors col_sums, Tensors row_means, Sizes row_sizes,
                                                               Sizes col_sizes, Sizes row_axes, Sizes col_axes,
                                                               std::vector<double> decays);
Tensor feature_sums(const Common& common);
std::tuple<Tensor, Tensor> apply_network(const Common& common, const Weights& weights);

struct AdamStep {
    double momentum_decay, second_decay, clip;
    Tensor scale, decay, momentum_correction, second_correction;
    double inner_eps, outer_eps;
    Tensor skip;
};
Tensor adam_step(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensors& second_moments,
                 const AdamStep& step);
Tensor orthogonalize(Tensor x, torch::headeronly::ScalarType dtype, std::vector<double> coefficients, int64_t steps,
                     double eps, std::optional<double> norm_eps);
void descend(Tensors params, Tensors steps, Tensor scale, Tensor decay, Tensor skip);

}  // namespace hf_lopt
