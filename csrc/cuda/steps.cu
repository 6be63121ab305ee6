// Steps that need no features, and the storing of new state.
#include "steps.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 3) adam_kernel(HF_LOPT_ARGUMENT AdamArgs a) {
    HF_LOPT_LARGE_SHARED(ForAdam<InFloat32>, shared);
    adam_tile(a, shared);
}

HF_LOPT_KERNEL(kThreads, 4) descend_kernel(HF_LOPT_ARGUMENT DescendArgs a) { descend_tile(a); }

HF_LOPT_KERNEL(kThreads, 2) assign_kernel(HF_LOPT_ARGUMENT AssignArgs a) {
    if (*a.skip) return;
    const Place at = place(a.table);
    const TensorEntry& t = *at.entry;
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace row = at.row(turn);
        Lane x = load(pointer<void>(a.table, t, sG), t.g_type, at, row);
        store(pointer<void>(a.table, t, sP), t.p_type, at, row, x);
    }
}

HF_LOPT_KERNEL(kThreads, 2) zero_nan_kernel(HF_LOPT_ARGUMENT AssignArgs a) {
    const Place at = place(a.table);
    const TensorEntry& t = *at.entry;
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace row = at.row(turn);
        Lane x = load(pointer<void>(a.table, t, sP), t.p_type, at, row);
        bool found = false;
        HF_LOPT_EACH(e) {
            found |= x.x[e] != x.x[e];
            x.x[e] = x.x[e] != x.x[e] ? 0.0f : x.x[e];
        }
        if (found) store(pointer<void>(a.table, t, sP), t.p_type, at, row, x);
    }
}

HF_LOPT_KERNEL(kWarpSize, 1) probe_kernel(HF_LOPT_ARGUMENT ProbeArgs a) { (void)a; }

}  // namespace

void launch_adam(const AdamArgs& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH_LARGE(adam_kernel, tiles, kThreads, sizeof(ForAdam<InFloat32>), stream, args);
}
void launch_descend(const DescendArgs& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(descend_kernel, tiles, kThreads, stream, args);
}
void launch_assign(const AssignArgs& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(assign_kernel, tiles, kThreads, stream, args);
}
void launch_probe(const ProbeArgs& args, void* stream) { HF_LOPT_LAUNCH(probe_kernel, 1, kWarpSize, stream, args); }
void launch_zero_nan(const AssignArgs& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(zero_nan_kernel, tiles, kThreads, stream, args);
}

}  // namespace hf_lopt
