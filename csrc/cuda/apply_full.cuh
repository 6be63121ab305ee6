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

// `into_out`: what the network says is stored as such, and the parameter is left alone.
template <int U, bool into_out, class P, class G>
HF_LOPT_DEVICE void apply_full_rows(const ApplyArgs& a, const Place& at, const Shared<U>& s, double* out) {
    const TensorEntry& t = *at.entry;
    const FullTile f = full_tile(at);
    FullRows<P, G> rows(a.table, t, f);
    const float* line = pointer<float>(a.table, t, sLine) + f.line;
    const float* line_factor = pointer<float>(a.table, t, sLineFactor) + f.line;
    const int64_t line_decay = t.line_decay;
    [[maybe_unused]] float* steps = pointer<float>(a.table, t, sOut);
    UpdateSums<float> sums;
#pragma unroll 1
    for (int turn = 0; turn < f.turns; turn++) {
        forget_loads();  // all weights do not fit into registers
        float y[kFactored], rho[kFactored], of_line[U];
#pragma unroll
        for (int k = 0; k < kFactored; k++) {
            y[k] = line[k * line_decay];
            rho[k] = line_factor[k * line_decay];
        }
        Updated u = rows.load(a.constants);
        Lane factor[kFactored], z[U], direction, magnitude;
#pragma unroll
        for (int k = 0; k < kFactored; k++) factor[k] = load_four(s.factors[k] + f.column) * rho[k];
#pragma unroll
        for (int j = 0; j < U; j++) of_line[j] = s.net.bias[j];
#pragma unroll
        for (int k = 0; k < kFactored; k++) {
            const float root = inverse_root_of_vector<Arithmetic>(y[k]);
#pragma unroll
            for (int j = 0; j < U; j++) {
                of_line[j] += s.vectors.line[k][j] * y[k] + s.vectors.rsqrt_line[k][j] * root;
            }
        }
#pragma unroll
        for (int j = 0; j < U; j++) z[j] = load_four(s.bias(f.column, j)) + splat(of_line[j]);
        first_layer<U>(s.net, u, a.constants.second_eps, factor, z);
        // Before the next layers need their registers.
#pragma unroll
        for (int k = 0; k < kMomenta; k++) {
            store_four(rows.m[k] + rows.element, u.m[k]);
            sums.m[k].add(u.m[k]);
        }
        store_four(rows.v + rows.element, u.v);
        sums.v.add(u.v);
        finish_network<U>(s.net, z, [](const Lane& x) { return map(x, relu); }, &direction, &magnitude);
        const Lane step = direction * exponentials(magnitude);
        HF_LOPT_EACH(e) sums.step2 += step.x[e] * step.x[e];
        if constexpr (into_out) {
            store_four(steps + rows.element, step);
            sums.p.add(u.p);
        } else {
            Lane p = u.p - u.p * s.net.decay - step;
            store_four(rows.p + rows.element, p);
            sums.p.add(p);
        }
        rows.element += rows.step;
        line += f.line_step;
        line_factor += f.line_step;
    }
    sums.flush(out);
}

// `into_out`: what the tiles that have a loop of their own do; others do either.
template <int U, bool into_out>
HF_LOPT_DEVICE void apply_tile_of_few(const ApplyArgs& a, Shared<U>& s) {
    apply_tile<U>(a, s, [&](const Place& at, double* partial) {
        if (at.entry->inner > 1) {
            apply_other_rows<U, kInner>(a, s, partial);
        } else if ((a.into_out != 0) != into_out || !with_types_of_full_tile(at, [&](auto p, auto g) {
                       apply_full_rows<U, into_out, decltype(p), decltype(g)>(a, at, s, partial);
                   })) {
            apply_other_rows<U, kMatrix>(a, s, partial);
        }
    });
}

}  // namespace hf_lopt
