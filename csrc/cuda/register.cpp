// The kernels of the operators for CUDA tensors. hf_lopt/kernels/ops.py defines the operators.
//
// Compiled for tests on the host, the same operators are registered for CPU tensors in a library of their own.
#include <Python.h>

#include <exception>
#include <string>

#include "../boxed.h"
#include "operators.h"
#include "runtime.h"

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
#define HF_LOPT_FRAGMENT(library, m) STABLE_TORCH_LIBRARY_FRAGMENT(library, m)
#ifndef HF_LOPT_CUDA_CODE
#define HF_LOPT_CUDA_CODE "none"
#endif

HF_LOPT_IMPLEMENT(HF_LOPT_LIBRARY, HF_LOPT_KEY, m) {
    hf_lopt::implement_passes(m);
    m.impl("zero_nan", TORCH_BOX(&hf_lopt::zero_nan));
}

namespace hf_lopt {
namespace {

// What the kernels are built for and what the driver serves; hf_lopt/kernels/cards.py reads it.
std::string cuda_build() {
    const auto version = [](int x) { return std::to_string(x / 1000) + "." + std::to_string(x % 1000 / 10); };
    return "CUDA " + version(built_version()) + ", driver " + version(driver_version()) + ", code " HF_LOPT_CUDA_CODE;
}

// Launches a kernel that does nothing on a device; why that was not possible, or nothing.
std::string cuda_launch(int64_t device) {
    try {
        const Device current((int)device);
        launch_probe({}, current.stream());
    } catch (const std::exception& error) {
        return error.what();
    }
    return "";
}

}  // namespace
}  // namespace hf_lopt

// Operators of this library alone, which have no tensors.
HF_LOPT_FRAGMENT(HF_LOPT_LIBRARY, m) {
    m.def("cuda_build() -> str");
    m.def("cuda_launch(int device) -> str");
}

HF_LOPT_IMPLEMENT(HF_LOPT_LIBRARY, CompositeExplicitAutograd, m) {
    m.impl("cuda_build", TORCH_BOX(&hf_lopt::cuda_build));
    m.impl("cuda_launch", TORCH_BOX(&hf_lopt::cuda_launch));
}

// An empty module, so that importing it loads the library.
PyMODINIT_FUNC HF_LOPT_INIT(void) {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, HF_LOPT_MODULE, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
