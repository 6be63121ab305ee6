// The operators that only a GPU has kernels for; see hf_lopt/kernels/reference for what they compute.
#pragma once

#include <optional>
#include <tuple>

#include "../passes.h"
#include "table_builder.h"

namespace hf_lopt {

void assign(Tensors targets, Tensors values, Tensor skip);
void zero_nan(Tensors tensors);

std::tuple<Tensor, Tensor, Tensor> advance(Tensors stats, Tensors sums, std::optional<Tensor> bad,
                                           std::optional<Tensor> loss, Tensor counters, Tensors loss_buffer,
                                           double horizon, Floats corrected, Tensors tensor_inputs, int64_t p_column,
                                           int64_t rows);
Tensor pool(Tensor mixed, Tensors hidden);
std::tuple<Tensor, Tensor, Tensor> lstm_step(Tensor gates, Tensors hidden, Tensors cell, Tensor heads,
                                             Tensor heads_bias, Tensor bank, bool celo, Tensor skip);

}  // namespace hf_lopt
