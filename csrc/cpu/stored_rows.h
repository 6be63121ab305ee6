// Rows of accumulators and parameters in the formats of hf_lopt/kernels/reference/formats.py, which specifies them,
// for the instruction set that the including file is compiled for. Everything here has internal linkage.
#pragma once

#include "network_rows.h"

namespace hf_lopt {
namespace {

// sqrt(x) for x >= 0, to about one unit in the last place.
HF_LOPT_INLINE vf root(vf x) {
#if defined(__AVX512F__)
    return x * rsqrt(max(x, splat(1e-37f)));
#else
    return sqrt(x);
#endif
}

// Likewise to one part in 10,000: a code that is off by one next to its boundary is put right by the rounding.
HF_LOPT_INLINE vf rough_root(vf x) {
#if defined(__AVX512F__)
    return x * _mm512_rsqrt14_ps(max(x, splat(1e-37f)));
#else
    return sqrt(x);
#endif
}

template <int kCount>
HF_LOPT_INLINE void round_rows(float* const* x, int64_t n, const RandomRow& row, int slot, uint16_t* const* out) {
    for_each_vector(n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
        vu hash = first_hash(row, i);
        for (int s = 1; s < slot; s += 2) hash = next_hash(hash);
#pragma GCC unroll 4
        for (int a = 0; a < kCount; a++) {
            if (a > 0 && ((slot + a) & 1) == 0) hash = next_hash(hash);
            const vu bits = ((vu)get(x[a] + i, k) + draw(row, hash, slot + a)) & 0xffff0000u;
            put(x[a] + i, (vf)bits, k);
            put_bfloat16(out[a] + i, bits, k);
        }
    });
}

void round_bfloat16(float* const* x, int count, int64_t n, const RandomRow& row, int slot, uint16_t* const* out) {
    if (count == 2) return round_rows<2>(x, n, row, slot, out);
    round_rows<1>(x, n, row, slot, out);
}

float largest_of(const float* x, int64_t n) {
    vf most = splat(0.0f);
    for_each_vector(n, [&](int64_t i, int k) HF_LOPT_LAMBDA { most = max(magnitude(get(x + i, k)), most); });
    float found = 0.0f;
    for (int i = 0; i < kWidth; i++) found = most[i] > found ? most[i] : found;
    return found < kLeastSize ? 0.0f : found;
}

// One accumulator of one vector; returns what its codes stand for.
template <bool kSigned>
HF_LOPT_INLINE vf encode(vf value, int k, vf scale, vf inverse, vu drawn, void* codes) {
    constexpr float kUnit = 1.0f / 65536.0f;  // of the random numbers
    const vf size = magnitude(value);
    const vf y = (kSigned ? size : root(size)) * inverse;
    vf code = __builtin_convertvector(__builtin_convertvector(rough_root(y), vi), vf);
    const vf below = code * code, u = __builtin_convertvector((vi)drawn, vf) + 0.5f;
    const vf width = code * (2.0f * kUnit) + kUnit;
    if (kSigned) {
        code = one_more(code, u * width, y - below);
        const vu sign = (vu)value & 0x80000000u;
        put_codes(codes, __builtin_convertvector((vf)((vu)code | sign), vi), k);
        return (vf)((vu)(code * code * scale) | sign);
    }
    code = one_more(code, u * (width * (below * 2.0f + (code * 2.0f + 1.0f))), (y - below) * (y + below));
    code = one_more(min(splat((float)kSecondCodes), code), code, min(y, splat(1.0f)));  // never 0 for what is not
    put_codes(codes, __builtin_convertvector(code, vi), k);
    const vf stored = code * code * scale;
    return stored * stored;
}

// All accumulators of a block, the last of which is a second moment; `add` gets the vectors as they are stored.
template <int kCount, class Add>
HF_LOPT_INLINE void encode_block(float* const* x, int64_t start, int64_t n, const RandomRow& row, int8_t* const* codes,
                                 float* const* scales, Add add) {
    float scale[kCount], inverse[kCount];
    for (int a = 0; a < kCount; a++) {
        const bool is_signed = a < kCount - 1;
        const float largest = largest_of(x[a] + start, n);
        scale[a] = is_signed ? largest / (float)(kMomentumCodes * kMomentumCodes)
                             : __builtin_sqrtf(largest) / (float)(kSecondCodes * kSecondCodes);
        inverse[a] = scale[a] > 0.0f ? 1.0f / scale[a] : 0.0f;
        scales[a][start / kCodeBlock] = scale[a];
    }
    for_each_vector(n, [&](int64_t i, int k) HF_LOPT_LAMBDA {
        const int64_t at = start + i;
        vu hash = first_hash(row, at);
        vf stored[kCount];
#pragma GCC unroll 4
        for (int a = 0; a < kCount; a++) {
            if (a > 0 && (a & 1) == 0) hash = next_hash(hash);
            const vu drawn = draw(row, hash, a);
            const vf value = get(x[a] + at, k);
            if (a < kCount - 1) {
                stored[a] = encode<true>(value, k, splat(scale[a]), splat(inverse[a]), drawn, codes[a] + at);
            } else {
                stored[a] = encode<false>(value, k, splat(scale[a]), splat(inverse[a]), drawn, codes[a] + at);
            }
        }
        add(stored, at, k);
    });
}

void store_codes(const RowData* rows, int count, double* stats_out) {
    Stats<vf> stats;
    for (int r = 0; r < count; r++) {
        const RowData& row = rows[r];
        float* const x[kPlanes] = {row.m[0], row.m[1], row.m[2], row.v};
        int8_t* codes[kPlanes];
        for (int a = 0; a < kPlanes; a++) codes[a] = static_cast<int8_t*>(row.stored[a]);
        for (int64_t start = 0; start < row.n; start += kCodeBlock) {
            const int64_t length = row.n - start < kCodeBlock ? row.n - start : kCodeBlock;
            encode_block<kPlanes>(x, start, length, row.random, codes, row.scales,
                                  [&](const vf* stored, int64_t, int k) HF_LOPT_LAMBDA {
                                      vf kept[kPlanes];
                                      for (int a = 0; a < kPlanes; a++) kept[a] = only(stored[a], k);
                                      stats.add_state(kept[kMomenta], kept);
                                  });
        }
    }
    stats.flush(stats_out);
}

void encode_codes(float* const* x, int64_t n, const RandomRow& row, int8_t* const* codes, float* const* scales) {
    for (int64_t start = 0; start < n; start += kCodeBlock) {
        const int64_t length = n - start < kCodeBlock ? n - start : kCodeBlock;
        encode_block<2>(x, start, length, row, codes, scales, [](const vf*, int64_t, int) HF_LOPT_LAMBDA {});
    }
}

void decode_codes(const int8_t* codes, const float* scales, bool is_signed, int64_t n, float* out) {
    const uint8_t* unsigned_codes = reinterpret_cast<const uint8_t*>(codes);
    for (int64_t start = 0; start < n; start += kCodeBlock) {
        const int64_t length = n - start < kCodeBlock ? n - start : kCodeBlock;
        const vf scale = splat(scales[start / kCodeBlock]);
        for_each_vector(length, [&](int64_t i, int k) HF_LOPT_LAMBDA {
            const int64_t at = start + i;
            const vf c = is_signed ? codes_at(codes + at, k) : codes_at(unsigned_codes + at, k);
            const vf x = momentum_of(c) * scale;
            put(out + at, is_signed ? x : x * x, k);
        });
    }
}

}  // namespace
}  // namespace hf_lopt
