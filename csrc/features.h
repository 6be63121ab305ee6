// The features of an element: which there are, in which columns, and the formulas of those that are formed as such.
//
// The formulas are templates over the number type V: float, or a vector of floats with the arithmetic operators. What
// an instruction set does in a way of its own is passed in as a class `Arithmetic` with static functions:
//
//     V inverse_root(V x)           1 / sqrt(x), possibly an estimate that was refined
//     V sqrt(V x)                   the rounded square root
//     V clamp(V x, float bound)     x within [-bound, bound]
//     V at_least(V x, float bound)  the larger of both; NaN stays NaN
//
// These are the generic paths: matrices with a factor for each element (`matrix_features`) and tensors of rank < 2,
// whose accumulators have a number for each element (`flat_features`). Sums of squares and the first layer of small
// networks have faster paths that never form the products (csrc/cpu/rows.h, csrc/cpu/network_rows.h,
// csrc/cuda/feature_sums.cu, csrc/cuda/apply.cuh); tests/test_kernel_features.py compares them with these.
//
// The functions have internal linkage, because the same source is compiled for several instruction sets and the linker
// must not merge the results. For the same reason no header of the standard library is included.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define HF_LOPT_FN static __host__ __device__ __forceinline__
#define HF_LOPT_UNROLL _Pragma("unroll")
#else
#define HF_LOPT_FN static inline __attribute__((always_inline))
#define HF_LOPT_UNROLL
#endif

