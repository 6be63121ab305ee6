// The operators that have kernels on every device, as C++ functions; see hf_lopt/_plain*.py for what they compute.
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
struct Common {
    Names features;
    Tensors params, grads, momenta, second_moments, diagonals, rows, cols, row_factors, col_factors;
    Ints row_axes, col_axes, slice_axes;
    Floats momentum_decays, second_decays, factored_decays;
    double clip, second_eps, diagonal_eps;
};

// How many parameters there are, at least one, with an entry for each in all lists.
inline size_t checked_count(const Common& x) {
    const size_t count = x.params.size();
    STD_TORCH_CHECK(count > 0, "there must be at least one parameter");
    for (const Tensors* list :
         {&x.grads, &x.momenta, &x.second_moments, &x.diagonals, &x.rows, &x.cols, &x.row_factors, &x.col_factors}) {
        STD_TORCH_CHECK(list->size() == count, "all lists must have one tensor per parameter");
    }
    STD_TORCH_CHECK(x.row_axes.size() == count && x.col_axes.size() == count,
                    "axes must have one entry per parameter");
    return count;
}

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
void descend(Tensors params, Tensors steps, Tensor lr, Tensor weight_decay, std::optional<Tensor> squares,
             std::optional<Tensor> numel, double norm_eps, Ints slice_axes, Tensor skip);

}  // namespace hf_lopt
