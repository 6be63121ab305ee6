// Pass 2 for networks of 4 hidden units, over accumulators in any format.
#include "apply_full.cuh"
#include "stored.cuh"

namespace hf_lopt {
namespace {

using OfFull = ForFullTiles<4, InAnyFormat>;

HF_LOPT_KERNEL(kThreads, 2) apply_4_stored_kernel(HF_LOPT_ARGUMENT Stored<ApplyArgs> a) {
    HF_LOPT_SHARED Shared<4> shared;
    HF_LOPT_LARGE_SHARED(OfFull, of_full);
    apply_tile_of_few<4, false>(a, shared, of_full);
}

}  // namespace

void launch_apply_4_stored(const Stored<ApplyArgs>& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH_LARGE(apply_4_stored_kernel, tiles, kThreads, sizeof(OfFull), stream, args);
}

}  // namespace hf_lopt
