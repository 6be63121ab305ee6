// Pass 2: the network on the scaled features, new accumulators and the update of the parameter, all in place.
//
// For networks of U hidden units, in float32: tensor_core.cuh has the other way to evaluate many units. `Args`:
// ApplyArgs, or with formats.
#pragma once

#include "full_tiles.cuh"

namespace hf_lopt {

template <int U>
struct Shared {
    Network<U> net;
    VectorWeights<U> vectors;
    // What the vector features add to the first layer in each column. Few units: (U, kStrip), of which a thread reads
    // its four neighbouring columns at once, and a warp all banks. Many: (kStrip, U + 2), an even stride that spreads
    // what tensor_core.cuh reads together, eight columns of some units, over all banks.
    static constexpr bool kUnitsFirst = U <= 8;
    static constexpr int kColumnStride = kUnitsFirst ? 1 : U + 2, kUnitStride = kUnitsFirst ? kStrip : 1;
    alignas(16) float column_bias[kUnitsFirst ? U * kStrip : kStrip * kColumnStride];
    alignas(16) float factors[kFactored][kStrip];  // of the columns

    HF_LOPT_MEMBER float& bias(int column, int unit) {
        return column_bias[column * kColumnStride + unit * kUnitStride];
    }
    HF_LOPT_MEMBER const float* bias(int column, int unit) const {
        return column_bias + column * kColumnStride + unit * kUnitStride;
    }
};

// A thread's numbers of a row of shared memory that has one for every column of the strip.
HF_LOPT_DEVICE Lane load_columns(const float* x, const Place& at) {
    if (at.column_step == 1) return load_four(x + at.first_column);
    Lane y;
    HF_LOPT_EACH(e) y.x[e] = x[at.column(e)];
    return y;
}

// Copies the network of the tensor, with the scale of its step in it.
template <int U>
HF_LOPT_DEVICE void load_network(const ApplyArgs& a, const Place& at, Shared<U>& s) {
    const int t = at.tensor;
    const auto first = [&](int column, int j) { return column < 0 ? 0.0f : a.weights[0](t, column, j); };
    const float scale = a.scale(t);
    for (int i = thread(); i < kInputs * U; i += kThreads) {
        const int f = i / U, j = i % U;
        float w = first(a.columns.element[f], j);
        // For rank < 2 the row and the column accumulator are the same one.
        if (f >= kRsqrtD) {
            w = first(a.columns.vector[kRsqrtRow][f - kRsqrtD], j) +
                first(a.columns.vector[kRsqrtCol][f - kRsqrtD], j);
        } else if (f >= kD) {
            w = first(a.columns.vector[kRow][f - kD], j) + first(a.columns.vector[kCol][f - kD], j);
        }
        s.net.first[f][j] = w;
    }
    for (int i = thread(); i < U * U; i += kThreads) s.net.second[i / U][i % U] = a.weights[1](t, i / U, i % U);
    const bool row = at.entry->row_is_line;
    for (int i = thread(); i < kFactored * U; i += kThreads) {
        const int k = i / U, j = i % U;
        s.vectors.line[k][j] = first(a.columns.vector[row ? kRow : kCol][k], j);
        s.vectors.rsqrt_line[k][j] = first(a.columns.vector[row ? kRsqrtRow : kRsqrtCol][k], j);
        s.vectors.vector[k][j] = first(a.columns.vector[row ? kCol : kRow][k], j);
        s.vectors.rsqrt_vector[k][j] = first(a.columns.vector[row ? kRsqrtCol : kRsqrtRow][k], j);
    }
    for (int j = thread(); j < U; j += kThreads) {
        s.net.bias[j] = a.biases[0](t, j);
        s.net.second_bias[j] = a.biases[1](t, j);
        s.net.last[j][0] = a.weights[2](t, j, 0) * scale;
        s.net.last[j][1] = a.weights[2](t, j, 1) * a.exp_mult;
    }
    if (thread() < 2) s.net.last_bias[thread()] = a.biases[2](t, thread()) * (thread() ? a.exp_mult : scale);
    if (thread() == 0) s.net.decay = a.decay(t);
    barrier();
}

// Fills what is the same for all rows of the tile.
template <int U>
HF_LOPT_DEVICE void set_columns(const ApplyArgs& a, const Place& at, Shared<U>& s) {
    const TensorEntry& t = *at.entry;
    const float* x = pointer<float>(a.table, t, sVector) + at.vector();
    const float* factor = pointer<float>(a.table, t, sVectorFactor) + at.vector();
    for (int c = thread(); c < kStrip; c += kThreads) {
        float y[kFactored], root[kFactored];
#pragma unroll
        for (int k = 0; k < kFactored; k++) {
            s.factors[k][c] = c < at.width ? factor[k * t.vector_decay + c] : 0.0f;
            y[k] = c < at.width ? x[k * t.vector_decay + c] : 0.0f;
            root[k] = inverse_root_of_vector<Arithmetic>(y[k]);
        }
        for (int j = 0; j < U; j++) {
            float z = 0.0f;
#pragma unroll
            for (int k = 0; k < kFactored; k++) {
                z += y[k] * s.vectors.vector[k][j] + root[k] * s.vectors.rsqrt_vector[k][j];
            }
            s.bias(c, j) = z;
        }
    }
    barrier();
}

// Running statistics of the update in a thread's part of a tile.
template <class T>
struct UpdateSums {
    T step2 = 0;
    MomentSums<T> p, v, m[kMomenta];

