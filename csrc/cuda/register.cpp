// The kernels of the operators for CUDA tensors. hf_lopt/kernels/ops.py defines the operators.
//
// Compiled for tests on the host, the same operators are registered for CPU tensors in a library of their own.
#include <Python.h>

#include "../boxed.h"
#include "operators.h"

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
    hf_lopt::implement_passes(m);
    m.impl("zero_nan", TORCH_BOX(&hf_lopt::zero_nan));
    m.impl("advance", TORCH_BOX(&hf_lopt::advance));
    m.impl("pool", TORCH_BOX(&hf_lopt::pool));
    m.impl("lstm_step", TORCH_BOX(&hf_lopt::lstm_step));
    m.impl("assign", TORCH_BOX(&hf_lopt::assign));
}

// An empty module, so that importing it loads the library.
PyMODINIT_FUNC HF_LOPT_INIT(void) {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, HF_LOPT_MODULE, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
