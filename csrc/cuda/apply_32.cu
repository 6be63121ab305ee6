// Pass 2 for networks of 32 hidden units.
#include "tensor_core.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 2) apply_32_kernel(HF_LOPT_ARGUMENT ApplyArgs a) {
    HF_LOPT_SHARED Shared<kUnits> shared;
    HF_LOPT_SHARED Fragments fragments;
    apply_tile<kUnits>(a, shared, [&](const Place& at, double* partial) {
        if (at.entry->inner > 1) {
            apply_elements<kUnits, kInner>(a, shared, partial);
        } else if (at.entry->lanes < kWarpSize) {
            apply_elements<kUnits, kMatrix>(a, shared, partial);
        } else {
            load_fragments(shared.net, fragments);
            apply_on_tensor_cores(a, at, shared, fragments, partial);
        }
    });
}

}  // namespace

void launch_apply_32(const ApplyArgs& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(apply_32_kernel, tiles, kThreads, stream, args);
}

}  // namespace hf_lopt