    HF_LOPT_MEMBER void flush(double* out) const {
        const double sums[kUpdateStats] = {step2,        p.squares, v.sum,        v.squares, m[0].sum,
                                           m[0].squares, m[1].sum,  m[1].squares, m[2].sum,  m[2].squares};
        block_sums(sums, kUpdateStats, out);
    }
};

// Stores the accumulators, and adds to their statistics.
template <bool strided = false, class Args, class T>
HF_LOPT_DEVICE void store_accumulators(const Args& a, FormatsOf<Args> formats, const Place& at, const RowPlace& row,
                                       Updated& u, UpdateSums<T>& sums) {
    bool live[kLane];
    HF_LOPT_EACH(e) live[e] = at.live(row, e);
    formats.template store_all<strided>(a.table, at, row, u, [&](int k) {
        if (k < kMomenta) {
            sums.m[k].add(u.m[k], live);
        } else {
            sums.v.add(u.v, live);
        }
    });
}

// Stores what the outputs decide, and adds to the statistics.
template <bool strided = false, class Args, class T>
HF_LOPT_DEVICE void store_step(const Args& a, FormatsOf<Args> formats, const Place& at, const RowPlace& row,
                               const Lane& old, float decay, const Lane& direction, const Lane& magnitude,
                               UpdateSums<T>& sums) {
    const TensorEntry& t = *at.entry;
    bool live[kLane];
    Lane step, p;
    HF_LOPT_EACH(e) {
        live[e] = at.live(row, e);
        step.x[e] = direction.x[e] * exponential(magnitude.x[e]);
        p.x[e] = old.x[e] - decay * old.x[e] - step.x[e];
        if (live[e]) sums.step2 += (T)step.x[e] * (T)step.x[e];
    }
    if (a.into_out) {
        store<strided>(pointer<void>(a.table, t, sOut), kFloat32, at, row, step);
        sums.p.add(old, live);
    } else {
        formats.template store_parameter<strided>(a.table, at, row, p);
        sums.p.add(p, live);
    }
}

// row factor x column factor, for each decay
template <int U, Kind kind>
HF_LOPT_DEVICE void load_factors(const ApplyArgs& a, const Place& at, const RowPlace& row, const Shared<U>& s,
                                 Lane (&factor)[kFactored]) {
    Lane along[kFactored];
    if constexpr (kind != kStrided) {
#pragma unroll
        for (int k = 0; k < kFactored; k++) along[k] = load_columns(s.factors[k], at);
    }
    load_factors<kind>(a.table, at, row, along, factor);
}

// The first layer of few units; the features that are products with a row's or a column's factor are never formed.
// With f the product of both factors, unit j is
//   z = bias + g (a + Σ_k w_k f_k) + Σ_k m_k (a_k + u_k f_k) + q (h + b g + Σ_k b_k m_k) + ...
template <int U>
HF_LOPT_DEVICE void first_layer(const Network<U>& w, const Updated& u, float second_eps,
                                const Lane (&factor)[kFactored], Lane (&z)[U]) {
    // What needs the factors comes first, so that their registers are free for the rest.
#pragma unroll
    for (int j = 0; j < U; j++) {
        Lane on_g = splat(w.first[kG][j]);
        if (!u.large) on_g = splat(w.first[kG][j] + w.first[kClipG][j]);
#pragma unroll
        for (int k = 0; k < kMomenta; k++) {
            on_g = factor[k] * w.first[kFacG + k][j] + on_g;
            z[j] = u.m[k] * (factor[k] * w.first[kFacM + k][j] + splat(w.first[kM + k][j])) + z[j];
        }
        z[j] = u.g * on_g + z[j];
    }
    forget_loads();  // spares registers
    const Lane q = map(u.v, [&](float v) { return inverse_root(v + second_eps); });
#pragma unroll
    for (int j = 0; j < U; j++) {
        Lane on_q = u.g * w.first[kGRsqrtV][j] + splat(w.first[kRsqrtV][j]);
#pragma unroll
        for (int k = 0; k < kMomenta; k++) on_q = u.m[k] * w.first[kMRsqrtV + k][j] + on_q;
        z[j] = u.p * w.first[kP][j] + z[j];
        z[j] = u.v * w.first[kV][j] + z[j];
        z[j] = q * on_q + z[j];
    }
    if (u.large) {
        const Lane clipped = map(u.g, [](float x) { return clamp(x, kSmallClip); });
#pragma unroll
        for (int j = 0; j < U; j++) z[j] = clipped * w.first[kClipG][j] + z[j];
    }
}

// The biases of the first layer in a row: its own, that of the line's accumulator and that of the columns.
template <int U, Kind kind>
HF_LOPT_DEVICE void set_bias(const ApplyArgs& a, const Place& at, const RowPlace& row, const Shared<U>& s,
                             Lane (&z)[U]) {
    const TensorEntry& t = *at.entry;
    const float* x = pointer<float>(a.table, t, sLine);
    float of_line[U];
#pragma unroll
    for (int j = 0; j < U; j++) {
        of_line[j] = s.net.bias[j];
        z[j] = load_columns(s.bias(0, j), at);
    }
#pragma unroll
    for (int k = 0; k < kFactored; k++) {
        const Lane y = load_line<kind>(x + k * t.line_decay, at, row);
        const Lane root = map(y, [](float r) { return inverse_root_of_vector<Arithmetic>(r); });
#pragma unroll
        for (int j = 0; j < U; j++) {
            if (kind == kMatrix) {
                of_line[j] += s.vectors.line[k][j] * y.x[0] + s.vectors.rsqrt_line[k][j] * root.x[0];
            } else {
                z[j] = y * s.vectors.line[k][j] + z[j];
                z[j] = root * s.vectors.rsqrt_line[k][j] + z[j];
            }
        }
    }
#pragma unroll
    for (int j = 0; j < U; j++) HF_LOPT_EACH(e) z[j].x[e] += of_line[j];
}

template <int U, Kind kind, class Args>
HF_LOPT_DEVICE void apply_rows(const Args& a, const Place& at, const Shared<U>& s, double* out) {
    UpdateSums<float> sums;
    const FormatsOf<Args> formats(a, at);
#pragma unroll 1
    for (int turn = 0; turn < at.turns(); turn++) {
        forget_loads();  // all weights do not fit into registers
        const RowPlace row = at.row(turn);
        Updated u = update(formats, a.table, a.constants, at, row);
        Lane factor[kFactored], z[U], direction, magnitude;
        load_factors<U, kind>(a, at, row, s, factor);
        set_bias<U, kind>(a, at, row, s, z);
        first_layer<U>(s.net, u, a.constants.second_eps, factor, z);
        store_accumulators(a, formats, at, row, u, sums);  // before the next layers need their registers
        finish_network<U>(s.net, z, [](const Lane& x) { return map(x, relu); }, &direction, &magnitude);
        store_step(a, formats, at, row, u.p, s.net.decay, direction, magnitude, sums);
    }
    sums.flush(out);
}

template <int U, Kind kind, class Args>
HF_LOPT_OUT_OF_LINE void apply_other_rows(const Args& a, const Shared<U>& s, double* out) {
    const Place at = same_place();
    apply_rows<U, kind>(a, at, s, out);
}

// The layers after the first one, an element at a time: for many units, of which a thread holds one layer only.
template <int U>
HF_LOPT_DEVICE void finish_element(const Network<U>& w, float (&z)[U], float* direction, float* magnitude) {
    finish_network<U>(w, z, [](float x) { return relu(x); }, direction, magnitude);
}

// Any kind of tensors, element by element: those of rank < 2, strided slices, and all where there are many units.
template <int U, Kind kind, class Args>
HF_LOPT_OUT_OF_LINE void apply_elements(const Args& a, const Shared<U>& s, double* out) {
    const Place at = same_place();
    using T = std::conditional_t<kind == kFlat, double, float>;
    constexpr bool strided = kind == kStrided, columns = kind == kMatrix || kind == kInner;
    const TensorEntry& t = *at.entry;
    UpdateSums<T> sums;
    const FormatsOf<Args> formats(a, at);
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace row = at.row(turn);
        Updated u = update<strided>(formats, a.table, a.constants, at, row);
        Lane direction = splat(0.0f), magnitude = splat(0.0f), d[kFactored], factor[kFactored];
        if constexpr (kind == kFlat) {
            load_diagonals(a.table, at, row, d);
        } else {
            load_factors<U, kind>(a, at, row, s, factor);
        }
#pragma unroll 1
        for (int e = 0; e < kLane; e++) {
            if (!at.live(row, e)) continue;
            forget_loads();  // all weights do not fit into registers
            float x[kInputs] = {}, z[U];
#pragma unroll
            for (int j = 0; j < U; j++) z[j] = s.net.bias[j];
            if constexpr (kind == kFlat) {
                flat_features(u, a.constants, e, x, d);
            } else {
                float product[kFactored];
                HF_LOPT_UNROLL
                for (int k = 0; k < kFactored; k++) product[k] = factor[k].x[e];
                matrix_features<Arithmetic>(element(u, e), a.constants.second_eps, product, x);
                // Not features of the element, but added like them: the line's accumulator and its inverse root.
                const float* line = pointer<float>(a.table, t, sLine);
                line += strided           ? strided_place(t.line_step, at, row, e)
                        : kind == kMatrix ? row.line
                                          : row.line * t.inner + (at.start() + at.column(e)) % t.inner;
#pragma unroll
                for (int k = 0; k < kFactored; k++) {
                    x[kD + k] = line[k * t.line_decay];
                    x[kRsqrtD + k] = inverse_root_of_vector<Arithmetic>(x[kD + k]);
                }
            }
            if constexpr (columns) {
#pragma unroll
                for (int j = 0; j < U; j++) z[j] += *s.bias(at.column(e), j);
            }
            if constexpr (strided) {
                const float* vector = pointer<float>(a.table, t, sVector) + strided_place(t.vector_step, at, row, e);
#pragma unroll
                for (int k = 0; k < kFactored; k++) {
                    const float y = vector[k * t.vector_decay], root = inverse_root_of_vector<Arithmetic>(y);
#pragma unroll
                    for (int j = 0; j < U; j++) {
                        z[j] += y * s.vectors.vector[k][j] + root * s.vectors.rsqrt_vector[k][j];
                    }
                }
            }
#pragma unroll
            for (int f = 0; f < kInputs; f++) {
                const float* w = s.net.first[f];
                if (kind != kFlat && f >= kD) {
                    w = f < kRsqrtD ? s.vectors.line[f - kD] : s.vectors.rsqrt_line[f - kRsqrtD];
                }
#pragma unroll
                for (int j = 0; j < U; j++) z[j] = x[f] * w[j] + z[j];
            }
            finish_element<U>(s.net, z, &direction.x[e], &magnitude.x[e]);
        }
        store_accumulators<strided>(a, formats, at, row, u, sums);
        store_step<strided>(a, formats, at, row, u.p, s.net.decay, direction, magnitude, sums);
        if constexpr (kind == kFlat) {
            float* x = pointer<float>(a.table, t, sD);
#pragma unroll
            for (int k = 0; k < kFactored; k++) store(x + k * t.decay, kFloat32, at, row, d[k]);
        }
    }
    sums.flush(out);
}

