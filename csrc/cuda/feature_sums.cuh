// Pass 1: the sum of squares of every feature column. Read-only. `Args`: FeatureSumsArgs, or with formats.
#pragma once

#include "full_tiles.cuh"

namespace hf_lopt {

// The sums of a thread over its part of a matrix.
struct Squares {
    float g = 0, clip = 0, p = 0, v = 0, q = 0, gq = 0;
    float m[kMomenta] = {}, mq[kMomenta] = {}, fac_g[kFactored] = {}, fac_m[kMomenta] = {};

    // `q_squared`: 1 / (v + eps), 0 where there is no element, where all else is zero; and the squares of the factors.
    HF_LOPT_MEMBER void add(const Updated& u, const Lane& q_squared, const Lane (&factor_squared)[kFactored]) {
        HF_LOPT_EACH(e) {
            const float x = u.g.x[e], square = x * x, clipped = clamp(x, kSmallClip);
            g += square;
            clip = fmaf(clipped, clipped, clip);
            p = fmaf(u.p.x[e], u.p.x[e], p);
            v = fmaf(u.v.x[e], u.v.x[e], v);
            q += q_squared.x[e];
            gq = fmaf(square, q_squared.x[e], gq);
#pragma unroll
            for (int k = 0; k < kMomenta; k++) {
                const float y = u.m[k].x[e] * u.m[k].x[e], f = factor_squared[k].x[e];
                m[k] += y;
                mq[k] = fmaf(y, q_squared.x[e], mq[k]);
                fac_g[k] = fmaf(square, f, fac_g[k]);
                fac_m[k] = fmaf(y, f, fac_m[k]);
            }
        }
    }

    // What the block has added up. From registers: an array that other functions see is in memory, which costs as much
    // as a tenth of the pass (measured on an H200).
    HF_LOPT_MEMBER void flush(double* out) const {
        double sums[kInputs] = {};
        sums[kG] = g;
        sums[kClipG] = clip;
        sums[kP] = p;
        sums[kV] = v;
        sums[kRsqrtV] = q;
        sums[kGRsqrtV] = gq;
#pragma unroll
        for (int k = 0; k < kMomenta; k++) {
            sums[kM + k] = m[k];
            sums[kMRsqrtV + k] = mq[k];
            sums[kFacG + k] = fac_g[k];
            sums[kFacM + k] = fac_m[k];
        }
        block_sums(sums, kInputs, out);
    }
};

// In shared memory.
template <class Formats>
struct ForFullTiles : Formats::ForTile {
    ComingRows<2> rows;
    OfLines squares;  // of the factors
};

template <class P, class G, class Args>
HF_LOPT_DEVICE void add_full_rows(const Args& a, const Place& at, ForFullTiles<FormatsOf<Args>>& shared, double* out) {
    const TensorEntry& t = *at.entry;
    const FullTile f = full_tile(at);
    FullRows<2, P, G, FormatsOf<Args>> rows(a, at, f, shared.rows, shared);
    copy_lines(a.table, at, sLineFactor, shared.squares, true);
    rows.state.set_rows(at);
    barrier();
    const float* vector = pointer<float>(a.table, t, sVectorFactor) + at.vector() + f.column;
    Lane along[kFactored];
#pragma unroll
    for (int k = 0; k < kFactored; k++) {
        HF_LOPT_EACH(e) along[k].x[e] = vector[k * t.vector_decay + e] * vector[k * t.vector_decay + e];
    }
    Squares squares;
#pragma unroll 1
    for (int row = at.warp(); rows.left > 0; row += kWarps) {
        const Updated u = rows.next(a.constants, row);
        const Lane of_line = load_four(shared.squares.row[row]);
        Lane factor_squared[kFactored];
#pragma unroll
        for (int k = 0; k < kFactored; k++) factor_squared[k] = along[k] * of_line.x[k];
        squares.add(u, map(u.v, [&](float v) { return reciprocal(v + a.constants.second_eps); }), factor_squared);
    }
    squares.flush(out);
}

template <Kind kind, class Args>
HF_LOPT_DEVICE void add_rows(const Args& a, const Place& at, double* out) {
    Lane along[kFactored];
    if constexpr (kind != kStrided) load_vector_factors(a.table, at, along);
    const FormatsOf<Args> formats(a, at);
    Squares squares;
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace row = at.row(turn);
        const Updated u = update<kind == kStrided>(formats, a.table, a.constants, at, row);
        Lane factor[kFactored], q_squared;
        load_factors<kind>(a.table, at, row, along, factor);
        // No root: only its square is needed.
        HF_LOPT_EACH(e) { q_squared.x[e] = at.live(row, e) ? reciprocal(u.v.x[e] + a.constants.second_eps) : 0.0f; }
#pragma unroll
        for (int k = 0; k < kFactored; k++) factor[k] = factor[k] * factor[k];
        squares.add(u, q_squared, factor);
    }
    squares.flush(out);
}

