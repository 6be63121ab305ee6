// The arithmetic of one row, for the instruction set that the including file is compiled for.
//
// That file defines HF_LOPT_KERNELS, the name of its table. Everything else here has internal linkage.
#include "formats.h"
#include "kernels.h"
#include "matrices.h"

namespace hf_lopt {
namespace {

constexpr int kPrefetch = 128;  // elements ahead, about the latency of main memory; 100 to 400 are within 10 %

HF_LOPT_INLINE void prefetch(const float* p) { __builtin_prefetch(p + kPrefetch); }

// Calls body(i, k) for every vector of a row; k is a constant kWidth except for the rest at the end.
template <class Body>
HF_LOPT_INLINE void for_each_vector(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) body(i, kWidth);
    if (i < n) body(i, (int)(n - i));
}

HF_LOPT_INLINE vf get(const float* p, int k) { return k == kWidth ? load(p) : load_first(p, k); }

HF_LOPT_INLINE void put(float* p, vf x, int k) {
    if (k == kWidth) {
        store(p, x);
    } else {
        store_first(p, x, k);
    }
}

// Zero beyond the first k lanes, for sums.
HF_LOPT_INLINE vf only(vf x, int k) { return k == kWidth ? x : keep_first(x, k); }

HF_LOPT_INLINE vf exponential(vf x) {
    if (__builtin_expect(any_not_below(x, kExpSmall), 0)) return exp_any(x);
    return exp_small(x);
}

// ---- sums of numbers ----------------------------------------------------------------------------------------------

HF_LOPT_INLINE vf convert(vf x, vf) { return x; }
HF_LOPT_INLINE vd convert(vf x, vd) { return widen(x); }

// S is the number type of the sums: vectors of float for the rows of a matrix, of double for rank < 2.
template <class S>
void moments(const float* const* rows, int count, int64_t n, double* total, double* squares) {
    S s{}, s2{};
    for (int r = 0; r < count; r++) {
        for_each_vector(n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
            S y = convert(get(rows[r] + i, k), S{});
            s += y;
            s2 += y * y;
        });
    }
    *total += sum(s);
    *squares += sum(s2);
}

// ---- pass 0 -------------------------------------------------------------------------------------------------------

GradientSums gradient_sums(const float* g, int64_t n, float clip, float* columns) {
    vf total = splat(0.0f), clipped = splat(0.0f);
    for_each_vector(n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
        prefetch(g + i);
        vf x = get(g + i, k), y = clamp(x, clip);
        total += x * x;
        vf y2 = y * y;
        clipped += y2;
        if (columns) put(columns + i, get(columns + i, k) + y2, k);
    });
    GradientSums out{sum(total), sum(clipped), 0};
    // A sum that float32 cannot hold, or that has lost its small terms: once more, slowly.
    if (!(out.squares < 1e30) || out.squares < 1e-25) {
        out.squares = 0.0;
        for (int64_t i = 0; i < n; i++) {
            out.squares += (double)g[i] * g[i];
            out.nonfinite += !(__builtin_fabsf(g[i]) <= __FLT_MAX__);
        }
    }
    return out;
}

// ---- what both later passes form ----------------------------------------------------------------------------------

struct Accumulators {
    vf g, p, m[kMomenta], v;
};

// The gradient and the accumulators after their update. The clips of the gradient are skipped for a vector that
// reaches neither: `large` says that it may.
HF_LOPT_INLINE Accumulators updated(const Row& row, const Constants& c, int64_t i, int k, bool* large) {
    Accumulators a;
    prefetch(row.g + i);
    prefetch(row.p + i);
    a.g = get(row.g + i, k);
    *large = __builtin_expect(any_not_below(a.g, c.unclipped), 0);
    if (*large) a.g = clamp(a.g, c.clip);
    a.p = get(row.p + i, k);
    for (int d = 0; d < kMomenta; d++) {
        prefetch(row.m[d] + i);
        a.m[d] = ema(get(row.m[d] + i, k), a.g, c.keep_m[d], c.add_m[d]);
    }
    prefetch(row.v + i);
    a.v = ema(get(row.v + i, k), a.g * a.g, c.keep_v, c.add_v);
    return a;
}

