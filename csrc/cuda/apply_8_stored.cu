// Pass 2 for networks of 8 hidden units, over accumulators in any format.
#include "apply_full.cuh"
#include "stored.cuh"

namespace hf_lopt {
namespace {

using OfFull = ForFullTiles<8, InAnyFormat>;

HF_LOPT_KERNEL(kThreads, 2) apply_8_stored_kernel(HF_LOPT_ARGUMENT Stored<ApplyArgs> a) {
    HF_LOPT_SHARED Shared<8> shared;
    HF_LOPT_LARGE_SHARED(OfFull, of_full);
    apply_tile_of_few<8, true>(a, shared, of_full);
}

}  // namespace

void launch_apply_8_stored(const Stored<ApplyArgs>& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH_LARGE(apply_8_stored_kernel, tiles, kThreads, sizeof(OfFull), stream, args);
}

}  // namespace hf_lopt
