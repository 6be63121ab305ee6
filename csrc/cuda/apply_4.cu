// Pass 2 for networks of 4 hidden units; a file of its own, so that both are compiled at the same time.
#include "apply_full.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 2) apply_4_kernel(HF_LOPT_ARGUMENT ApplyArgs a) {
    HF_LOPT_SHARED Shared<4> shared;
    HF_LOPT_LARGE_SHARED(ForFullTiles<4>, of_full);
    apply_tile_of_few<4, false>(a, shared, of_full);
}

}  // namespace

void launch_apply_4(const ApplyArgs& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH_LARGE(apply_4_kernel, tiles, kThreads, sizeof(ForFullTiles<4>), stream, args);
}

}  // namespace hf_lopt
