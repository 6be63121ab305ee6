// Pass 2 for networks of 8 hidden units; a file of its own, so that both are compiled at the same time.
#include "apply_full.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 2) apply_8_kernel(HF_LOPT_ARGUMENT ApplyArgs a) {
    HF_LOPT_SHARED Shared<8> shared;
    apply_tile_of_few<8, true>(a, shared);
}

}  // namespace

void launch_apply_8(const ApplyArgs& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(apply_8_kernel, tiles, kThreads, stream, args);
}

}  // namespace hf_lopt
