// Steps that need no features, over accumulators in any format; and the scales of new codes.
#include "steps.cuh"
#include "stored_rows.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_OUT_OF_LINE float other_adam_rows(const Stored<AdamArgs>& a) {
    const Place at = same_place();
    return adam_rows(a, at, InAnyFormat(a, at));
}

HF_LOPT_KERNEL(kThreads, 2) adam_stored_kernel(HF_LOPT_ARGUMENT Stored<AdamArgs> a) {
    adam_tile(a, [&](const Place& at) {
        const InWholeRows rows(a, at);
        return rows.has(at) ? adam_rows(a, at, rows) : other_adam_rows(a);
    });
}

HF_LOPT_KERNEL(kThreads, 2) descend_stored_kernel(HF_LOPT_ARGUMENT Stored<DescendArgs> a) { descend_tile(a); }

HF_LOPT_DEVICE float largest_of(const Lane& y, float largest) {
    HF_LOPT_EACH(e) largest = maximum(largest, fabsf(y.x[e]));
    return largest;
}

// The rows of two neighbouring strips, whose numbers are of the same blocks of codes.
template <class Formats>
HF_LOPT_DEVICE void scales_of_rows(const Stored<ScalesArgs>& a, const Place& at, const Formats& formats) {
    const TensorEntry& t = *at.entry;
    const FormatEntry& f = formats.entry();
    Place right = at;
    right.strip++;
    right.width = (int)(t.columns - right.start() < kStrip ? t.columns - right.start() : kStrip);
    if (right.width < 0) right.width = 0;
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace rows[2] = {at.row(turn), right.row(turn)};
        Lane g[2], v[2], m[2][kMomenta];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Place& part = half ? right : at;
            g[half] = load(pointer<void>(a.table, t, sG), t.g_type, part, rows[half]);
            v[half] = formats.template load<false>(a.table, part, rows[half], sV, 0);
#pragma unroll
            for (int k = 0; k < kMomenta; k++) {
                if (k < a.momenta) m[half][k] = formats.template load<false>(a.table, part, rows[half], sM, k);
            }
        }
        float largest[1 + kMomenta] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Lane clipped = map(g[half], [&](float x) { return clamp(x, a.clip); });
            largest[kMomenta] = largest_of(ema(v[half], clipped * clipped, a.keep_v, a.add_v), largest[kMomenta]);
#pragma unroll
            for (int k = 0; k < kMomenta; k++) {
                if (k >= a.momenta) continue;
                largest[k] = largest_of(ema(m[half][k], clipped, a.keep_m[k], a.add_m[k]), largest[k]);
            }
        }
        for (int mask = t.lanes / 2; mask > 0; mask /= 2) {
#pragma unroll
            for (int k = 0; k <= kMomenta; k++) largest[k] = maximum(largest[k], shuffle_xor(largest[k], mask));
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

HF_LOPT_OUT_OF_LINE void other_scales_of_rows(const Stored<ScalesArgs>& a) {
    const Place at = same_place();
    scales_of_rows(a, at, InAnyFormat(a, at));
}

// The scales of new codes take the place of the old ones, which are kept for the kernel that reads the old codes. A
// block of codes is two strips: the tiles of every second one work on both.
HF_LOPT_KERNEL(kThreads, 3) scales_kernel(HF_LOPT_ARGUMENT Stored<ScalesArgs> a) {
    if (*a.skip) return;
    const Place at = place(a.table);
    if (at.strip % 2) return;
    const InWholeRows rows(a, at);
    if (rows.has(at)) {
        scales_of_rows(a, at, rows);
    } else {
        other_scales_of_rows(a);
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
