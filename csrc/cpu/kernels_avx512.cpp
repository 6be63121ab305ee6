#define HF_LOPT_KERNELS kAvx512Kernels
#define HF_LOPT_ISA "avx512"
#include "kernel_table.h"
