// Pass 2 over rows: the network and what it decides, for the instruction set that the including file is compiled for.
// Everything here has internal linkage.
#pragma once

#include "rows.h"

namespace hf_lopt {
namespace {

void vector_bias(const float* const* x, const float* w, const float* u, int units, int64_t n, float* bias,
                 int64_t bias_stride) {
    for_each_vector(n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
        vf y[kFactored], r[kFactored];
        for (int d = 0; d < kFactored; d++) {
            y[d] = get(x[d] + i, k);
            r[d] = inverse_root_of_vector<Arithmetic>(y[d]);
        }
        for (int j = 0; j < units; j++) {
            vf z = splat(0.0f);
            for (int d = 0; d < kFactored; d++) z += y[d] * w[d * units + j] + r[d] * u[d * units + j];
            put(bias + j * bias_stride + i, z, k);
        }
    });
}

// Running statistics of an update.
template <class S>
struct Stats {
    S step2{}, p2{}, v{}, v2{}, m[kMomenta]{}, m2[kMomenta]{};

    HF_LOPT_MEMBER void add(vf step_, vf p_) {
        S s = convert(step_, S{}), p = convert(p_, S{});
        step2 += s * s;
        p2 += p * p;
    }

    HF_LOPT_MEMBER void add_state(vf v_, const vf* m_) {
        S y = convert(v_, S{});
        v += y;
        v2 += y * y;
        for (int d = 0; d < kMomenta; d++) {
            S x = convert(m_[d], S{});
            m[d] += x;
            m2[d] += x * x;
        }
    }

