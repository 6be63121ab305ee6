// Pass 2 for networks of 8 hidden units; a file of its own, so that both are compiled at the same time.
#include "apply_full.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 2) apply_8_kernel(HF_LOPT_ARGUMENT ApplyArgs a) {
    HF_LOPT_SHARED Shared<8> shared;
    HF_LOPT_LARGE_SHARED(ForFullTiles<8>, of_full);
    apply_tile_of_few<8, true>(a, shared, of_full);
}

}  // namespace

void launch_apply_8(const ApplyArgs& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH_LARGE(apply_8_kernel, tiles, kThreads, sizeof(ForFullTiles<8>), stream, args);
}

}  // namespace hf_lopt
