// The random numbers and the codes of hf_lopt/kernels/reference/formats.py, which says what they are for.
#pragma once

#include "features.h"

namespace hf_lopt {

constexpr int kCodeBlock = 256, kMomentumCodes = 127, kSecondCodes = 255;
constexpr int kParameterSlot = 10;
constexpr float kLeastSize = 0x1p-110f;

// Of one row of a tensor.
struct RandomRow {
    uint32_t start;  // of the tensor and the row, and the first column in the whole tensor
    uint32_t turn;   // what the number of the step adds to both halves of a hash
};

HF_LOPT_FN uint32_t mix_bits(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

// Of a row of the whole tensor: the first half of `RandomRow::start`.
HF_LOPT_FN uint32_t row_hash(uint32_t key, uint32_t row) { return mix_bits(key ^ mix_bits(row)); }

HF_LOPT_FN uint32_t turn_of(int64_t step) { return (uint32_t)step * 0x9e37u % 0x10000u * 0x10001u; }

// A number, or a vector of numbers, for two places of an element.
template <class V>
HF_LOPT_FN V next_hash(V x) {
    x = x * 0xc2b2ae35u;
    return x ^ (x >> 15);
}

// The first one of the element in a column, to which the start of its row was added.
template <class V>
HF_LOPT_FN V hash_of_column(V x) {
    x = x * 0x85ebca6bu;
    return next_hash(x ^ (x >> 16));
}

// The random number, 16 bits, in a place of an element; `hash` is the one for this place.
template <class V>
HF_LOPT_FN V random_bits(V hash, uint32_t turn, int slot) {
    const V turned = hash + turn;
    return slot & 1 ? turned >> 16 : turned & 0xffffu;
}

}  // namespace hf_lopt