    HF_LOPT_MEMBER void flush(double* out) {
        out[0] += sum(step2);
        out[1] += sum(p2);
        out[2] += sum(v);
        out[3] += sum(v2);
        for (int d = 0; d < kMomenta; d++) {
            out[4 + 2 * d] += sum(m[d]);
            out[5 + 2 * d] += sum(m2[d]);
        }
    }
};

// Stores the accumulators of a vector. Codes are made when all of a block is there: until then they are in the
// buffers.
template <int F, class S>
HF_LOPT_INLINE void store_state(const RowData& row, const Elements<vf>& a, int64_t i, int k, Stats<S>& stats) {
    if (F != kBFloat16) {
        for (int d = 0; d < kMomenta; d++) put(row.m[d] + i, a.m[d], k);
        put(row.v + i, a.v, k);
        if (F == kFloat32) stats.add_state(a.v, a.m);
        return;
    }
    vu hash = first_hash(row.random, i);
    vf rounded[kPlanes];
    for (int d = 0; d < kPlanes; d++) {
        if (d == 2) hash = next_hash(hash);
        const vu bits = (vu)(d < kMomenta ? a.m[d] : a.v) + draw(row.random, hash, d);
        rounded[d] = only((vf)(bits & 0xffff0000u), k);
        put_bfloat16(static_cast<uint16_t*>(row.stored[d]) + i, bits, k);
    }
    stats.add_state(rounded[kMomenta], rounded);
}

// Stores what a vector of outputs decides, and adds to the statistics.
template <int F, class S>
HF_LOPT_INLINE void finish(const RowData& row, float decay, const Elements<vf>& a, vf direction, vf magnitude,
                           int64_t i, int k, Stats<S>& stats) {
    vf step = direction * exponential(magnitude), p = a.p;
    store_state<F>(row, a, i, k, stats);
    if (row.step_out) {
        put(row.step_out + i, step, k);
    } else {
        p = a.p - decay * a.p - step;
        put(row.p_out + i, p, k);
    }
    stats.add(only(step, k), only(p, k));
}

// Few units: the layers stay in registers, and the features that are products with a row's or a column's factor are
// never formed. With rho the factors of the row and kappa those of the column, unit j of the first layer is
//   z = bias + g (a + Σ_k w_k rho_k kappa_k) + Σ_k m_k (a_k + u_k rho_k kappa_k) + q (h + b g + Σ_k b_k m_k) + ...
template <int U, int F>
void apply(const RowData* rows, int count, const FeatureConstants& c, const Network<U>& w, double* out) {
    float fac_g[kFactored][U], fac_m[kMomenta][U], g_and_clip_g[U];
    for (int j = 0; j < U; j++) g_and_clip_g[j] = w.first[kG][j] + w.first[kClipG][j];
    Stats<vf> stats;
    for (int r = 0; r < count; r++) {
        const RowData& row = rows[r];
        for (int k = 0; k < kFactored; k++) {
            for (int j = 0; j < U; j++) {
                fac_g[k][j] = w.first[kFacG + k][j] * row.rho[k];
                fac_m[k][j] = w.first[kFacM + k][j] * row.rho[k];
            }
        }
        for_each_vector(row.n, [&](int64_t i, int n) HF_LOPT_LAMBDA {
            // Each use reads one number for all lanes; vectors of them would first have to be made, for every row.
            asm("" : "+m"(fac_g), "+m"(fac_m));
            bool large;
            Elements<vf> a = updated<F>(row, c, i, n, &large);
            vf q = rsqrt(a.v + c.second_eps);
            const float* on_g_alone = large ? w.first[kG] : g_and_clip_g;
            vf factor[kFactored], z[U];
            for (int k = 0; k < kFactored; k++) factor[k] = get(row.factor[k] + i, n);
#pragma GCC unroll 8
            for (int j = 0; j < U; j++) {
                vf zj = get(row.bias + j * row.bias_stride + i, n) + row.row_bias[j];
                vf on_g = splat(on_g_alone[j]), on_q = splat(w.first[kRsqrtV][j]);
                on_q = a.g * w.first[kGRsqrtV][j] + on_q;
                zj = a.p * w.first[kP][j] + zj;
                zj = a.v * w.first[kV][j] + zj;
#pragma GCC unroll 3
                for (int k = 0; k < kMomenta; k++) {
                    on_g = factor[k] * fac_g[k][j] + on_g;
                    on_q = a.m[k] * w.first[kMRsqrtV + k][j] + on_q;
                    vf on_m = factor[k] * fac_m[k][j] + w.first[kM + k][j];
                    zj = a.m[k] * on_m + zj;
                }
                zj = a.g * on_g + zj;
                z[j] = q * on_q + zj;
            }
            if (large) {
                vf clipped = clamp(a.g, kSmallClip);
                for (int j = 0; j < U; j++) z[j] += clipped * w.first[kClipG][j];
            }
            vf direction, magnitude;
            finish_network<U>(w, z, [](vf x) HF_LOPT_LAMBDA { return relu(x); }, &direction, &magnitude);
            finish<F>(row, w.decay, a, direction, magnitude, i, n, stats);
        });
    }
    stats.flush(out);
}

// Many units, or rank < 2: all features of a block of kBlock vectors are formed, then each layer is a small matrix
// product in tiles of kTile units by kBlock vectors.
constexpr int kBlock = kRegisters == 32 ? 4 : 2, kTile = 4;

template <int B, int kIn>
HF_LOPT_INLINE void tile(const float* weights, int stride, const vf (*x)[B], vf (&z)[kTile][B]) {
    for (int f = 0; f < kIn; f++) {
#pragma GCC unroll 4
        for (int j = 0; j < kTile; j++) {
#pragma GCC unroll 4
            for (int b = 0; b < B; b++) z[j][b] = x[f][b] * weights[f * stride + j] + z[j][b];
        }
    }
}

// A matrix has no diagonal accumulators, and the networks with many units do not take clip_g and g_rsqrt_v.
constexpr int kMatrixInputs[] = {kG,           kP,      kM,    kM + 1,    kM + 2,    kV,    kMRsqrtV,  kMRsqrtV + 1,
                                 kMRsqrtV + 2, kRsqrtV, kFacG, kFacG + 1, kFacG + 2, kFacM, kFacM + 1, kFacM + 2};

template <bool kDiagonal>
constexpr int kBlockInputs = kDiagonal ? (int)kInputs : (int)(sizeof kMatrixInputs / sizeof(int));

// Where the vectors of a block are: all in one row, or each in any.
template <int B, bool kOneRow>
struct Places {
    const RowData* row[B];
    int64_t start[B];
    int lanes[B];  // 0: none; `row` and `start` are those of another one then

