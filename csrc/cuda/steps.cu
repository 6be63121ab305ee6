// Steps that need no features: Adam, a given direction, and the storing of new state.
#include "tiles.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 2) adam_kernel(HF_LOPT_ARGUMENT AdamArgs a) {
    const Place at = place(a.table);
    const TensorEntry& t = *at.entry;
    if (*a.skip) {
        if (at.tile == 0 && thread() == 0) a.sums[t.tensor] = 0.0;
        return;
    }
    const float scale = *a.momentum_correction * a.scale(at.tensor), decay = a.decay(at.tensor);
    const float second_scale = *a.second_correction;
    float step2 = 0.0f;
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace row = at.row(turn);
        const Lane g =
            map(load(pointer<void>(a.table, t, sG), t.g_type, at, row), [&](float x) { return clamp(x, a.clip); });
        Lane p = load(pointer<void>(a.table, t, sP), t.p_type, at, row);
        Lane m = ema(load(pointer<float>(a.table, t, sM), kFloat32, at, row), g, a.keep_m, a.add_m);
        Lane v = ema(load(pointer<float>(a.table, t, sV), kFloat32, at, row), g * g, a.keep_v, a.add_v);
        HF_LOPT_EACH(e) {
            if (!at.live(row, e)) continue;
            const float step = m.x[e] * scale / (sqrtf(v.x[e] * second_scale + a.inner_eps) + a.outer_eps);
            p.x[e] = p.x[e] - decay * p.x[e] - step;
            step2 = fmaf(step, step, step2);
        }
        store(pointer<void>(a.table, t, sM), kFloat32, at, row, m);
        store(pointer<void>(a.table, t, sV), kFloat32, at, row, v);
        store(pointer<void>(a.table, t, sP), t.p_type, at, row, p);
    }
    const double sums[1] = {step2};
    block_sums(sums, 1, a.partial + block());
    // The tiles of all slices of the tensor are added up.
    const int32_t first_slice = t.tensor * a.slices, first_tile = a.table.first_tile[first_slice];
    const int32_t tiles = a.table.first_tile[first_slice + a.slices] - first_tile;
    if (last_to_arrive(a.table.tickets + a.table.entries[first_slice].first_ticket, tiles)) {
        total_of_tiles(a.partial + first_tile, tiles, 1, 1, [&](int, double total) { a.sums[t.tensor] = total; });
    }
}

template <bool strided>
HF_LOPT_DEVICE void descend_rows(const DescendArgs& a, const Place& at) {
    const TensorEntry& t = *at.entry;
    const float rate = a.rate(a.rate_of_slice ? at.tensor : t.tensor);
    const float decay = rate * a.weight_decay(a.weight_decay_of_slice ? at.tensor : t.tensor);
    float scale = rate;
    if (a.squares) scale *= (float)(1.0 / sqrt(a.squares[at.tensor] / a.numel[at.tensor] + a.norm_eps));
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace row = at.row(turn);
        const Lane step = load<strided>(pointer<void>(a.table, t, sG), t.g_type, at, row);
        Lane p = load<strided>(pointer<void>(a.table, t, sP), t.p_type, at, row);
        HF_LOPT_EACH(e) p.x[e] = p.x[e] - decay * p.x[e] - scale * step.x[e];
        store<strided>(pointer<void>(a.table, t, sP), t.p_type, at, row, p);
    }
}

HF_LOPT_KERNEL(kThreads, 2) descend_kernel(HF_LOPT_ARGUMENT DescendArgs a) {
    if (*a.skip) return;
    const Place at = place(a.table);
    if (at.entry->strided) {
        descend_rows<true>(a, at);
    } else {
        descend_rows<false>(a, at);
    }
}

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
    HF_LOPT_LAUNCH(adam_kernel, tiles, kThreads, stream, args);
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
