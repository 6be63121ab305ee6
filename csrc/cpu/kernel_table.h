// The kernels of one instruction set. The including file is compiled for it and defines HF_LOPT_KERNELS, the name of
// the struct, and HF_LOPT_ISA, that of the instruction set.
#include "matrices.h"
#include "network_rows.h"
#include "stored_rows.h"

namespace hf_lopt {

extern const Kernels HF_LOPT_KERNELS;
const Kernels HF_LOPT_KERNELS = {
    HF_LOPT_ISA,
    from_half,
    to_half,
    from_bfloat16,
    to_bfloat16,
    round_bfloat16,
    store_codes,
    encode_codes,
    decode_codes,
    moments<vf>,
    moments<vd>,
    gradient_sums,
    {feature_sums<kFloat32>, feature_sums<kBFloat16>, feature_sums<kCodes>},
    feature_sums_diagonal,
    vector_bias,
    {apply<4, kFloat32>, apply<4, kBFloat16>, apply<4, kCodes>},
    {apply<8, kFloat32>, apply<8, kBFloat16>, apply<8, kCodes>},
    {apply_blocks<32, false, vf, kFloat32>, apply_blocks<32, false, vf, kBFloat16>,
     apply_blocks<32, false, vf, kCodes>},
    apply_blocks<4, true, vd, kFloat32>,
    apply_blocks<8, true, vd, kFloat32>,
    apply_blocks<32, true, vd, kFloat32>,
    adam,
    descend,
    ema_of_means,
    factors,
    newton_schulz,
};

}  // namespace hf_lopt
