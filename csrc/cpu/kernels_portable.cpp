#define HF_LOPT_KERNELS kPortableKernels
#define HF_LOPT_ISA "portable"
#include "kernel_table.h"
