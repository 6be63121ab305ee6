// The kernels that are registered for the CPU. No arithmetic.
//
// hf_lopt/kernels/ops.py defines the operators before it loads this library; csrc/cuda/register.cpp has the kernels
// for CUDA.
#include <Python.h>

#include "../boxed.h"
#include "orthogonalize.h"
#include "tensors.h"

namespace hf_lopt {
namespace {

// Chooses among the kernels for this processor by name ("" to leave them) and returns the name of those in use.
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

// An operator of this library alone, which has no tensors.
STABLE_TORCH_LIBRARY_FRAGMENT(hf_lopt, m) { m.def("cpu_kernels(str name) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(hf_lopt, CompositeExplicitAutograd, m) {
    m.impl("cpu_kernels", TORCH_BOX(&hf_lopt::cpu_kernels));
}

// An empty module, so that importing hf_lopt._C loads the library.
PyMODINIT_FUNC PyInit__C(void) {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
