// What the kernels use of the device: thread numbers, barriers, shuffles, tickets, 16-bit numbers, matrix units.
//
// The same kernels are compiled for the host, where emulator.h runs a block of threads; so they use these names only.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "words.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "runtime.h"

#define HF_LOPT_DEVICE static __device__ __forceinline__
#define HF_LOPT_MEMBER __device__ __forceinline__
// A function whose registers shall not count where it is not called.
#define HF_LOPT_OUT_OF_LINE static __device__ __noinline__
#define HF_LOPT_SHARED __shared__
// A kernel for blocks of `threads`, of which `blocks` fit on a multiprocessor at once.
#define HF_LOPT_KERNEL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define HF_LOPT_ARGUMENT const __grid_constant__
// Shared memory beyond the 48 KiB that every launch has: HF_LOPT_LAUNCH_LARGE says how much.
#define HF_LOPT_LARGE_SHARED(type, name)      \
    extern __shared__ uint4 hf_lopt_shared[]; \
    type& name = *reinterpret_cast<type*>(hf_lopt_shared)
#define HF_LOPT_LAUNCH(kernel, grid, threads, stream, args)                            \
    kernel<<<(unsigned)(grid), threads, 0, static_cast<cudaStream_t>(stream)>>>(args); \
    ::hf_lopt::check_launch()
#define HF_LOPT_LAUNCH_LARGE(kernel, grid, threads, bytes, stream, args)                   \
    ::hf_lopt::allow_shared(reinterpret_cast<const void*>(kernel), bytes);                 \
    kernel<<<(unsigned)(grid), threads, bytes, static_cast<cudaStream_t>(stream)>>>(args); \
    ::hf_lopt::check_launch()

namespace hf_lopt {

HF_LOPT_DEVICE int thread() { return (int)threadIdx.x; }
HF_LOPT_DEVICE int block() { return (int)blockIdx.x; }
HF_LOPT_DEVICE void barrier() { __syncthreads(); }
HF_LOPT_DEVICE void warp_barrier() { __syncwarp(); }
template <class T>
HF_LOPT_DEVICE T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}
// What has been read from memory is read again afterwards, rather than kept in registers.
HF_LOPT_DEVICE void forget_loads() { asm volatile("" ::: "memory"); }
HF_LOPT_DEVICE void fence() { __threadfence(); }
HF_LOPT_DEVICE unsigned take_ticket(unsigned* ticket) { return atomicAdd(ticket, 1u); }
// Waits until so many have been taken; what those who took them wrote before is visible then.
HF_LOPT_DEVICE void wait_for_tickets(const unsigned* ticket, unsigned count) {
    while (*static_cast<const volatile unsigned*>(ticket) < count) __nanosleep(100);
    __threadfence();
}
// Reads what other blocks of the same launch have written: past the first-level cache.
template <class T>
HF_LOPT_DEVICE T load_shared_result(const T* x) {
    return __ldcg(x);
}
HF_LOPT_DEVICE float inverse_root(float x) { return rsqrtf(x); }
// The root of x >= 0 to a few units in the last place; 0 of a subnormal number.
HF_LOPT_DEVICE float rough_root(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x, rounded
HF_LOPT_DEVICE float reciprocal(float x) { return __frcp_rn(x); }
// The larger and the smaller of both; NaN stays NaN. An instruction each, where a comparison and a choice are two.
HF_LOPT_DEVICE float maximum(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
HF_LOPT_DEVICE float minimum(float x, float y) {
    float z;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// One store of 16 or 8 bytes: as a struct they are taken apart.
HF_LOPT_DEVICE void store_wide(float* to, const Float4& y) {
    asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)), "f"(y.x[0]), "f"(y.x[1]),
                 "f"(y.x[2]), "f"(y.x[3])
                 : "memory");
}
HF_LOPT_DEVICE void store_wide(uint16_t* to, const Short4& y) {
    asm volatile("st.global.v4.u16 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)), "h"(y.x[0]), "h"(y.x[1]),
                 "h"(y.x[2]), "h"(y.x[3])
                 : "memory");
}
HF_LOPT_DEVICE void store_wide(void* to, const Word2& y) {
    asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(__cvta_generic_to_global(to)), "r"(y.x[0]), "r"(y.x[1])
                 : "memory");
}

// Begins to copy 16, 8 or 4 bytes from the memory of the device into shared memory, while the thread goes on. Copies
// come in groups, which `end_group` ends. The thread may read them after `wait_for_groups`, others of its warp after a
// barrier.
template <int bytes>
HF_LOPT_DEVICE void begin_copy(void* to, const void* from) {
    const unsigned shared = (unsigned)__cvta_generic_to_shared(to);
    const size_t global = __cvta_generic_to_global(from);
    if constexpr (bytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
    } else if constexpr (bytes == 8) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
    }
}
HF_LOPT_DEVICE void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all groups of the thread are there but the last `n`.
template <int n>
HF_LOPT_DEVICE void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

HF_LOPT_DEVICE float from_half(uint16_t x) { return __half2float(__ushort_as_half(x)); }
HF_LOPT_DEVICE uint16_t to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
HF_LOPT_DEVICE float from_bfloat16(uint16_t x) { return __uint_as_float((unsigned)x << 16); }
HF_LOPT_DEVICE uint16_t to_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
// Two numbers as bfloat16 in one register, `low` in the lower half.
HF_LOPT_DEVICE uint32_t pack_bfloat16(float low, float high) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
}
HF_LOPT_DEVICE float lower_number(uint32_t pair) { return __uint_as_float(pair << 16); }
HF_LOPT_DEVICE float upper_number(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// d += a b for a (16, 16), b (16, 8) of bfloat16 and d (16, 8) of float32, spread over a warp as PTX defines for
// mma.m16n8k16.
HF_LOPT_DEVICE void matrix_multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The nearest TF32 number, of 11 bits, in the bits of a float32.
HF_LOPT_DEVICE uint32_t to_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

HF_LOPT_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }

// d += a b for a (16, 8), b (8, 8) and d (16, 8) of float32, likewise for mma.m16n8k8, which cuts a and b off to TF32.
HF_LOPT_DEVICE void matrix_multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace hf_lopt

#else
#include "host/emulator.h"
#endif