HF_LOPT_DEVICE void finish_tile(const ApplyArgs& a, const Place& at) {
    const TensorEntry& t = *at.entry;
    if (!last_to_arrive(a.table.tickets + t.first_ticket, t.tiles())) return;
    const double* first = a.partial + (int64_t)a.table.first_tile[at.tensor] * kUpdateStats;
    double* stats = a.stats + (int64_t)at.tensor * (kUpdateStats + 1);
    total_of_tiles(first, t.tiles(), kUpdateStats, kUpdateStats, [&](int j, double total) {
        if (j == 0) {
            a.sums[at.tensor] = total;
            // The two statistics of the gradient come first and are not known here.
            stats[0] = stats[1] = 0.0;
        } else {
            stats[j + 1] = total;
        }
    });
}

// Results of a step that is skipped.
HF_LOPT_DEVICE void clear_results(const ApplyArgs& a, const Place& at) {
    if (at.tile != 0) return;
    if (thread() == 0) a.sums[at.tensor] = 0.0;
    if (thread() < kUpdateStats + 1) a.stats[(int64_t)at.tensor * (kUpdateStats + 1) + thread()] = 0.0;
}

// A tile of a kernel. `apply_matrix` does those of factored tensors that are not strided.
template <int U, class Args, class F>
HF_LOPT_DEVICE void apply_tile(const Args& a, Shared<U>& s, F apply_matrix) {
    Place at = place(a.table);
    // The copy in shared memory takes registers that this pass lacks (8 and 32 units: 5 and 10 % slower on an H200).
    at.entry = a.table.entries + at.tensor;
    if (*a.skip) {
        clear_results(a, at);
        return;
    }
    load_network(a, at, s);
    double* partial = a.partial + (int64_t)block() * kUpdateStats;
    if (!at.entry->factored) {
        apply_elements<U, kFlat>(a, s, partial);
    } else if (at.entry->strided) {
        apply_elements<U, kStrided>(a, s, partial);
    } else {
        set_columns(a, at, s);
        apply_matrix(at, partial);
    }
    finish_tile(a, at);
}

}  // namespace hf_lopt
