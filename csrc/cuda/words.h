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
struct alignas(16) Word4 {
    uint32_t x[4];
};

}  // namespace hf_lopt
