// Conversions between float32 and the 16-bit formats, to nearest even.
#pragma once

#include "simd.h"

namespace hf_lopt {
namespace {

uint32_t bits(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, sizeof u);
    return u;
}

float number(uint32_t u) {
    float x;
    __builtin_memcpy(&x, &u, sizeof x);
    return x;
}

void from_bfloat16(const uint16_t* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = number((uint32_t)x[i] << 16);
}

void to_bfloat16(const float* x, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = bits(x[i]);
        uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        out[i] = (uint16_t)(x[i] != x[i] ? 0x7fc0 : rounded);
    }
}

float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return number(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // The exponents of the two formats differ by 112; the product also normalises subnormal numbers.
    return number(sign | bits(number(magnitude << 13) * number(0x77800000)));
}

uint16_t float_to_half(float x) {
    uint32_t u = bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    // Subnormal results: adding 1/2 leaves their bits, rounded to nearest even, at the end of the mantissa.
    if (magnitude < 0x38800000) return (uint16_t)(sign | (bits(number(magnitude) + 0.5f) - bits(0.5f)));
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}

void from_half(const uint16_t* x, int64_t n, float* out) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) store(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(x + i))));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) store(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
#endif
    for (; i < n; i++) out[i] = half_to_float(x[i]);
}

void to_half(const float* x, int64_t n, uint16_t* out) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i*)(out + i), _mm512_cvtps_ph(load(x + i), 0));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(load(x + i), 0));
#endif
    for (; i < n; i++) out[i] = float_to_half(x[i]);
}

}  // namespace
}  // namespace hf_lopt
