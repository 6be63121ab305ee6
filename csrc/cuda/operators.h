// The operator that only a GPU has a kernel for; see hf_lopt/kernels/reference for what it computes.
#pragma once

#include "../passes.h"
#include "table_builder.h"

namespace hf_lopt {

void zero_nan(Tensors tensors);

}  // namespace hf_lopt
