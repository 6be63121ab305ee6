// Puts the operators of passes.h behind their schemas: a library registers them for its device.
#pragma once

#include <torch/csrc/stable/library.h>

#include "held_lists.h"
#include "passes.h"

namespace hf_lopt {

// Behind the arguments of each operator: a tensor by which the dispatcher knows the device where all lists are held,
// and what is held; see held_lists.h.
#define HF_LOPT_HELD std::optional<Tensor>, Ints code

inline std::tuple<Tensors, Tensors, Tensor> boxed_sums(Tensors params, Tensors grads, Tensors momenta,
                                                       Tensors second_moments, Ints row_axes, Ints col_axes,
                                                       double clip, bool moments, Tensors momentum_scales,
                                                       Tensors second_scales, HF_LOPT_HELD) {
    Held held(code);
    held.take(params, grads, momenta, second_moments, momentum_scales, second_scales);
    held.offer_spare();
    auto results =
        sums(std::move(params), std::move(grads), std::move(momenta), std::move(second_moments), std::move(row_axes),
             std::move(col_axes), clip, moments, std::move(momentum_scales), std::move(second_scales));
    held.give(std::get<0>(results), std::get<1>(results));
    return results;
}

inline std::tuple<Tensors, Tensors, Tensors, Tensors> boxed_update_factored(
    Tensors rows, Tensors cols, Tensors row_sums, Tensors col_sums, Tensors row_means, Ints row_sizes, Ints col_sizes,
    Ints row_axes, Ints col_axes, Floats decays, HF_LOPT_HELD) {
    Held held(code);
    held.take(rows, cols, row_sums, col_sums, row_means);
    held.offer_spare();
    auto results = update_factored(std::move(rows), std::move(cols), std::move(row_sums), std::move(col_sums),
                                   std::move(row_means), std::move(row_sizes), std::move(col_sizes),
                                   std::move(row_axes), std::move(col_axes), std::move(decays));
    held.give(std::get<0>(results), std::get<1>(results), std::get<2>(results), std::get<3>(results));
    return results;
}

#define HF_LOPT_COMMON_PARAMETERS                                                                              \
    Names features, Tensors params, Tensors grads, Tensors momenta, Tensors second_moments, Tensors diagonals, \
        Tensors rows, Tensors cols, Tensors row_factors, Tensors col_factors, Ints row_axes, Ints col_axes,    \
        Ints slice_axes, Floats momentum_decays, Floats second_decays, Floats factored_decays, double clip,    \
        double second_eps, double diagonal_eps, Tensors momentum_scales, Tensors second_scales
#define HF_LOPT_COMMON_ARGUMENTS \
    {std::move(features),        \
     std::move(params),          \
     std::move(grads),           \
     std::move(momenta),         \
     std::move(second_moments),  \
     std::move(diagonals),       \
     std::move(rows),            \
     std::move(cols),            \
     std::move(row_factors),     \
     std::move(col_factors),     \
     std::move(row_axes),        \
     std::move(col_axes),        \
     std::move(slice_axes),      \
     std::move(momentum_decays), \
     std::move(second_decays),   \
     std::move(factored_decays), \
     clip,                       \
     second_eps,                 \
     diagonal_eps,               \
     std::move(momentum_scales), \
     std::move(second_scales)}

#define HF_LOPT_COMMON_LISTS                                                                                  \
    params, grads, momenta, second_moments, diagonals, rows, cols, row_factors, col_factors, momentum_scales, \
        second_scales

inline Tensor boxed_feature_sums(HF_LOPT_COMMON_PARAMETERS, HF_LOPT_HELD) {
    Held(code).take(HF_LOPT_COMMON_LISTS);
    return feature_sums(HF_LOPT_COMMON_ARGUMENTS);
}

inline std::tuple<Tensor, Tensor> boxed_apply_network(HF_LOPT_COMMON_PARAMETERS, Tensors weights, Tensors biases,
                                                      Tensor scale, Tensor decay, double exp_mult, Tensor skip,
                                                      Tensors out, std::optional<Tensor> step, Ints places,
                                                      bool round_params, bool tf32, HF_LOPT_HELD) {
    Held(code).take(HF_LOPT_COMMON_LISTS, weights, biases, out);
    return apply_network(HF_LOPT_COMMON_ARGUMENTS, {std::move(weights),
                                                    std::move(biases),
                                                    scale,
                                                    decay,
                                                    exp_mult,
                                                    skip,
                                                    std::move(out),
                                                    {step, std::move(places), round_params},
                                                    tf32});
}

#undef HF_LOPT_COMMON_PARAMETERS
#undef HF_LOPT_COMMON_ARGUMENTS
#undef HF_LOPT_COMMON_LISTS

inline Tensor boxed_adam_step(Tensors params, Tensors grads, Tensors momenta, Tensors second_moments,
                              double momentum_decay, double second_decay, double clip, Tensor scale, Tensor decay,
                              Tensor momentum_correction, Tensor second_correction, double inner_eps, double outer_eps,
                              Tensor skip, Tensors momentum_scales, Tensors second_scales, std::optional<Tensor> step,
                              Ints places, bool round_params, HF_LOPT_HELD) {
    Held(code).take(params, grads, momenta, second_moments, momentum_scales, second_scales);
    return adam_step(params, grads, momenta, second_moments,
                     {momentum_decay,
                      second_decay,
                      clip,
                      scale,
                      decay,
                      momentum_correction,
                      second_correction,
                      inner_eps,
                      outer_eps,
                      skip,
                      momentum_scales,
                      second_scales,
                      {step, places, round_params}});
}

inline void boxed_descend(Tensors params, Tensors steps, Tensor lr, Tensor weight_decay, std::optional<Tensor> squares,
                          std::optional<Tensor> numel, double norm_eps, Ints slice_axes, Tensor skip,
                          std::optional<Tensor> step, Ints places, bool round_params, HF_LOPT_HELD) {
    Held(code).take(params, steps);
    descend(params, steps, lr, weight_decay, squares, numel, norm_eps, slice_axes, skip, {step, places, round_params});
}

inline std::tuple<Tensor, Tensor, Tensor> boxed_specialize_networks(Tensor networks, Ints sizes, int64_t outputs,
                                                                    std::optional<Tensor> constants, Tensor sums,
                                                                    Tensor numel, double norm_eps, Tensor lr,
                                                                    Tensor weight_decay, Tensors factors,
                                                                    std::optional<Tensor> floor, double step_mult,
                                                                    int64_t p_column, HF_LOPT_HELD) {
    Held(code).take(factors);
    return specialize_networks({networks, sizes, outputs, constants, sums, numel, norm_eps, lr, weight_decay, factors,
                                floor, step_mult, p_column});
}

inline Tensor boxed_pool(Tensor mixed, Tensors hidden, HF_LOPT_HELD) {
    Held(code).take(hidden);
    return pool(mixed, std::move(hidden));
}

inline std::tuple<Tensor, Tensor, Tensor> boxed_lstm_step(Tensor gates, Tensors hidden, Tensors cell, Tensor heads,
                                                          Tensor heads_bias, Tensor bank, bool celo, Tensor skip,
                                                          HF_LOPT_HELD) {
    Held(code).take(hidden, cell);
    return lstm_step(gates, std::move(hidden), std::move(cell), heads, heads_bias, bank, celo, skip);
}

inline void boxed_assign(Tensors targets, Tensors values, Tensor skip, HF_LOPT_HELD) {
    Held(code).take(targets, values);
    // Held lists have empty tensors where a parameter has no such state.
    size_t kept = 0;
    for (size_t i = 0; i < targets.size() && targets.size() == values.size(); i++) {
        if (targets[i].numel() == 0 && values[i].numel() == 0) continue;
        if (kept != i) {
            targets[kept] = std::move(targets[i]);
            values[kept] = std::move(values[i]);
        }
        kept++;
    }
    if (targets.size() == values.size()) {
        targets.erase(targets.begin() + kept, targets.end());
        values.erase(values.begin() + kept, values.end());
    }
    assign(std::move(targets), std::move(values), skip);
}

#undef HF_LOPT_HELD

template <class Library>
void implement_passes(Library& m) {
    m.impl("hold", TORCH_BOX(&hold));
    m.impl("release", TORCH_BOX(&release));
    m.impl("fetch", TORCH_BOX(&fetch));
    m.impl("same_kinds", TORCH_BOX(&same_kinds));
    m.impl("sums", TORCH_BOX(&boxed_sums));
    m.impl("update_factored", TORCH_BOX(&boxed_update_factored));
    m.impl("feature_sums", TORCH_BOX(&boxed_feature_sums));
    m.impl("apply_network", TORCH_BOX(&boxed_apply_network));
    m.impl("adam_step", TORCH_BOX(&boxed_adam_step));
    m.impl("descend", TORCH_BOX(&boxed_descend));
    m.impl("specialize_networks", TORCH_BOX(&boxed_specialize_networks));
    m.impl("advance", TORCH_BOX(&advance));
    m.impl("pool", TORCH_BOX(&boxed_pool));
    m.impl("lstm_step", TORCH_BOX(&boxed_lstm_step));
    m.impl("assign", TORCH_BOX(&boxed_assign));
}

}  // namespace hf_lopt
