// Puts the operators of passes.h behind their schemas: a library registers them for its device.
#pragma once

#include <torch/csrc/stable/library.h>

#include "passes.h"

namespace hf_lopt {

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

inline Tensor boxed_feature_sums(HF_LOPT_COMMON_PARAMETERS) { return feature_sums(HF_LOPT_COMMON_ARGUMENTS); }

inline std::tuple<Tensor, Tensor> boxed_apply_network(HF_LOPT_COMMON_PARAMETERS, Tensors weights, Tensors biases,
                                                      Tensor scale, Tensor decay, double exp_mult, Tensor skip,
                                                      Tensors out, std::optional<Tensor> step, Ints places,
                                                      bool round_params, bool tf32) {
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

inline Tensor boxed_adam_step(Tensors params, Tensors grads, Tensors momenta, Tensors second_moments,
                              double momentum_decay, double second_decay, double clip, Tensor scale, Tensor decay,
                              Tensor momentum_correction, Tensor second_correction, double inner_eps, double outer_eps,
                              Tensor skip, Tensors momentum_scales, Tensors second_scales, std::optional<Tensor> step,
                              Ints places, bool round_params) {
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
                          std::optional<Tensor> step, Ints places, bool round_params) {
    descend(params, steps, lr, weight_decay, squares, numel, norm_eps, slice_axes, skip, {step, places, round_params});
}

inline std::tuple<Tensor, Tensor, Tensor> boxed_specialize_networks(Tensor networks, Ints sizes, int64_t outputs,
                                                                    std::optional<Tensor> constants, Tensor sums,
                                                                    Tensor numel, double norm_eps, Tensor lr,
                                                                    Tensor weight_decay, Tensors factors,
                                                                    std::optional<Tensor> floor, double step_mult,
                                                                    int64_t p_column) {
    return specialize_networks({networks, sizes, outputs, constants, sums, numel, norm_eps, lr, weight_decay, factors,
                                floor, step_mult, p_column});
}

template <class Library>
void implement_passes(Library& m) {
    m.impl("sums", TORCH_BOX(&sums));
    m.impl("update_factored", TORCH_BOX(&update_factored));
    m.impl("feature_sums", TORCH_BOX(&boxed_feature_sums));
    m.impl("apply_network", TORCH_BOX(&boxed_apply_network));
    m.impl("adam_step", TORCH_BOX(&boxed_adam_step));
    m.impl("descend", TORCH_BOX(&boxed_descend));
    m.impl("specialize_networks", TORCH_BOX(&boxed_specialize_networks));
}

}  // namespace hf_lopt
