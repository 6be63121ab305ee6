// Pass 2 for networks of 8 hidden units.
#include "apply.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 2) apply_8_kernel(HF_LOPT_ARGUMENT ApplyArgs a) {
    HF_LOPT_SHARED Shared<8> shared;
    const Place at = place(a.table);
    if (*a.skip) {
        clear_results(a, at);
        return;
    }
    load_network(a, at, shared);
    double* partial = a.partial + (int64_t)block() * kUpdateStats;
    if (!at.entry->factored) {
        apply_elements<8, kFlat>(a, at, shared, partial);
    } else {
        set_column_bias(a, at, shared);
        if (at.entry->inner > 1) {
            apply_inner_rows(a, at, shared, partial);
        } else {
            apply_rows<8, kMatrix>(a, at, shared, partial);
        }
    }
    finish_tile(a, at);
}

}  // namespace

void launch_apply_8(const ApplyArgs& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(apply_8_kernel, tiles, kThreads, stream, args);
}

}  // namespace hf_lopt
