// The kernels of the operators for CUDA tensors. The schemas are those of csrc/ops.cpp.
//
// Compiled for tests on the host, the same operators are registered for CPU tensors in a library of their own.
#include <Python.h>

#include "operators.h"

namespace hf_lopt {
namespace {

#define HF_LOPT_COMMON_PARAMETERS                                                                              \
    Names features, Tensors params, Tensors grads, Tensors momenta, Tensors second_moments, Tensors diagonals, \
        Tensors rows, Tensors cols, Tensors row_factors, Tensors col_factors, Ints row_axes, Ints col_axes,    \
        Ints slice_axes, Floats momentum_decays, Floats second_decays, Floats factored_decays, double clip,    \
        double second_eps, double diagonal_eps
#define HF_LOPT_COMMON_ARGUMENTS                                                                           \
    {features,      params,          grads,       momenta,    second_moments, diagonals,  rows,            \
     cols,          row_factors,     col_factors, row_axes,   col_axes,       slice_axes, momentum_decays, \
     second_decays, factored_decays, clip,        second_eps, diagonal_eps}

Tensor boxed_feature_sums(HF_LOPT_COMMON_PARAMETERS) { return feature_sums(HF_LOPT_COMMON_ARGUMENTS); }

std::tuple<Tensor, Tensor> boxed_apply_network(HF_LOPT_COMMON_PARAMETERS, Tensors weights, Tensors biases,
                                               Tensor scale, Tensor decay, double exp_mult, Tensor skip, Tensors out) {
    return apply_network(HF_LOPT_COMMON_ARGUMENTS, {weights, biases, scale, decay, exp_mult, skip, out});
}

Tensor boxed_adam_step(Tensors params, Tensors grads, Tensors momenta, Tensors second_moments, double momentum_decay,
                       double second_decay, double clip, Tensor scale, Tensor decay, Tensor momentum_correction,
                       Tensor second_correction, double inner_eps, double outer_eps, Tensor skip) {
    return adam_step(params, grads, momenta, second_moments,
                     {momentum_decay, second_decay, clip, scale, decay, momentum_correction, second_correction,
                      inner_eps, outer_eps, skip});
}

}  // namespace
}  // namespace hf_lopt

#ifdef HF_LOPT_EMULATED
#define HF_LOPT_LIBRARY hf_lopt_emulated
#define HF_LOPT_KEY CPU
#define HF_LOPT_INIT PyInit_hf_lopt_emulated
#define HF_LOPT_MODULE "hf_lopt_emulated"
#else
#define HF_LOPT_LIBRARY hf_lopt
#define HF_LOPT_KEY CUDA
#define HF_LOPT_INIT PyInit__C_cuda
#define HF_LOPT_MODULE "_C_cuda"
#endif
// Expands the names first.
#define HF_LOPT_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

HF_LOPT_IMPLEMENT(HF_LOPT_LIBRARY, HF_LOPT_KEY, m) {
    m.impl("sums", TORCH_BOX(&hf_lopt::sums));
    m.impl("update_factored", TORCH_BOX(&hf_lopt::update_factored));
    m.impl("feature_sums", TORCH_BOX(&hf_lopt::boxed_feature_sums));
    m.impl("apply_network", TORCH_BOX(&hf_lopt::boxed_apply_network));
    m.impl("adam_step", TORCH_BOX(&hf_lopt::boxed_adam_step));
    m.impl("descend", TORCH_BOX(&hf_lopt::descend));
    m.impl("zero_nan", TORCH_BOX(&hf_lopt::zero_nan));
    m.impl("advance", TORCH_BOX(&hf_lopt::advance));
    m.impl("pool", TORCH_BOX(&hf_lopt::pool));
    m.impl("lstm_step", TORCH_BOX(&hf_lopt::lstm_step));
    m.impl("fold_network", TORCH_BOX(&hf_lopt::fold_network));
    m.impl("assign", TORCH_BOX(&hf_lopt::assign));
}

// An empty module, so that importing it loads the library.
PyMODINIT_FUNC HF_LOPT_INIT(void) {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, HF_LOPT_MODULE, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