// All element features of a vector, and the new diagonal accumulators (rank < 2).
template <bool kDiagonal>
HF_LOPT_INLINE void features(const Row& row, const Constants& c, const Accumulators& a, int64_t i, int k, vf* x,
                             vf* d) {
    vf q = rsqrt(a.v + c.second_eps);
    x[kG] = a.g;
    x[kClipG] = clamp(a.g, kSmallClip);
    x[kP] = a.p;
    x[kV] = a.v;
    x[kRsqrtV] = q;
    x[kGRsqrtV] = a.g * q;
    for (int j = 0; j < kMomenta; j++) {
        x[kM + j] = a.m[j];
        x[kMRsqrtV + j] = a.m[j] * q;
    }
    for (int j = 0; j < kFactored; j++) {
        if (kDiagonal) {
            // Without an epsilon in fac_m the accumulator may be as small as 1e-33: roots and divisions, no estimates.
            d[j] = ema(get(row.d[j] + i, k), a.g * a.g + kFactoredEps, c.keep_d[j], c.add_d[j]);
            x[kD + j] = d[j];
            x[kRsqrtD + j] = 1.0f / sqrt(d[j] + kVectorEps);
            x[kFacG + j] = a.g / sqrt(max(splat(kFactorEps), d[j] + kFactorEps));
            x[kFacM + j] = a.m[j] / sqrt(d[j] + c.diagonal_eps);
        } else {
            vf factor = get(row.factor[j] + i, k) * row.rho[j];
            x[kFacG + j] = a.g * factor;
            x[kFacM + j] = a.m[j] * factor;
        }
    }
}

// ---- pass 1 -------------------------------------------------------------------------------------------------------

void feature_sums(const Row* rows, int count, const Constants& c, double* sums) {
    vf g2s = splat(0.0f), clip2 = g2s, v2 = g2s, p2 = g2s, q2 = g2s, gq2 = g2s;
    vf m2s[kMomenta] = {g2s, g2s, g2s}, mq2[kMomenta] = {g2s, g2s, g2s};
    vf fac_g2[kFactored], fac_m2[kMomenta];
    double fac_g[kFactored] = {}, fac_m[kMomenta] = {};
    for (int r = 0; r < count; r++) {
        const Row& row = rows[r];
        for (int j = 0; j < kFactored; j++) fac_g2[j] = fac_m2[j] = splat(0.0f);
        for_each_vector(row.n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
            bool large;
            Accumulators a = updated(row, c, i, k, &large);
            vf g2 = a.g * a.g;
            vf q_squared = reciprocal(a.v + c.second_eps);  // no root: only its square is needed
            if (large) {
                vf clipped = clamp(a.g, kSmallClip);
                clip2 += clipped * clipped;
            } else {
                clip2 += g2;
            }
            g2s += g2;
            p2 += a.p * a.p;
            v2 += a.v * a.v;
            q2 += only(q_squared, k);
            gq2 += g2 * q_squared;
            for (int j = 0; j < kMomenta; j++) {
                vf m2 = a.m[j] * a.m[j], factor = get(row.factor[j] + i, k);
                vf factor2 = factor * factor;
                m2s[j] += m2;
                mq2[j] += m2 * q_squared;
                fac_g2[j] += g2 * factor2;
                fac_m2[j] += m2 * factor2;
            }
        });
        for (int j = 0; j < kFactored; j++) {
            double rho2 = (double)row.rho[j] * row.rho[j];
            fac_g[j] += rho2 * sum(fac_g2[j]);
            fac_m[j] += rho2 * sum(fac_m2[j]);
        }
    }
    sums[kG] += sum(g2s);
    sums[kClipG] += sum(clip2);
    sums[kP] += sum(p2);
    sums[kV] += sum(v2);
    sums[kRsqrtV] += sum(q2);
    sums[kGRsqrtV] += sum(gq2);
    for (int j = 0; j < kMomenta; j++) {
        sums[kM + j] += sum(m2s[j]);
        sums[kMRsqrtV + j] += sum(mq2[j]);
        sums[kFacG + j] += fac_g[j];
        sums[kFacM + j] += fac_m[j];
    }
}

void feature_sums_diagonal(const Row* rows, int count, const Constants& c, double* sums) {
    vd totals[kInputs] = {};
    for (int r = 0; r < count; r++) {
        const Row& row = rows[r];
        for_each_vector(row.n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
            bool large;
            Accumulators a = updated(row, c, i, k, &large);
            vf x[kInputs], d[kFactored];
            features<true>(row, c, a, i, k, x, d);
            for (int f = 0; f < kInputs; f++) {
                vd y = widen(only(x[f], k));
                totals[f] += y * y;
            }
        });
    }
    for (int f = 0; f < kInputs; f++) sums[f] += sum(totals[f]);
}

// ---- pass 2 -------------------------------------------------------------------------------------------------------

