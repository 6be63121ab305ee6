// The operator that only the CPU has a kernel for; see hf_lopt/kernels/reference for what it computes.
#pragma once

#include <optional>
#include <tuple>

#include "../passes.h"

namespace hf_lopt {

std::tuple<Tensor, Tensor> orthogonalize(Tensor x, torch::headeronly::ScalarType dtype, Floats coefficients,
                                         int64_t steps, double eps, std::optional<double> norm_eps);

}  // namespace hf_lopt
