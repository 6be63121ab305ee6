// The operators that only a GPU has kernels for; see hf_lopt/_plain_scheduler.py for what they compute.
#pragma once

#include <optional>
#include <tuple>

#include "../passes.h"
#include "tables.h"

namespace hf_lopt {

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