namespace hf_lopt {

constexpr float kFactoredEps = 1e-30f;  // added to g² before it enters a factored accumulator
constexpr float kFactorEps = 1e-9f;  // under the inverse root of fac_g for a tensor of rank < 2, and its lower bound
constexpr float kVectorEps = 1e-8f;  // under the inverse root of rsqrt_row and rsqrt_col
constexpr float kSmallClip = 0.1f;   // bound of clip_g

// Numbers of momentum, second-moment and factored decays that the kernels are written for.
constexpr int kMomenta = 3, kSecondMoments = 1, kFactored = 3;

// ---- which features there are -------------------------------------------------------------------------------------

// Places of the element features, one for each column.
enum ElementFeature {
    kG,
    kClipG,
    kP,
    kM,
    kV = kM + kMomenta,
    kMRsqrtV,
    kRsqrtV = kMRsqrtV + kMomenta,
    kFacG,
    kGRsqrtV = kFacG + kFactored,
    kFacM,
    kD = kFacM + kMomenta,  // diagonal accumulators and their inverse roots: tensors of rank < 2 only
    kRsqrtD = kD + kFactored,
    kInputs = kRsqrtD + kFactored
};

// Features that are constant along a row or a column of a matrix, kFactored columns each.
enum VectorFeature { kRow, kCol, kRsqrtRow, kRsqrtCol, kVectorFeatures };

// Sums of squares that pass 1 forms: of the element features, then of the vector features.
constexpr int kVectorSums = kVectorFeatures * kFactored, kSums = kInputs + kVectorSums;

enum FeatureKind { kOfElement, kOfVector };

// The features of one name: `width` columns, the first of which is an ElementFeature or all of a VectorFeature.
struct FeatureGroup {
    const char* name;
    FeatureKind kind;
    int first, width;
};

constexpr FeatureGroup kFeatureGroups[] = {
    {"g", kOfElement, kG, 1},
    {"clip_g", kOfElement, kClipG, 1},
    {"p", kOfElement, kP, 1},
    {"m", kOfElement, kM, kMomenta},
    {"v", kOfElement, kV, kSecondMoments},
    {"m_rsqrt_v", kOfElement, kMRsqrtV, kMomenta},
    {"rsqrt_v", kOfElement, kRsqrtV, kSecondMoments},
    {"fac_g", kOfElement, kFacG, kFactored},
    {"g_rsqrt_v", kOfElement, kGRsqrtV, kSecondMoments},
    {"fac_m", kOfElement, kFacM, kMomenta},
    {"row", kOfVector, kRow, kFactored},
    {"col", kOfVector, kCol, kFactored},
    {"rsqrt_row", kOfVector, kRsqrtRow, kFactored},
    {"rsqrt_col", kOfVector, kRsqrtCol, kFactored},
};

// The column of every feature in the order of a rule, -1 for a feature that the rule does not have.
struct FeatureColumns {
    int32_t element[kInputs];
    int32_t vector[kVectorFeatures][kFactored];
    int32_t count;
};

// Decays with their complements, 1 - keep in float32, and the constants of a rule's features.
struct FeatureConstants {
    float keep_m[kMomenta], add_m[kMomenta];
    float keep_v, add_v;
    float keep_d[kFactored], add_d[kFactored];
    float clip, second_eps, diagonal_eps;
    float unclipped;  // no clip changes a gradient below this
};

// ---- formulas -----------------------------------------------------------------------------------------------------

// An exponential moving average.
template <class V>
HF_LOPT_FN V ema(V old, V value, float keep, float add) {
    return old * keep + value * add;
}

// exp(x) for |x| < kExpSmall: the series to the fourth order, relative error below 1e-8.
constexpr float kExpSmall = 1.0f / 16.0f;
template <class V>
HF_LOPT_FN V exp_small(V x) {
    V y = x * (1.0f / 24.0f) + (1.0f / 6.0f);
    y = y * x + 0.5f;
    y = y * x + 1.0f;
    return y * x + 1.0f;
}

// The gradient after its clip, the parameter, and the accumulators after their update.
template <class V>
struct Elements {
    V g, p, m[kMomenta], v;
};

// rsqrt_row and rsqrt_col, from a row or a column accumulator.
template <class Arithmetic, class V>
HF_LOPT_FN V inverse_root_of_vector(V accumulator) {
    return Arithmetic::inverse_root(accumulator + kVectorEps);
}

// The features that need no factored accumulator.
template <class Arithmetic, class V>
HF_LOPT_FN void unfactored_features(const Elements<V>& a, float second_eps, V* x) {
    V q = Arithmetic::inverse_root(a.v + second_eps);
    x[kG] = a.g;
    x[kClipG] = Arithmetic::clamp(a.g, kSmallClip);
    x[kP] = a.p;
    x[kV] = a.v;
    x[kRsqrtV] = q;
    x[kGRsqrtV] = a.g * q;
    HF_LOPT_UNROLL
    for (int k = 0; k < kMomenta; k++) {
        x[kM + k] = a.m[k];
        x[kMRsqrtV + k] = a.m[k] * q;
    }
}

// All element features of a matrix but kD and kRsqrtD; `factor`: the row factor times the column factor.
template <class Arithmetic, class V>
HF_LOPT_FN void matrix_features(const Elements<V>& a, float second_eps, const V (&factor)[kFactored], V* x) {
    unfactored_features<Arithmetic>(a, second_eps, x);
    HF_LOPT_UNROLL
    for (int k = 0; k < kFactored; k++) {
        x[kFacG + k] = a.g * factor[k];
        x[kFacM + k] = a.m[k] * factor[k];
    }
}

// All features of a tensor of rank < 2, and its new diagonal accumulators; `old`: what they were. Without an epsilon
// in fac_m the accumulator may be as small as 1e-33: roots and divisions, no estimates.
template <class Arithmetic, class V>
HF_LOPT_FN void flat_features(const Elements<V>& a, const FeatureConstants& c, const V (&old)[kFactored], V* x,
                              V (&diagonal)[kFactored]) {
    unfactored_features<Arithmetic>(a, c.second_eps, x);
    HF_LOPT_UNROLL
    for (int k = 0; k < kFactored; k++) {
        V y = ema(old[k], a.g * a.g + kFactoredEps, c.keep_d[k], c.add_d[k]);
        diagonal[k] = y;
        x[kD + k] = y;
        x[kRsqrtD + k] = 1.0f / Arithmetic::sqrt(y + kVectorEps);
        x[kFacG + k] = a.g / Arithmetic::sqrt(Arithmetic::at_least(y + kFactorEps, kFactorEps));
        x[kFacM + k] = a.m[k] / Arithmetic::sqrt(y + c.diagonal_eps);
    }
}

}  // namespace hf_lopt
