// Steps that need no features, over accumulators in any format; and the scales of new codes.
#include "steps.cuh"
#include "stored.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 2) adam_stored_kernel(HF_LOPT_ARGUMENT Stored<AdamArgs> a) {
    HF_LOPT_LARGE_SHARED(ForAdam<InAnyFormat>, shared);
    adam_tile(a, shared);
}

HF_LOPT_KERNEL(kThreads, 2) descend_stored_kernel(HF_LOPT_ARGUMENT Stored<DescendArgs> a) { descend_tile(a); }

// The largest number of a warp's part of a row.
HF_LOPT_DEVICE float largest_of(const Lane& y, float largest, int lanes) {
    HF_LOPT_EACH(e) largest = maximum(largest, fabsf(y.x[e]));
    for (int mask = lanes / 2; mask > 0; mask /= 2) largest = maximum(largest, shuffle_xor(largest, mask));
    return largest;
}

// Where the scales of a row's blocks are, and what becomes of them.
struct ScalePlaces {
    float *scales[2], *kept[2];  // of momenta, of second moments
    int64_t decay;

    HF_LOPT_MEMBER ScalePlaces(const FormatTable& table, const FormatEntry& f) : decay(f.scale_decay) {
#pragma unroll
        for (int of_v = 0; of_v < 2; of_v++) {
            scales[of_v] = table.scales[of_v] + f.scales[of_v];
            kept[of_v] = table.other_scales[of_v] + f.other_scales[of_v];
        }
    }
    // Of decay `k` of the momenta, or of the second moment for kMomenta.
    HF_LOPT_MEMBER int64_t place(int64_t block, int k) const { return k == kMomenta ? block : block + k * decay; }
    HF_LOPT_MEMBER float old_scale(int64_t block, int k) const { return scales[k == kMomenta][place(block, k)]; }
    HF_LOPT_MEMBER void replace(int64_t block, int k, float old, float largest) const {
        const int of_v = k == kMomenta;
        kept[of_v][place(block, k)] = old;
        scales[of_v][place(block, k)] = of_v ? scale_of<false>(largest) : scale_of<true>(largest);
    }
};

// Full tiles of so many neighbouring strips.
template <int strips, int momenta, class G>
HF_LOPT_DEVICE void scales_of_full_rows(const Stored<ScalesArgs>& a, const Place& at, const FormatEntry& f) {
    const TensorEntry& t = *at.entry;
    const FullTile full = full_tile(at);
    const ScalePlaces places(a.formats, f);
    const G* g = pointer<G>(a.table, t, sG) + full.element;
    const uint8_t *m = pointer<uint8_t>(a.table, t, sM) + full.element,
                  *v = pointer<uint8_t>(a.table, t, sV) + full.element;
    const int64_t step = full.element_step, m_step = t.decay, block_step = kWarps * f.blocks;
    int64_t block = (f.first + at.line_of(at.warp())) * f.blocks + at.start() / kCodeBlock;
#pragma unroll 1
    for (int turn = 0; turn < full.turns; turn++) {
        // All that is read, before anything waits for it.
        Lane x[strips];
        uint32_t codes[strips][kMomenta + 1];
        float old[kMomenta + 1];
#pragma unroll
        for (int s = 0; s < strips; s++) {
            x[s] = load_four(g + s * kStrip);
            codes[s][kMomenta] = *reinterpret_cast<const uint32_t*>(v + s * kStrip);
#pragma unroll
            for (int k = 0; k < momenta; k++) {
                codes[s][k] = *reinterpret_cast<const uint32_t*>(m + k * m_step + s * kStrip);
            }
        }
        old[kMomenta] = places.old_scale(block, kMomenta);
#pragma unroll
        for (int k = 0; k < momenta; k++) old[k] = places.old_scale(block, k);
        float largest[kMomenta + 1] = {};
#pragma unroll
        for (int s = 0; s < strips; s++) {
            HF_LOPT_EACH(e) {
                const float y = clamp(x[s].x[e], a.clip);
                const auto code = [&](int k) { return (uint8_t)(codes[s][k] >> 8 * e); };
                const float second = decode_number<false>(code(kMomenta), old[kMomenta]);
                largest[kMomenta] = maximum(largest[kMomenta], fabsf(ema(second, y * y, a.keep_v, a.add_v)));
#pragma unroll
                for (int k = 0; k < momenta; k++) {
                    const float first = decode_number<true>(code(k), old[k]);
                    largest[k] = maximum(largest[k], fabsf(ema(first, y, a.keep_m[k], a.add_m[k])));
                }
            }
        }
#pragma unroll
        for (int k = 0; k <= kMomenta; k++) {
            if (k >= momenta && k < kMomenta) continue;
#pragma unroll
            for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
                largest[k] = maximum(largest[k], shuffle_xor(largest[k], mask));
            }
            if (thread() % kWarpSize == 0) places.replace(block, k, old[k], largest[k]);
        }
        g += step;
        m += step;
        v += step;
        block += block_step;
    }
}

// Any rows of two neighbouring strips.
HF_LOPT_OUT_OF_LINE void scales_of_other_rows(const Stored<ScalesArgs>& a) {
    const Place at = same_place();
    const TensorEntry& t = *at.entry;
    const InAnyFormat formats(a, at);
    const FormatEntry& f = formats.entry();
    const ScalePlaces scales(a.formats, f);
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
            if (k >= a.momenta && k < kMomenta) continue;
            scales.replace(block, k, scales.old_scale(block, k), largest[k]);
        }
    }
}

template <int strips, class G>
HF_LOPT_DEVICE void scales_of_full_rows(const Stored<ScalesArgs>& a, const Place& at, const FormatEntry& f) {
    if (a.momenta == 1) {
        scales_of_full_rows<strips, 1, G>(a, at, f);
    } else {
        scales_of_full_rows<strips, kMomenta, G>(a, at, f);
    }
}

// The scales of new codes take the place of the old ones, which are kept for the kernel that reads the old codes. A
// block of codes is two strips: the tiles of every second one work on both.
HF_LOPT_KERNEL(kThreads, 3) scales_kernel(HF_LOPT_ARGUMENT Stored<ScalesArgs> a) {
    if (*a.skip) return;
    const Place at = place(a.table);
    if (at.strip % 2) return;
    const TensorEntry& t = *at.entry;
    const FormatEntry& f = a.formats.entries[at.tensor];
    const int64_t left = t.columns - at.start();
    const bool full = is_full_flat(at) && f.lines_are_rows && (a.momenta == 1 || a.momenta == kMomenta);
    if (full && left >= 2 * kStrip && t.g_type == kFloat32) {
        scales_of_full_rows<2, float>(a, at, f);
    } else if (full && left >= 2 * kStrip && t.g_type == kBFloat16) {
        scales_of_full_rows<2, BFloat16>(a, at, f);
    } else if (full && left == kStrip && t.g_type == kFloat32) {
        scales_of_full_rows<1, float>(a, at, f);
    } else {
        scales_of_other_rows(a);
    }
}

}  // namespace

void launch_adam_stored(const Stored<AdamArgs>& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH_LARGE(adam_stored_kernel, tiles, kThreads, sizeof(ForAdam<InAnyFormat>), stream, args);
}
void launch_descend_stored(const Stored<DescendArgs>& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(descend_stored_kernel, tiles, kThreads, stream, args);
}
void launch_scales(const Stored<ScalesArgs>& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(scales_kernel, tiles, kThreads, stream, args);
}

}  // namespace hf_lopt
