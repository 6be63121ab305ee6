// Steps that need no features, over accumulators in any format; and the scales of new codes.
#include "steps.cuh"
#include "stored.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 2) adam_stored_kernel(HF_LOPT_ARGUMENT Stored<AdamArgs> a) { adam_tile(a); }

HF_LOPT_KERNEL(kThreads, 2) descend_stored_kernel(HF_LOPT_ARGUMENT Stored<DescendArgs> a) { descend_tile(a); }

// The largest number of a warp's part of a row.
HF_LOPT_DEVICE float largest_of(const Lane& y, float largest, int lanes) {
    HF_LOPT_EACH(e) largest = maximum(largest, fabsf(y.x[e]));
    for (int mask = lanes / 2; mask > 0; mask /= 2) largest = maximum(largest, shuffle_xor(largest, mask));
    return largest;
}

// The scales of new codes take the place of the old ones, which are kept for the kernel that reads the old codes. A
// block of codes is two strips: the tiles of every second one work on both.
HF_LOPT_KERNEL(kThreads, 2) scales_kernel(HF_LOPT_ARGUMENT Stored<ScalesArgs> a) {
    if (*a.skip) return;
    const Place at = place(a.table);
    if (at.strip % 2) return;
    const TensorEntry& t = *at.entry;
    const InAnyFormat formats(a, at);
    const FormatEntry& f = formats.entry();
    Place right = at;
    right.strip++;
    right.width = (int)(t.columns - right.start() < kStrip ? t.columns - right.start() : kStrip);
    if (right.width < 0) right.width = 0;
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace rows[2] = {at.row(turn), right.row(turn)};
        const Place* places[2] = {&at, &right};
        float largest[1 + kMomenta] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Place& part = *places[half];
            const RowPlace& row = rows[half];
            const Lane g = map(load(pointer<void>(a.table, t, sG), t.g_type, part, row),
                               [&](float x) { return clamp(x, a.clip); });
            const Lane v = ema(formats.load<false>(a.table, part, row, sV, 0), g * g, a.keep_v, a.add_v);
            largest[kMomenta] = largest_of(v, largest[kMomenta], t.lanes);
#pragma unroll
            for (int k = 0; k < kMomenta; k++) {
                if (k >= a.momenta) continue;
                const Lane m = ema(formats.load<false>(a.table, part, row, sM, k), g, a.keep_m[k], a.add_m[k]);
                largest[k] = largest_of(m, largest[k], t.lanes);
            }
        }
        if (thread() % t.lanes != 0 || rows[0].limit == 0) continue;
        const int64_t block = (f.first + rows[0].line) * f.blocks + at.start() / kCodeBlock;
#pragma unroll
        for (int k = 0; k <= kMomenta; k++) {
            const int of_v = k == kMomenta;
            if (!of_v && k >= a.momenta) continue;
            const int64_t place = block + (of_v ? 0 : k * f.scale_decay);
            float& scale = a.formats.scales[of_v][f.scales[of_v] + place];
            a.formats.other_scales[of_v][f.other_scales[of_v] + place] = scale;
            scale = of_v ? scale_of<false>(largest[k]) : scale_of<true>(largest[k]);
        }
    }
}

}  // namespace

void launch_adam_stored(const Stored<AdamArgs>& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(adam_stored_kernel, tiles, kThreads, stream, args);
}
void launch_descend_stored(const Stored<DescendArgs>& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(descend_stored_kernel, tiles, kThreads, stream, args);
}
void launch_scales(const Stored<ScalesArgs>& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(scales_kernel, tiles, kThreads, stream, args);
}

}  // namespace hf_lopt
