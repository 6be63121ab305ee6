// What a thread reads and writes at once.
#pragma once

#include <stdint.h>

namespace hf_lopt {

struct alignas(16) Float4 {
    float x[4];
};
struct alignas(8) Short4 {
    uint16_t x[4];
};
struct alignas(8) Word2 {
    uint32_t x[2];
};
struct alignas(16) Word4 {
    uint32_t x[4];
};

// A number as it lies in memory.
struct BFloat16 {
    uint16_t bits;
};

}  // namespace hf_lopt
