// Steps that need no features: Adam, and a given direction. `Args`: AdamArgs or DescendArgs, or with formats.
#pragma once

#include "full_tiles.cuh"

namespace hf_lopt {

// What is the same for all numbers of an Adam step over a tile.
struct AdamConstants {
    float scale, decay, second_scale;

    HF_LOPT_MEMBER AdamConstants(const AdamArgs& a, const Place& at)
        : scale(*a.momentum_correction * a.scale(at.tensor)),
          decay(a.decay(at.tensor)),
          second_scale(*a.second_correction) {}

    // Updates a parameter; returns the step.
    HF_LOPT_MEMBER float step(const AdamArgs& a, float m, float v, float& p) const {
        const float step = m * scale / (sqrtf(v * second_scale + a.inner_eps) + a.outer_eps);
        p = p - decay * p - step;
        return step;
    }
};

// Any rows; returns the thread's sum of squared steps.
template <class Args>
HF_LOPT_OUT_OF_LINE float other_adam_rows(const Args& a) {
    const Place at = same_place();
    const TensorEntry& t = *at.entry;
    const AdamConstants constants(a, at);
    const FormatsOf<Args> formats(a, at);
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
            const float step = constants.step(a, m.x[e], v.x[e], p.x[e]);
            step2 = fmaf(step, step, step2);
        }
        const auto draws = formats.template draws<false>(at, row);
        formats.template store<false>(a.table, at, row, sM, 0, draws, 0, m);
        formats.template store<false>(a.table, at, row, sV, 0, draws, 1, v);
        formats.template store_parameter<false>(a.table, at, row, p);
    }
    return step2;
}

// In shared memory.
constexpr int kAdamAhead = 2;
template <class Formats>
struct ForAdam : Formats::ForTile {
    ComingRows<kAdamAhead, 1> rows;
};

// A full tile.
template <class P, class G, class Args>
HF_LOPT_DEVICE float adam_full_rows(const Args& a, const Place& at, ForAdam<FormatsOf<Args>>& shared) {
    const AdamConstants constants(a, at);
    const FullTile f = full_tile(at);
    FullRows<kAdamAhead, P, G, FormatsOf<Args>, 1> rows(a, at, f, shared.rows, shared);
    rows.state.set_rows(at);
    barrier();
    float step2 = 0.0f;
#pragma unroll 1
    for (int row = at.warp(); rows.left > 0; row += kWarps) {
        auto& come = rows.wait();
        const Lane g = map(load_four(coming<G>(come.g, thread())), [&](float x) { return clamp(x, a.clip); });
        Lane p = load_four(coming<P>(come.p, thread()));
        Lane m = rows.state.momentum(come, 0, thread(), row), v = rows.state.second_moment(come, thread(), row);
        rows.proceed(come);
        m = ema(m, g, a.keep_m, a.add_m);
        v = ema(v, g * g, a.keep_v, a.add_v);
        HF_LOPT_EACH(e) {
            const float step = constants.step(a, m.x[e], v.x[e], p.x[e]);
            step2 = fmaf(step, step, step2);
        }
        rows.state.store_both(rows.element, row, f.column, m, v);
        rows.state.store_parameter(rows.p + rows.element, row, f.column, p);
    }
    return step2;
}

// A tile of either kernel.
template <class Args>
HF_LOPT_DEVICE void adam_tile(const Args& a, ForAdam<FormatsOf<Args>>& shared) {
    const Place at = place(a.table);
    const TensorEntry& t = *at.entry;
    if (*a.skip) {
        if (at.tile == 0 && thread() == 0) a.sums[t.tensor] = 0.0;
        return;
    }
    float step2 = 0.0f;
    if (!with_types_of_full_tile(is_full_flat(at), FormatsOf<Args>(a, at), at, [&](auto p, auto g) {
            step2 = adam_full_rows<decltype(p), decltype(g)>(a, at, shared);
        })) {
        step2 = other_adam_rows(a);
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
