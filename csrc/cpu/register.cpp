// The operators of the library: every schema, and the kernels that are registered for the CPU. No arithmetic.
//
// hf_lopt/_ops.py defines the same schemas when this library is not there, and holds the fake kernels;
// hf_lopt/_plain*.py specify them. csrc/cuda/register.cpp has the kernels for CUDA.
#include <Python.h>

#include "../boxed.h"
#include "orthogonalize.h"
#include "tensors.h"

#define HF_LOPT_COMMON(p, m, v, d)                                                                       \
    "str[] features, Tensor" p "[] params, Tensor[] grads, Tensor" m "[] momenta, Tensor" v              \
    "[] second_moments, "                                                                                \
    "Tensor" d                                                                                           \
    "[] diagonals, Tensor[] rows, Tensor[] cols, Tensor[] row_factors, Tensor[] col_factors, "           \
    "int[] row_axes, int[] col_axes, int[] slice_axes, float[] momentum_decays, float[] second_decays, " \
    "float[] factored_decays, float clip, float second_eps, float diagonal_eps"

STABLE_TORCH_LIBRARY(hf_lopt, m) {
    m.def(
        "sums(Tensor[] params, Tensor[] grads, Tensor[] momenta, Tensor[] second_moments, int[] row_axes, "
        "int[] col_axes, float clip, bool moments) -> (Tensor[], Tensor[], Tensor)");
    m.def(
        "update_factored(Tensor[] rows, Tensor[] cols, Tensor[] row_sums, Tensor[] col_sums, Tensor[] row_means, "
        "int[] row_sizes, int[] col_sizes, int[] row_axes, int[] col_axes, float[] decays) "
        "-> (Tensor[], Tensor[], Tensor[], Tensor[])");
    m.def("feature_sums(" HF_LOPT_COMMON("", "", "", "") ") -> Tensor");
    m.def("apply_network(" HF_LOPT_COMMON("(a!)", "(b!)", "(c!)", "(d!)")
          ", Tensor[] weights, Tensor[] biases, Tensor scale, Tensor decay, float exp_mult, Tensor skip, "
          "Tensor(e!)[] out) -> (Tensor, Tensor)");
    m.def(
        "adam_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] second_moments, "
        "float momentum_decay, float second_decay, float clip, Tensor scale, Tensor decay, Tensor "
        "momentum_correction, "
        "Tensor second_correction, float inner_eps, float outer_eps, Tensor skip) -> Tensor");
    m.def(
        "descend(Tensor(a!)[] params, Tensor[] steps, Tensor lr, Tensor weight_decay, Tensor? squares, Tensor? numel, "
        "float norm_eps, int[] slice_axes, Tensor skip) -> ()");
    m.def(
        "orthogonalize(Tensor x, ScalarType dtype, float[] coefficients, int steps, float eps, float? norm_eps) "
        "-> (Tensor, Tensor)");
    m.def(
        "advance(Tensor[] stats, Tensor[] sums, Tensor? bad, Tensor? loss, Tensor(a!) counters, "
        "Tensor(b!)[] loss_buffer, float horizon, float[] corrected, Tensor[] own, int p_column, int rows) "
        "-> (Tensor, Tensor, Tensor)");
    m.def("pool(Tensor mixed, Tensor[] hidden) -> Tensor");
    m.def(
        "lstm_step(Tensor gates, Tensor(a!)[] hidden, Tensor(b!)[] cell, Tensor heads, Tensor heads_bias, "
        "Tensor bank, bool celo, Tensor skip) -> (Tensor, Tensor, Tensor)");
    m.def(
        "fold_network(Tensor networks, int[] sizes, int outputs, Tensor? constants, Tensor sums, Tensor numel, "
        "float norm_eps, Tensor lr, Tensor weight_decay, Tensor[] factors, Tensor? floor, float step_mult, "
        "int p_column) -> (Tensor, Tensor, Tensor)");
    m.def("assign(Tensor(a!)[] targets, Tensor[] values, Tensor skip) -> ()");
    m.def("zero_nan(Tensor(a!)[] tensors) -> ()");
    // Chooses among the kernels for this processor by name ("" to leave them) and returns the name of those in use.
    m.def("cpu_kernels(str name) -> str");
}

namespace hf_lopt {
namespace {

std::string cpu_kernels(std::string name) {
    STD_TORCH_CHECK(name.empty() || use_kernels(name), "this processor or this build has no kernels '", name,
                    "'; choose avx512, avx2 or portable");
    return kernels().name;
}

}  // namespace
}  // namespace hf_lopt

STABLE_TORCH_LIBRARY_IMPL(hf_lopt, CPU, m) {
    hf_lopt::implement_passes(m);
    m.impl("orthogonalize", TORCH_BOX(&hf_lopt::orthogonalize));
}

STABLE_TORCH_LIBRARY_IMPL(hf_lopt, CompositeExplicitAutograd, m) {
    m.impl("cpu_kernels", TORCH_BOX(&hf_lopt::cpu_kernels));
}

// An empty module, so that importing hf_lopt._C loads the library.
PyMODINIT_FUNC PyInit__C(void) {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
