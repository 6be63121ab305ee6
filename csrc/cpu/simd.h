// One vector type per instruction set, with the operations that the arithmetic operators of GCC and Clang do not
// cover.
//
// Included by one file per instruction set, each compiled with its own flags. Everything has internal linkage, and no
// header of the standard library with inline functions is included, so that no code for a newer processor can be
// merged into what runs on an older one.
#pragma once

#include <stdint.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define HF_LOPT_INLINE static inline __attribute__((always_inline))
#define HF_LOPT_MEMBER inline __attribute__((always_inline))
#define HF_LOPT_LAMBDA __attribute__((always_inline))

namespace hf_lopt {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kRegisters = 32;
typedef __m512 vf;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kRegisters = 16;
typedef __m256 vf;
#else
constexpr int kWidth = 4;
constexpr int kRegisters = 16;
typedef float vf __attribute__((vector_size(16)));
#endif
typedef int32_t vi __attribute__((vector_size(4 * kWidth)));
typedef double vh __attribute__((vector_size(4 * kWidth)));  // of half the lanes

// A double for every lane, in two registers: wider vectors than those of the processor would go through memory.
struct vd {
    vh low, high;
};

HF_LOPT_INLINE vf splat(float x) {
#if defined(__AVX512F__)
    return _mm512_set1_ps(x);
#elif defined(__AVX2__)
    return _mm256_set1_ps(x);
#else
    return vf{x, x, x, x};
#endif
}

HF_LOPT_INLINE vf load(const float* p) {
#if defined(__AVX512F__)
    return _mm512_loadu_ps(p);
#elif defined(__AVX2__)
    return _mm256_loadu_ps(p);
#else
    vf x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
#endif
}

HF_LOPT_INLINE void store(float* p, vf x) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(p, x);
#elif defined(__AVX2__)
    _mm256_storeu_ps(p, x);
#else
    __builtin_memcpy(p, &x, sizeof x);
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
HF_LOPT_INLINE __m256i first_lanes(int k) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first k lanes; the others read as zero and are not touched in memory.
HF_LOPT_INLINE vf load_first(const float* p, int k) {
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps((__mmask16)((1u << k) - 1), p);
#elif defined(__AVX2__)
    return _mm256_maskload_ps(p, first_lanes(k));
#else
    vf x = splat(0.0f);
    for (int i = 0; i < k; i++) x[i] = p[i];
    return x;
#endif
}

HF_LOPT_INLINE void store_first(float* p, vf x, int k) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << k) - 1), x);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, first_lanes(k), x);
#else
    for (int i = 0; i < k; i++) p[i] = x[i];
#endif
}

HF_LOPT_INLINE vf keep_first(vf x, int k) {
#if defined(__AVX512F__)
    return _mm512_maskz_mov_ps((__mmask16)((1u << k) - 1), x);
#elif defined(__AVX2__)
    return _mm256_and_ps(x, _mm256_castsi256_ps(first_lanes(k)));
#else
    for (int i = k; i < kWidth; i++) x[i] = 0.0f;
    return x;
#endif
}

// The larger and the smaller of two numbers, b where one is NaN.
HF_LOPT_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

HF_LOPT_INLINE vf min(vf a, vf b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

HF_LOPT_INLINE vf clamp(vf x, float bound) { return min(splat(bound), max(splat(-bound), x)); }

HF_LOPT_INLINE vf relu(vf x) { return max(splat(0.0f), x); }

HF_LOPT_INLINE vf sqrt(vf x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#else
    for (int i = 0; i < kWidth; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// 1/sqrt(x), for normal positive x, to about one unit in the last place. Infinity may give NaN.
HF_LOPT_INLINE vf rsqrt(vf x) {
#if defined(__AVX512F__)
    vf y = _mm512_rsqrt14_ps(x), e = x * y;
    return (0.5f * y) * (1.0f - e * y) + y;  // one Newton step
#else
    return 1.0f / sqrt(x);
#endif
}

// 1/x, likewise.
HF_LOPT_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
    vf y = _mm512_rcp14_ps(x);
    return y * (1.0f - x * y) + y;  // one Newton step
#else
    return 1.0f / x;
#endif
}

HF_LOPT_INLINE bool any_not_below(vf x, float bound) {  // true for NaN
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(_mm512_abs_ps(x), splat(bound), _CMP_NLT_UQ) != 0;
#elif defined(__AVX2__)
    vf magnitude = _mm256_andnot_ps(splat(-0.0f), x);
    return _mm256_movemask_ps(_mm256_cmp_ps(magnitude, splat(bound), _CMP_NLT_UQ)) != 0;
#else
    bool any = false;
    for (int i = 0; i < kWidth; i++) any |= !(__builtin_fabsf(x[i]) < bound);
    return any;
#endif
}

HF_LOPT_INLINE vd widen(vf x) {
#if defined(__AVX512F__)
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
#elif defined(__AVX2__)
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
#else
    return {vh{x[0], x[1]}, vh{x[2], x[3]}};
#endif
}

HF_LOPT_INLINE vd operator*(vd a, vd b) { return {a.low * b.low, a.high * b.high}; }
HF_LOPT_INLINE vd operator*(vd a, double b) { return {a.low * b, a.high * b}; }
HF_LOPT_INLINE vd& operator+=(vd& a, vd b) {
    a.low += b.low;
    a.high += b.high;
    return a;
}

HF_LOPT_INLINE double sum(vd x) {
    const vh y = x.low + x.high;
    double s = 0.0;
    for (int i = 0; i < kWidth / 2; i++) s += y[i];
    return s;
}

HF_LOPT_INLINE double sum(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#elif defined(__AVX2__)
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// The library's exponential, lane by lane: for the rare vectors outside the range of exp_small.
static __attribute__((noinline)) vf exp_any(vf x) {
    for (int i = 0; i < kWidth; i++) x[i] = __builtin_expf(x[i]);
    return x;
}

}  // namespace
}  // namespace hf_lopt
