// The scalar formulas of the features, written once for host and device.
//
// Every function is a template over the number type: float, or a vector of floats with the arithmetic operators. The
// functions have internal linkage, because the same source is compiled for several instruction sets and the linker
// must not merge the results.
#pragma once

#ifdef __CUDACC__
#define HF_LOPT_FN static __host__ __device__ __forceinline__
#else
#define HF_LOPT_FN static inline __attribute__((always_inline))
#endif

namespace hf_lopt {

constexpr float kFactoredEps = 1e-30f;  // added to g² before it enters a factored accumulator
constexpr float kFactorEps = 1e-9f;  // under the inverse root of fac_g for a tensor of rank < 2, and its lower bound
constexpr float kVectorEps = 1e-8f;  // under the inverse root of rsqrt_row and rsqrt_col
constexpr float kSmallClip = 0.1f;   // bound of clip_g

// Numbers of momentum, second-moment and factored decays that the kernels are written for.
constexpr int kMomenta = 3, kFactored = 3;

// An exponential moving average; `add` is 1 - keep, rounded as float32 arithmetic rounds it.
template <class V>
HF_LOPT_FN V ema(V old, V value, float keep, float add) {
    return old * keep + value * add;
}

// exp(x) for |x| < 1/16: the series to the fourth order, relative error below 1e-8.
template <class V>
HF_LOPT_FN V exp_small(V x) {
    V y = x * (1.0f / 24.0f) + (1.0f / 6.0f);
    y = y * x + 0.5f;
    y = y * x + 1.0f;
    return y * x + 1.0f;
}
constexpr float kExpSmall = 1.0f / 16.0f;

}  // namespace hf_lopt
