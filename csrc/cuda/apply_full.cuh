// Pass 2 for few units: a loop of its own for full tiles, and which loop a tile goes to.
#pragma once

#include "apply.cuh"

namespace hf_lopt {

// The exponentials of a thread: nearly always all of them are near 1, as exp_mult is small.
HF_LOPT_DEVICE Lane exponentials(const Lane& x) {
    bool small = true;
    HF_LOPT_EACH(e) small &= fabsf(x.x[e]) < kExpSmall;
    return small ? map(x, [](float y) { return exp_small(y); }) : map(x, [](float y) { return exponential(y); });
}

// Rows under way, measured on an H200: with 8 units a second one costs more than it brings.
template <int U>
constexpr int kRowsAhead = U <= 4 ? 2 : 1;

// In shared memory.
template <int U, class Formats = InFloat32>
struct ForFullTiles : Formats::ForTile {
    ComingRows<kRowsAhead<U>> rows;
    OfLines factors;
    alignas(16) float bias[kTileRows][U];  // what the vector features add to the first layer in each row, and its bias
};

template <int U, class Formats>
HF_LOPT_DEVICE void set_line_biases(const ApplyArgs& a, const Place& at, const Shared<U>& s,
                                    ForFullTiles<U, Formats>& shared) {
    const TensorEntry& t = *at.entry;
    const float* x = pointer<float>(a.table, t, sLine);
    for_rows(at, [&](int r, int64_t line) {
        float z[U];
#pragma unroll
        for (int j = 0; j < U; j++) z[j] = s.net.bias[j];
#pragma unroll
        for (int k = 0; k < kFactored; k++) {
            const float y = x[k * t.line_decay + line], root = inverse_root_of_vector<Arithmetic>(y);
#pragma unroll
            for (int j = 0; j < U; j++) z[j] += s.vectors.line[k][j] * y + s.vectors.rsqrt_line[k][j] * root;
        }
#pragma unroll
        for (int j = 0; j < U; j++) shared.bias[r][j] = z[j];
    });
}

// `into_out`: what the network says is stored as such, and the parameter is left alone.
template <int U, bool into_out, class P, class G, class Args>
HF_LOPT_DEVICE void apply_full_rows(const Args& a, const Place& at, const Shared<U>& s,
                                    ForFullTiles<U, FormatsOf<Args>>& shared, double* out) {
    const TensorEntry& t = *at.entry;
    const FullTile f = full_tile(at);
    FullRows<kRowsAhead<U>, P, G, FormatsOf<Args>> rows(a, at, f, shared.rows, shared);
    set_line_biases(a, at, s, shared);
    copy_lines(a.table, at, sLineFactor, shared.factors);
    rows.state.set_rows(at);
    barrier();
    [[maybe_unused]] float* steps = pointer<float>(a.table, t, sOut);
    UpdateSums<float> sums;
#pragma unroll 1
    for (int row = at.warp(); rows.left > 0; row += kWarps) {
        forget_loads();  // all weights do not fit into registers
        Updated u = rows.next(a.constants, row);
        Lane factor[kFactored], z[U], direction, magnitude;
        const Lane rho = load_four(shared.factors.row[row]);
#pragma unroll
        for (int k = 0; k < kFactored; k++) factor[k] = load_four(s.factors[k] + f.column) * rho.x[k];
#pragma unroll
        for (int j = 0; j < U; j += kLane) {
            const Lane of_line = load_four(shared.bias[row] + j);
            HF_LOPT_EACH(e) z[j + e] = load_four(s.bias(f.column, j + e)) + splat(of_line.x[e]);
        }
        first_layer<U>(s.net, u, a.constants.second_eps, factor, z);
        // Before the next layers need their registers.
        rows.state.store(rows.element, row, f.column, u, [&](int k) {
            if (k < kMomenta) {
                sums.m[k].add(u.m[k]);
            } else {
                sums.v.add(u.v);
            }
        });
        finish_network<U>(s.net, z, [](const Lane& x) { return map(x, relu); }, &direction, &magnitude);
        const Lane step = direction * exponentials(magnitude);
        HF_LOPT_EACH(e) sums.step2 += step.x[e] * step.x[e];
        if constexpr (into_out) {
            store_four(steps + rows.element, step);
            sums.p.add(u.p);
        } else {
            Lane p = u.p - u.p * s.net.decay - step;
            rows.state.store_parameter(rows.p + rows.element, row, f.column, p);
            sums.p.add(p);
        }
    }
    sums.flush(out);
}

// `into_out`: what the tiles that have a loop of their own do; others do either.
template <int U, bool into_out, class Args>
HF_LOPT_DEVICE void apply_tile_of_few(const Args& a, Shared<U>& s, ForFullTiles<U, FormatsOf<Args>>& shared) {
    apply_tile<U>(a, s, [&](const Place& at, double* partial) {
        if (at.entry->inner > 1) {
            apply_other_rows<U, kInner>(a, s, partial);
        } else if ((a.into_out != 0) != into_out ||
                   !with_types_of_full_tile(is_full(at), FormatsOf<Args>(a, at), at, [&](auto p, auto g) {
                       apply_full_rows<U, into_out, decltype(p), decltype(g)>(a, at, s, shared, partial);
                   })) {
            apply_other_rows<U, FormatsOf<Args>::kOtherRows>(a, s, partial);
        }
    });
}

}  // namespace hf_lopt
