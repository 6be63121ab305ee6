// Steps that need no features: Adam, and a given direction. `Args`: AdamArgs or DescendArgs, or with formats.
#pragma once

#include "updated.cuh"

namespace hf_lopt {

// The rows of a tile; returns the thread's sum of squared steps.
template <class Args, class Formats>
HF_LOPT_DEVICE float adam_rows(const Args& a, const Place& at, const Formats& formats) {
    const TensorEntry& t = *at.entry;
    const float scale = *a.momentum_correction * a.scale(at.tensor), decay = a.decay(at.tensor);
    const float second_scale = *a.second_correction;
    float step2 = 0.0f;
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace row = at.row(turn);
        const Lane g =
            map(load(pointer<void>(a.table, t, sG), t.g_type, at, row), [&](float x) { return clamp(x, a.clip); });
        Lane p = load(pointer<void>(a.table, t, sP), t.p_type, at, row);
        Lane m = ema(formats.template load<false>(a.table, at, row, sM, 0), g, a.keep_m, a.add_m);
        Lane v = ema(formats.template load<false>(a.table, at, row, sV, 0), g * g, a.keep_v, a.add_v);
        HF_LOPT_EACH(e) {
            if (!at.live(row, e)) continue;
            const float step = m.x[e] * scale / (sqrtf(v.x[e] * second_scale + a.inner_eps) + a.outer_eps);
            p.x[e] = p.x[e] - decay * p.x[e] - step;
            step2 = fmaf(step, step, step2);
        }
        const auto draws = formats.template draws<false>(at, row);
        formats.template store<false>(a.table, at, row, sM, 0, draws, 0, m);
        formats.template store<false>(a.table, at, row, sV, 0, draws, 1, v);
        formats.template store_parameter<false>(a.table, at, row, p);
    }
    return step2;
}

// A tile of either kernel; `rows` does what `adam_rows` does.
template <class Args, class F>
HF_LOPT_DEVICE void adam_tile(const Args& a, F rows) {
    const Place at = place(a.table);
    const TensorEntry& t = *at.entry;
    if (*a.skip) {
        if (at.tile == 0 && thread() == 0) a.sums[t.tensor] = 0.0;
        return;
    }
    const double sums[1] = {rows(at)};
    block_sums(sums, 1, a.partial + block());
    // The tiles of all slices of the tensor are added up.
    const int32_t first_slice = t.tensor * a.slices, first_tile = a.table.first_tile[first_slice];
    const int32_t tiles = a.table.first_tile[first_slice + a.slices] - first_tile;
    if (last_to_arrive(a.table.tickets + a.table.entries[first_slice].first_ticket, tiles)) {
        total_of_tiles(a.partial + first_tile, tiles, 1, 1, [&](int, double total) { a.sums[t.tensor] = total; });
    }
}

template <bool strided, class Args>
HF_LOPT_DEVICE void descend_rows(const Args& a, const Place& at) {
    const TensorEntry& t = *at.entry;
    const FormatsOf<Args> formats(a, at);
    const float rate = a.rate(a.rate_of_slice ? at.tensor : t.tensor);
    const float decay = rate * a.weight_decay(a.weight_decay_of_slice ? at.tensor : t.tensor);
    float scale = rate;
    if (a.squares) scale *= (float)(1.0 / sqrt(a.squares[at.tensor] / a.numel[at.tensor] + a.norm_eps));
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace row = at.row(turn);
        const Lane step = load<strided>(pointer<void>(a.table, t, sG), t.g_type, at, row);
        Lane p = load<strided>(pointer<void>(a.table, t, sP), t.p_type, at, row);
        HF_LOPT_EACH(e) p.x[e] = p.x[e] - decay * p.x[e] - scale * step.x[e];
        formats.template store_parameter<strided>(a.table, at, row, p);
    }
}

template <class Args>
HF_LOPT_DEVICE void descend_tile(const Args& a) {
    if (*a.skip) return;
    const Place at = place(a.table);
    if (at.entry->strided) {
        descend_rows<true>(a, at);
    } else {
        descend_rows<false>(a, at);
    }
}

}  // namespace hf_lopt
