// Vectors of narrow numbers and of random ones, for the instruction set that the including file is compiled for.
// Everything here has internal linkage.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace hf_lopt {
namespace {

typedef uint32_t vu __attribute__((vector_size(4 * kWidth)));
typedef uint16_t vs __attribute__((vector_size(2 * kWidth)));

// Codes, signed and unsigned, of which k are read or written; the numbers of others are zero.
#if defined(__AVX512F__)
HF_LOPT_INLINE __mmask16 first_of(int k) { return (__mmask16)((1u << k) - 1); }

HF_LOPT_INLINE vf codes_at(const int8_t* p, int k) {
    const __m128i x = k == kWidth ? _mm_loadu_si128((const __m128i*)p) : _mm_maskz_loadu_epi8(first_of(k), p);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
}

HF_LOPT_INLINE vf codes_at(const uint8_t* p, int k) {
    const __m128i x = k == kWidth ? _mm_loadu_si128((const __m128i*)p) : _mm_maskz_loadu_epi8(first_of(k), p);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x));
}

HF_LOPT_INLINE void put_codes(void* p, vi codes, int k) {
    const __m128i x = _mm512_cvtepi32_epi8((__m512i)codes);
    if (k == kWidth) {
        _mm_storeu_si128((__m128i*)p, x);
    } else {
        _mm_mask_storeu_epi8(p, first_of(k), x);
    }
}

// Of numbers of bfloat16 the bits of float32, and the other way round the upper halves.
HF_LOPT_INLINE vu bfloat16_at(const uint16_t* p, int k) {
    const __m256i x = k == kWidth ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(first_of(k), p);
    return (vu)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}

HF_LOPT_INLINE void put_bfloat16(uint16_t* p, vu bits, int k) {
    const __m256i x = _mm512_cvtepi32_epi16((__m512i)(bits >> 16));
    if (k == kWidth) {
        _mm256_storeu_si256((__m256i*)p, x);
    } else {
        _mm256_mask_storeu_epi16(p, first_of(k), x);
    }
}

// x, and 1 more where a < b.
HF_LOPT_INLINE vf one_more(vf x, vf a, vf b) {
    return _mm512_mask_add_ps(x, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x, splat(1.0f));
}
#else
typedef int8_t vb __attribute__((vector_size(kWidth)));
typedef uint8_t vub __attribute__((vector_size(kWidth)));

template <class Narrow, class T>
HF_LOPT_INLINE Narrow get_narrow(const T* p, int k) {
    Narrow x{};
    __builtin_memcpy(&x, p, k == kWidth ? sizeof x : k * sizeof(T));
    return x;
}

template <class Narrow, class T>
HF_LOPT_INLINE void put_narrow(T* p, Narrow x, int k) {
    __builtin_memcpy(p, &x, k == kWidth ? sizeof x : k * sizeof(T));
}

HF_LOPT_INLINE vf codes_at(const int8_t* p, int k) {
    const vb x = get_narrow<vb>(p, k);
#if defined(__AVX2__)
    int64_t raw;
    __builtin_memcpy(&raw, &x, sizeof raw);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(raw)));
#else
    return __builtin_convertvector(__builtin_convertvector(x, vi), vf);
#endif
}

HF_LOPT_INLINE vf codes_at(const uint8_t* p, int k) {
    const vub x = get_narrow<vub>(p, k);
#if defined(__AVX2__)
    int64_t raw;
    __builtin_memcpy(&raw, &x, sizeof raw);
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(raw)));
#else
    return __builtin_convertvector(__builtin_convertvector(x, vi), vf);
#endif
}

HF_LOPT_INLINE void put_codes(void* p, vi codes, int k) {
    put_narrow(static_cast<int8_t*>(p), __builtin_convertvector(codes, vb), k);
}

HF_LOPT_INLINE vu bfloat16_at(const uint16_t* p, int k) {
    const vs x = get_narrow<vs>(p, k);
#if defined(__AVX2__)
    return (vu)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16);
#else
    return __builtin_convertvector(x, vu) << 16;
#endif
}

HF_LOPT_INLINE void put_bfloat16(uint16_t* p, vu bits, int k) {
    put_narrow(p, __builtin_convertvector(bits >> 16, vs), k);
}

HF_LOPT_INLINE vf one_more(vf x, vf a, vf b) {
#if defined(__AVX2__)
    return x + _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ), splat(1.0f));
#else
    return x + (vf)((vu)(vi)(a < b) & (vu)splat(1.0f));
#endif
}
#endif

HF_LOPT_INLINE vu lanes() {
    vu x;
    for (int i = 0; i < kWidth; i++) x[i] = (uint32_t)i;
    return x;
}

// The first hash of the elements from i on; `next_hash` gives the others, two places of random numbers each.
HF_LOPT_INLINE vu first_hash(const RandomRow& row, int64_t i) {
    return hash_of_column(lanes() + (row.start + (uint32_t)i));
}

HF_LOPT_INLINE vu draw(const RandomRow& row, vu hash, int slot) { return random_bits(hash, row.turn, slot); }

HF_LOPT_INLINE vf magnitude(vf x) { return (vf)((vu)x & 0x7fffffffu); }

// What a momentum of one of the codes `c` is in units of its scale, and a second moment's root.
HF_LOPT_INLINE vf momentum_of(vf c) { return c * magnitude(c); }

}  // namespace
}  // namespace hf_lopt