void vector_bias(const float* const* x, const float* w, const float* u, int units, int64_t n, float* bias,
                 int64_t bias_stride) {
    for_each_vector(n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
        vf y[kFactored], r[kFactored];
        for (int d = 0; d < kFactored; d++) {
            y[d] = get(x[d] + i, k);
            r[d] = rsqrt(y[d] + kVectorEps);
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

    HF_LOPT_MEMBER void add(vf step_, vf p_, vf v_, const vf* m_) {
        S s = convert(step_, S{}), p = convert(p_, S{}), y = convert(v_, S{});
        step2 += s * s;
        p2 += p * p;
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

// Stores what a vector of outputs decides, and adds to the statistics.
template <class S>
HF_LOPT_INLINE void finish(const Row& row, float decay, const Accumulators& a, vf direction, vf magnitude, int64_t i,
                           int k, Stats<S>& stats) {
    vf step = direction * exponential(magnitude), p = a.p;
    for (int d = 0; d < kMomenta; d++) put(row.m[d] + i, a.m[d], k);
    put(row.v + i, a.v, k);
    if (row.step_out) {
        put(row.step_out + i, step, k);
    } else {
        p = a.p - decay * a.p - step;
        put(row.p_out + i, p, k);
    }
    stats.add(only(step, k), only(p, k), a.v, a.m);
}

// Few units: the layers stay in registers, and the features that are products with a row's or a column's factor are
// never formed. With rho the factors of the row and kappa those of the column, unit j of the first layer is
//   z = bias + g (a + Σ_k w_k rho_k kappa_k) + Σ_k m_k (a_k + u_k rho_k kappa_k) + q (h + b g + Σ_k b_k m_k) + ...
template <int U>
void apply(const Row* rows, int count, const Constants& c, const Network<U>& w, double* out) {
    float fac_g[kFactored][U], fac_m[kMomenta][U], g_and_clip_g[U];
    for (int j = 0; j < U; j++) g_and_clip_g[j] = w.first[kG][j] + w.first[kClipG][j];
    Stats<vf> stats;
    for (int r = 0; r < count; r++) {
        const Row& row = rows[r];
        for (int k = 0; k < kFactored; k++) {
            for (int j = 0; j < U; j++) {
                fac_g[k][j] = w.first[kFacG + k][j] * row.rho[k];
                fac_m[k][j] = w.first[kFacM + k][j] * row.rho[k];
            }
        }
        for_each_vector(row.n, [&](int64_t i, int n) HF_LOPT_LAMBDA {
            bool large;
            Accumulators a = updated(row, c, i, n, &large);
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
            finish(row, w.decay, a, direction, magnitude, i, n, stats);
        });
    }
    stats.flush(out);
}

// Many units, or rank < 2: all features of a block of kBlock vectors are formed, then each layer is a small matrix
// product in tiles of kTile units by kBlock vectors.
constexpr int kBlock = kRegisters == 32 ? 4 : 2, kTile = 4;

template <int U, int kIn>
HF_LOPT_INLINE void tile(const float* weights, int stride, const vf (*x)[kBlock], vf (&z)[kTile][kBlock]) {
    for (int f = 0; f < kIn; f++) {
#pragma GCC unroll 4
        for (int j = 0; j < kTile; j++) {
#pragma GCC unroll 4
            for (int b = 0; b < kBlock; b++) z[j][b] = x[f][b] * weights[f * stride + j] + z[j][b];
        }
    }
}

template <int U, bool kDiagonal, class S>
void apply_blocks(const Row* rows, int count, const Constants& c, const Network<U>& w, double* out) {
    // A matrix has no diagonal accumulators, and the networks with many units do not take clip_g and g_rsqrt_v.
    constexpr int kMatrixInputs[] = {kG,        kP,           kM,           kM + 1,   kM + 2, kV,
                                     kMRsqrtV,  kMRsqrtV + 1, kMRsqrtV + 2, kRsqrtV,  kFacG,  kFacG + 1,
                                     kFacG + 2, kFacM,        kFacM + 1,    kFacM + 2};
    constexpr int kIn = kDiagonal ? (int)kInputs : (int)(sizeof kMatrixInputs / sizeof(int));
    float first[kIn][U];
    for (int f = 0; f < kIn; f++)
        __builtin_memcpy(first[f], w.first[kDiagonal ? f : kMatrixInputs[f]], sizeof first[f]);

    Stats<S> stats;
    for (int r = 0; r < count; r++) {
        const Row& row = rows[r];
        for (int64_t start = 0; start < row.n; start += kBlock * kWidth) {
            vf x[kIn][kBlock], h1[U][kBlock], d[kBlock][kFactored];
            Accumulators a[kBlock];
            int lanes[kBlock];
            for (int b = 0; b < kBlock; b++) {
                int64_t i = start + b * kWidth, left = row.n - i;
                lanes[b] = left >= kWidth ? kWidth : left > 0 ? (int)left : 0;
                i = left > 0 ? i : start;  // an address to form, which nothing is read from
                bool large;
                a[b] = updated(row, c, i, lanes[b], &large);
                vf all[kInputs];
                features<kDiagonal>(row, c, a[b], i, lanes[b], all, d[b]);
                for (int f = 0; f < kIn; f++) x[f][b] = all[kDiagonal ? f : kMatrixInputs[f]];
            }
            for (int j0 = 0; j0 < U; j0 += kTile) {
                vf z[kTile][kBlock];
                for (int j = 0; j < kTile; j++) {
                    for (int b = 0; b < kBlock; b++) {
                        z[j][b] = splat(kDiagonal ? w.bias[j0 + j] : row.row_bias[j0 + j]);
                        if (!kDiagonal && lanes[b]) {
                            z[j][b] += get(row.bias + (j0 + j) * row.bias_stride + start + b * kWidth, lanes[b]);
                        }
                    }
                }
                tile<U, kIn>(&first[0][j0], U, x, z);
                for (int j = 0; j < kTile; j++) {
                    for (int b = 0; b < kBlock; b++) h1[j0 + j][b] = relu(z[j][b]);
                }
            }
            vf direction[kBlock], magnitude[kBlock];
            for (int b = 0; b < kBlock; b++) {
                direction[b] = splat(w.last_bias[0]);
                magnitude[b] = splat(w.last_bias[1]);
            }
            for (int j0 = 0; j0 < U; j0 += kTile) {
                vf z[kTile][kBlock];
                for (int j = 0; j < kTile; j++) {
                    for (int b = 0; b < kBlock; b++) z[j][b] = splat(w.second_bias[j0 + j]);
                }
                tile<U, U>(&w.second[0][j0], U, h1, z);
                for (int j = 0; j < kTile; j++) {
                    for (int b = 0; b < kBlock; b++) {
                        vf y = relu(z[j][b]);
                        direction[b] = y * w.last[j0 + j][0] + direction[b];
                        magnitude[b] = y * w.last[j0 + j][1] + magnitude[b];
                    }
                }
            }
            for (int b = 0; b < kBlock; b++) {
                if (!lanes[b]) continue;
                int64_t i = start + b * kWidth;
                finish(row, w.decay, a[b], direction[b], magnitude[b], i, lanes[b], stats);
                for (int k = 0; kDiagonal && k < kFactored; k++) put(row.d[k] + i, d[b][k], lanes[b]);
            }
        }
    }
    stats.flush(out);
}

// ---- Adam ---------------------------------------------------------------------------------------------------------

double adam(const Row& row, const AdamConstants& c) {
    vf total = splat(0.0f);
    for_each_vector(row.n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
        prefetch(row.g + i);
        prefetch(row.p + i);
        prefetch(row.m[0] + i);
        prefetch(row.v + i);
        vf g = clamp(get(row.g + i, k), c.clip), p = get(row.p + i, k);
        vf m = ema(get(row.m[0] + i, k), g, c.keep_m, c.add_m);
        vf v = ema(get(row.v + i, k), g * g, c.keep_v, c.add_v);
        vf step = m * c.step_scale / (sqrt(v * c.second_scale + c.inner_eps) + c.outer_eps);
        put(row.m[0] + i, m, k);
        put(row.v + i, v, k);
        put(row.p_out + i, p - c.decay * p - step, k);
        total += only(step * step, k);
    });
    return sum(total);
}

void descend(float* p, const float* step, int64_t n, float scale, float decay) {
    for_each_vector(n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
        prefetch(p + i);
        prefetch(step + i);
        vf x = get(p + i, k);
        put(p + i, x - decay * x - get(step + i, k) * scale, k);
    });
}

// ---- factored accumulators ----------------------------------------------------------------------------------------

double ema_of_means(const float* old, const float* sums, int64_t n, float size, float keep, float add, float* out) {
    vd total{};
    for_each_vector(n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
        vf x = ema(get(old + i, k), get(sums + i, k) / size + kFactoredEps, keep, add);
        put(out + i, x, k);
        total += widen(only(x, k));
    });
    return sum(total);
}

void factors(const float* x, int64_t n, float divisor, float* out) {
    for_each_vector(n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
        put(out + i, rsqrt(max(get(x + i, k) / divisor, splat(kFactorEps))), k);
    });
}

}  // namespace

extern const Kernels HF_LOPT_KERNELS;
const Kernels HF_LOPT_KERNELS = {
    HF_LOPT_ISA,
    from_half,
    to_half,
    from_bfloat16,
    to_bfloat16,
    moments<vf>,
    moments<vd>,
    gradient_sums,
    feature_sums,
    feature_sums_diagonal,
    vector_bias,
    apply<4>,
    apply<8>,
    apply_blocks<32, false, vf>,
    apply_blocks<4, true, vd>,
    apply_blocks<8, true, vd>,
    apply_blocks<32, true, vd>,
    adam,
    descend,
    ema_of_means,
    factors,
    newton_schulz,
};

}  // namespace hf_lopt
