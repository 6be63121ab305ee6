// The kernels of one instruction set. The including file is compiled for it and defines HF_LOPT_KERNELS, the name of
// the struct, and HF_LOPT_ISA, that of the instruction set.
#include "matrices.h"
#include "network_rows.h"

namespace hf_lopt {

extern const Kernels HF_LOPT_KERNELS;
const Kernels HF_LOPT_KERNELS = {
    HF_LOPT_ISA,
    from_half,
    to_half,
    from_bfloat16,
    to_bfloat16,
    moments<vf>,
    moments<vd>,
    gradient_sums,
    feature_sums,
    feature_sums_diagonal,
    vector_bias,
    apply<4>,
    apply<8>,
    apply_blocks<32, false, vf>,
    apply_blocks<4, true, vd>,
    apply_blocks<8, true, vd>,
    apply_blocks<32, true, vd>,
    adam,
    descend,
    ema_of_means,
    factors,
    newton_schulz,
};

}  // namespace hf_lopt