template <class Args>
HF_LOPT_OUT_OF_LINE void add_flat(const Args& a, double* out) {
    const Place at = same_place();
    double sums[kInputs] = {};
    const FormatsOf<Args> formats(a, at);
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace row = at.row(turn);
        const Updated u = update(formats, a.table, a.constants, at, row);
        Lane d[kFactored];
        load_diagonals(a.table, at, row, d);
        HF_LOPT_EACH(e) {
            if (!at.live(row, e)) continue;
            float x[kInputs];
            flat_features(u, a.constants, e, x, d);
#pragma unroll
            for (int f = 0; f < kInputs; f++) sums[f] += (double)x[f] * x[f];
        }
    }
    block_sums(sums, kInputs, out);
}

// Adds Σ x² and Σ 1/(x + eps): the squares of a vector feature and of its inverse root.
HF_LOPT_DEVICE void add_number(float x, double& square, double& inverse) {
    square += (double)x * x;
    inverse += 1.0f / (x + kVectorEps);
}

// The vector features: those of lines by the tiles of the first strip, the others by those of the first rows.
HF_LOPT_OUT_OF_LINE void vector_sums(const FeatureSumsArgs& a, double* out) {
    const Place at = same_place();
    const TensorEntry& t = *at.entry;
    double sums[kVectorSums] = {};
    const auto of = [&](int feature, int k) -> double& { return sums[feature * kFactored + k]; };
    if (at.strip == 0) {
        const float* x = pointer<float>(a.table, t, sLine);
        for (int64_t i = thread(); i < at.row_count() * t.inner; i += kThreads) {
            const int64_t number = at.line_of(i / t.inner) * t.inner + i % t.inner;
#pragma unroll
            for (int k = 0; k < kFactored; k++) {
                const float y = x[k * t.line_decay + number];
                if (t.row_is_line) {
                    add_number(y, of(kRow, k), of(kRsqrtRow, k));
                } else {
                    add_number(y, of(kCol, k), of(kRsqrtCol, k));
                }
            }
        }
    }
    if (at.row_tile == 0) {
        const float* x = pointer<float>(a.table, t, sVector);
        for (int c = thread(); c < at.width; c += kThreads) {
#pragma unroll
            for (int k = 0; k < kFactored; k++) {
                const float y = x[k * t.vector_decay + at.vector() + c];
                if (t.row_is_line) {
                    add_number(y, of(kCol, k), of(kRsqrtCol, k));
                } else {
                    add_number(y, of(kRow, k), of(kRsqrtRow, k));
                }
            }
        }
    }
    block_sums(sums, kVectorSums, out);
}

// Rows that are not full, or not neighbours.
template <Kind kind, class Args>
HF_LOPT_OUT_OF_LINE void add_other_rows(const Args& a, double* out) {
    const Place at = same_place();
    add_rows<kind>(a, at, out);
}

