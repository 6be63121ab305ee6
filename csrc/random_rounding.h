// The random numbers and the codes of hf_lopt/kernels/reference/formats.py, which says what they are for.
#pragma once

#include <stdint.h>

namespace hf_lopt {

constexpr int kCodeBlock = 256, kMomentumCodes = 127, kSecondCodes = 255;
constexpr int kParameterSlot = 10;
constexpr float kLeastSize = 0x1p-110f;

// Of one row of a tensor.
struct RandomRow {
    uint32_t start;  // of the tensor and the row, and the first column in the whole tensor
    uint32_t turn;   // what the number of the step adds to both halves of a hash
};

static inline uint32_t mix_bits(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

}  // namespace hf_lopt