    HF_LOPT_MEMBER const RowData& row_of(int b) const { return *row[kOneRow ? 0 : b]; }
};

template <int U, bool kDiagonal, int F, int B, bool kOneRow, class S>
HF_LOPT_INLINE void apply_block(const Places<B, kOneRow>& at, const FeatureConstants& c, const Network<U>& w,
                                const float (&first)[kBlockInputs<kDiagonal>][U], Stats<S>& stats) {
    constexpr int kIn = kBlockInputs<kDiagonal>;
    vf x[kIn][B], h1[U][B], d[B][kFactored];
    Elements<vf> a[B];
    for (int b = 0; b < B; b++) {
        bool large;
        a[b] = updated<F>(at.row_of(b), c, at.start[b], at.lanes[b], &large);
        vf all[kInputs];
        features<kDiagonal>(at.row_of(b), c, a[b], at.start[b], at.lanes[b], all, d[b]);
        for (int f = 0; f < kIn; f++) x[f][b] = all[kDiagonal ? f : kMatrixInputs[f]];
    }
    for (int j0 = 0; j0 < U; j0 += kTile) {
        vf z[kTile][B];
        for (int j = 0; j < kTile; j++) {
            for (int b = 0; b < B; b++) {
                const RowData& row = at.row_of(b);
                z[j][b] = splat(kDiagonal ? w.bias[j0 + j] : row.row_bias[j0 + j]);
                if (!kDiagonal && at.lanes[b]) {
                    z[j][b] += get(row.bias + (j0 + j) * row.bias_stride + at.start[b], at.lanes[b]);
                }
            }
        }
        tile<B, kIn>(&first[0][j0], U, x, z);
        for (int j = 0; j < kTile; j++) {
            for (int b = 0; b < B; b++) h1[j0 + j][b] = relu(z[j][b]);
        }
    }
    vf direction[B], magnitude[B];
    for (int b = 0; b < B; b++) {
        direction[b] = splat(w.last_bias[0]);
        magnitude[b] = splat(w.last_bias[1]);
    }
    for (int j0 = 0; j0 < U; j0 += kTile) {
        vf z[kTile][B];
        for (int j = 0; j < kTile; j++) {
            for (int b = 0; b < B; b++) z[j][b] = splat(w.second_bias[j0 + j]);
        }
        tile<B, U>(&w.second[0][j0], U, h1, z);
        for (int j = 0; j < kTile; j++) {
            for (int b = 0; b < B; b++) {
                vf y = relu(z[j][b]);
                direction[b] = y * w.last[j0 + j][0] + direction[b];
                magnitude[b] = y * w.last[j0 + j][1] + magnitude[b];
            }
        }
    }
    for (int b = 0; b < B; b++) {
        if (!at.lanes[b]) continue;
        const RowData& row = at.row_of(b);
        finish<F>(row, w.decay, a[b], direction[b], magnitude[b], at.start[b], at.lanes[b], stats);
        for (int k = 0; kDiagonal && k < kFactored; k++) put(row.d[k] + at.start[b], d[b][k], at.lanes[b]);
    }
}

template <int U, bool kDiagonal, class S, int F>
void apply_blocks(const RowData* rows, int count, const FeatureConstants& c, const Network<U>& w, double* out) {
    float first[kBlockInputs<kDiagonal>][U];
    for (int f = 0; f < kBlockInputs<kDiagonal>; f++) {
        __builtin_memcpy(first[f], w.first[kDiagonal ? f : kMatrixInputs[f]], sizeof first[f]);
    }
    Stats<S> stats;
    const int64_t n = rows[0].n;  // of all of them
    const auto lanes = [&](int64_t i) { return n - i >= kWidth ? kWidth : n > i ? (int)(n - i) : 0; };
    if (count == 1 && n <= kWidth) {
        apply_block<U, kDiagonal, F>(Places<1, true>{{rows}, {0}, {(int)n}}, c, w, first, stats);
    } else if (count == 1 || n > (kBlock - 1) * kWidth) {
        for (int r = 0; r < count; r++) {
            for (int64_t start = 0; start < n; start += kBlock * kWidth) {
                Places<kBlock, true> at;
                at.row[0] = rows + r;
                for (int b = 0; b < kBlock; b++) {
                    at.lanes[b] = lanes(start + b * kWidth);
                    at.start[b] = at.lanes[b] ? start + b * kWidth : start;
                }
                apply_block<U, kDiagonal, F>(at, c, w, first, stats);
            }
        }
    } else {  // short rows share a block
        int64_t i = 0;
        for (int r = 0; r < count;) {
            Places<kBlock, false> at;
            for (int b = 0; b < kBlock; b++) {
                const bool any = r < count;
                at.row[b] = any ? rows + r : at.row[0];
                at.start[b] = any ? i : at.start[0];
                at.lanes[b] = any ? lanes(i) : 0;
                i += kWidth;
                if (i >= n) {
                    i = 0;
                    r++;
                }
            }
            apply_block<U, kDiagonal, F>(at, c, w, first, stats);
        }
    }
    stats.flush(out);
}

}  // namespace
}  // namespace hf_lopt