// The vector features of a strided slice, which may differ from element to element.
HF_LOPT_OUT_OF_LINE void strided_vector_sums(const FeatureSumsArgs& a, double* out) {
    const Place at = same_place();
    const TensorEntry& t = *at.entry;
    double sums[kVectorSums] = {};
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace row = at.row(turn);
#pragma unroll
        for (int k = 0; k < kFactored; k++) {
            const float* rows = pointer<float>(a.table, t, sLine) + k * t.line_decay;
            const float* cols = pointer<float>(a.table, t, sVector) + k * t.vector_decay;
            HF_LOPT_EACH(e) {
                if (!at.live(row, e)) continue;
                add_number(rows[strided_place(t.line_step, at, row, e)], sums[kRow * kFactored + k],
                           sums[kRsqrtRow * kFactored + k]);
                add_number(cols[strided_place(t.vector_step, at, row, e)], sums[kCol * kFactored + k],
                           sums[kRsqrtCol * kFactored + k]);
            }
        }
    }
    block_sums(sums, kVectorSums, out);
}

// Stores the sum of one column of features.
HF_LOPT_DEVICE void store_total(const FeatureSumsArgs& a, const Place& at, int j, double total) {
    const TensorEntry& t = *at.entry;
    double* out = a.sums + (int64_t)at.tensor * a.columns.count;
    if (j >= kInputs) {
        const int vector = (j - kInputs) / kFactored, column = a.columns.vector[vector][(j - kInputs) % kFactored];
        if (column < 0 || !t.factored) return;
        if (t.strided) {
            out[column] = total;
            return;
        }
        const bool of_line = t.row_is_line == (vector == kRow || vector == kRsqrtRow);
        // A vector feature is constant along the axis that its accumulator averages over.
        out[column] = total * ((double)t.numel / (double)(of_line ? t.line_length() : t.vector_length()));
        return;
    }
    if (a.columns.element[j] >= 0) out[a.columns.element[j]] = total;
    if (t.factored || j < kD) return;
    // For rank < 2 the row and the column accumulator are the same one.
    const int k = (j - kD) % kFactored;
    const bool root = j >= kRsqrtD;
    const int row = a.columns.vector[root ? kRsqrtRow : kRow][k], col = a.columns.vector[root ? kRsqrtCol : kCol][k];
    if (row >= 0) out[row] = total;
    if (col >= 0) out[col] = total;
}

// A tile of either kernel.
template <class Args>
HF_LOPT_DEVICE void feature_sums_of_tile(const Args& a, ForFullTiles<FormatsOf<Args>>& shared) {
    const Place at = place(a.table);
    const TensorEntry& t = *at.entry;
    double* partial = a.partial + (int64_t)block() * kSums;
    if (!t.factored) {
        add_flat(a, partial);
    } else if (t.strided) {
        add_other_rows<kStrided>(a, partial);
    } else if (t.inner > 1) {
        add_other_rows<kInner>(a, partial);
    } else if (!with_types_of_full_tile(is_full(at), FormatsOf<Args>(a, at), at, [&](auto p, auto g) {
                   add_full_rows<decltype(p), decltype(g)>(a, at, shared, partial);
               })) {
        add_other_rows<FormatsOf<Args>::kOtherRows>(a, partial);
    }
    if (t.strided) {
        strided_vector_sums(a, partial + kInputs);
    } else if (t.factored && (at.strip == 0 || at.row_tile == 0)) {
        vector_sums(a, partial + kInputs);
    } else {
        for (int j = thread(); j < kVectorSums; j += kThreads) partial[kInputs + j] = 0.0;
    }
    if (last_to_arrive(a.table.tickets + t.first_ticket, t.tiles())) {
        const double* first = a.partial + (int64_t)a.table.first_tile[at.tensor] * kSums;
        total_of_tiles(first, t.tiles(), kSums, kSums, [&](int j, double total) { store_total(a, at, j, total); });
    }
}

}  // namespace hf_lopt
