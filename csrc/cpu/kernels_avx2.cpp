#define HF_LOPT_KERNELS kAvx2Kernels
#define HF_LOPT_ISA "avx2"
#include "kernel_table.h"
