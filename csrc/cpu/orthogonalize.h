// Operators on small arrays; see hf_lopt/_plain*.py for what they compute.
#pragma once

#include <optional>
#include <tuple>

#include "../passes.h"

namespace hf_lopt {

std::tuple<Tensor, Tensor> orthogonalize(Tensor x, torch::headeronly::ScalarType dtype, Floats coefficients,
                                         int64_t steps, double eps, std::optional<double> norm_eps);

std::tuple<Tensor, Tensor, Tensor> fold_network(Tensor networks, Ints sizes, int64_t outputs,
                                                std::optional<Tensor> constants, Tensor sums, Tensor numel,
                                                double norm_eps, Tensor lr, Tensor weight_decay, Tensors factors,
                                                std::optional<Tensor> floor, double step_mult, int64_t p_column);

}  // namespace hf_lopt
