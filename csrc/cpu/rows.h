// The arithmetic of one row but for the network, for the instruction set that the including file is compiled for.
// Everything here has internal linkage.
#pragma once

#include "formats.h"
#include "kernels.h"
#include "random_rows.h"
#include "simd.h"

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

// What features.h takes from the instruction set.
struct Arithmetic {
    HF_LOPT_INLINE vf inverse_root(vf x) { return rsqrt(x); }
    HF_LOPT_INLINE vf sqrt(vf x) { return hf_lopt::sqrt(x); }
    HF_LOPT_INLINE vf clamp(vf x, float bound) { return hf_lopt::clamp(x, bound); }
    HF_LOPT_INLINE vf at_least(vf x, float bound) { return max(splat(bound), x); }
};

// A vector of momentum or, for the last of the planes, second moment `a` before the update.
template <int F>
HF_LOPT_INLINE vf state_at(const RowData& row, int a, int64_t i, int k) {
    if (F == kBFloat16) {
        const uint16_t* p = static_cast<const uint16_t*>(row.stored[a]) + i;
        __builtin_prefetch(p + kPrefetch);
        return (vf)bfloat16_at(p, k);
    }
    if (F == kCodes) {
        const vf scale = splat(row.scales[a][(uint64_t)i / kCodeBlock]);
        const int8_t* p = static_cast<const int8_t*>(row.stored[a]) + i;
        __builtin_prefetch(p + kPrefetch);
        if (a < kMomenta) return momentum_of(codes_at(p, k)) * scale;
        const vf c = codes_at(reinterpret_cast<const uint8_t*>(p), k), root = c * c * scale;
        return root * root;
    }
    const float* p = (a < kMomenta ? row.m[a] : row.v) + i;
    prefetch(p);
    return get(p, k);
}

// The gradient and the accumulators after their update. The clips of the gradient are skipped for a vector that
// reaches neither: `large` says that it may.
template <int F>
HF_LOPT_INLINE Elements<vf> updated(const RowData& row, const FeatureConstants& c, int64_t i, int k, bool* large) {
    Elements<vf> a;
    prefetch(row.g + i);
    prefetch(row.p + i);
    a.g = get(row.g + i, k);
    *large = __builtin_expect(any_not_below(a.g, c.unclipped), 0);
    if (*large) a.g = clamp(a.g, c.clip);
    a.p = get(row.p + i, k);
    for (int d = 0; d < kMomenta; d++) a.m[d] = ema(state_at<F>(row, d, i, k), a.g, c.keep_m[d], c.add_m[d]);
    a.v = ema(state_at<F>(row, kMomenta, i, k), a.g * a.g, c.keep_v, c.add_v);
    return a;
}

// All element features of a vector, and the new diagonal accumulators (rank < 2).
template <bool kDiagonal>
HF_LOPT_INLINE void features(const RowData& row, const FeatureConstants& c, const Elements<vf>& a, int64_t i, int k,
                             vf (&x)[kInputs], vf (&d)[kFactored]) {
    vf y[kFactored];
    if (kDiagonal) {
        for (int j = 0; j < kFactored; j++) y[j] = get(row.d[j] + i, k);
        flat_features<Arithmetic>(a, c, y, x, d);
    } else {
        for (int j = 0; j < kFactored; j++) y[j] = get(row.factor[j] + i, k) * row.rho[j];
        matrix_features<Arithmetic>(a, c.second_eps, y, x);
    }
}

// ---- pass 1 -------------------------------------------------------------------------------------------------------

template <int F>
void feature_sums(const RowData* rows, int count, const FeatureConstants& c, double* sums) {
    vf g2s = splat(0.0f), clip2 = g2s, v2 = g2s, p2 = g2s, q2 = g2s, gq2 = g2s;
    vf m2s[kMomenta] = {g2s, g2s, g2s}, mq2[kMomenta] = {g2s, g2s, g2s};
    vf fac_g2[kFactored], fac_m2[kMomenta];
    vd fac_g[kFactored] = {}, fac_m[kMomenta] = {};
    for (int r = 0; r < count; r++) {
        const RowData& row = rows[r];
        for (int j = 0; j < kFactored; j++) fac_g2[j] = fac_m2[j] = splat(0.0f);
        for_each_vector(row.n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
            bool large;
            Elements<vf> a = updated<F>(row, c, i, k, &large);
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
            fac_g[j] += widen(fac_g2[j]) * rho2;
            fac_m[j] += widen(fac_m2[j]) * rho2;
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
        sums[kFacG + j] += sum(fac_g[j]);
        sums[kFacM + j] += sum(fac_m[j]);
    }
}

void feature_sums_diagonal(const RowData* rows, int count, const FeatureConstants& c, double* sums) {
    vd totals[kInputs] = {};
    for (int r = 0; r < count; r++) {
        const RowData& row = rows[r];
        for_each_vector(row.n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
            bool large;
            Elements<vf> a = updated<kFloat32>(row, c, i, k, &large);
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

// ---- Adam ---------------------------------------------------------------------------------------------------------

double adam(const RowData& row, const AdamConstants& c) {
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
}  // namespace hf_lopt
