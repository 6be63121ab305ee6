// Pass 2 for networks of 32 hidden units, whose products are in TF32.
#include "tensor_core.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 2) apply_32_tf32_kernel(HF_LOPT_ARGUMENT ApplyArgs a) {
    HF_LOPT_SHARED Shared<kUnits> shared;
    HF_LOPT_SHARED Fragments<kTf32> fragments;
    HF_LOPT_LARGE_SHARED(ForFullTiles<InFloat32>, of_full);
    apply_tile_of_many(a, shared, fragments, of_full);
}

}  // namespace

void launch_apply_32_tf32(const ApplyArgs& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH_LARGE(apply_32_tf32_kernel, tiles, kThreads, sizeof(ForFullTiles<InFloat32>), stream, args);
}

}  // namespace hf_lopt
