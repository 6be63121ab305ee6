// What passes 1 and 2 share: the accumulators of a row after their update, and the features formed from them.
#pragma once

#include "tiles.cuh"

namespace hf_lopt {

// The kinds of tensors: matrices; tensors whose factored axes are not the last ones, so that the accumulator with a
// number per line has `inner` of them; tensors of rank < 2, whose accumulator is of their own shape; and matrices
// whose numbers are not neighbours, with accumulators that may vary along a row and along a column.
enum Kind { kMatrix, kInner, kFlat, kStrided };

// What features.h takes from the device.
struct Arithmetic {
    HF_LOPT_DEVICE float inverse_root(float x) { return hf_lopt::inverse_root(x); }
    HF_LOPT_DEVICE float sqrt(float x) { return sqrtf(x); }
    HF_LOPT_DEVICE float clamp(float x, float bound) { return hf_lopt::clamp(x, bound); }
    HF_LOPT_DEVICE float at_least(float x, float bound) { return maximum(x, bound); }
};

// The numbers of a thread in one row after their update.
struct Updated : Elements<Lane> {
    bool large;  // some gradient may be beyond kSmallClip
};

// Those of one element.
HF_LOPT_DEVICE Elements<float> element(const Updated& u, int e) {
    Elements<float> a;
    a.g = u.g.x[e];
    a.p = u.p.x[e];
    HF_LOPT_UNROLL
    for (int k = 0; k < kMomenta; k++) a.m[k] = u.m[k].x[e];
    a.v = u.v.x[e];
    return a;
}

// From what was loaded.
HF_LOPT_DEVICE void finish_update(Updated& u, const FeatureConstants& c) {
    u.g = map(u.g, [&](float x) { return clamp(x, c.clip); });
#pragma unroll
    for (int k = 0; k < kMomenta; k++) u.m[k] = ema(u.m[k], u.g, c.keep_m[k], c.add_m[k]);
    u.v = ema(u.v, u.g * u.g, c.keep_v, c.add_v);
    u.large = false;
    HF_LOPT_EACH(e) u.large |= !(fabsf(u.g.x[e]) <= kSmallClip);
}

template <bool strided = false>
HF_LOPT_DEVICE Updated update(const TensorTable& table, const FeatureConstants& c, const Place& at,
                              const RowPlace& row) {
    const TensorEntry& t = *at.entry;
    Updated u;
    u.g = load<strided>(pointer<void>(table, t, sG), t.g_type, at, row);
    u.p = load<strided>(pointer<void>(table, t, sP), t.p_type, at, row);
    const float *m = pointer<float>(table, t, sM), *v = pointer<float>(table, t, sV);
#pragma unroll
    for (int k = 0; k < kMomenta; k++) u.m[k] = load<strided>(m + k * t.decay, kFloat32, at, row);
    u.v = load<strided>(v, kFloat32, at, row);
    finish_update(u, c);
    return u;
}

// The numbers of a vector accumulator in the thread's columns.
HF_LOPT_DEVICE Lane load_vector(const float* x, const Place& at) {
    Lane y;
    HF_LOPT_EACH(e) y.x[e] = at.column(e) < at.width ? x[at.vector() + at.column(e)] : 0.0f;
    return y;
}

// The numbers of a line accumulator in the thread's columns of a row.
template <Kind kind>
HF_LOPT_DEVICE Lane load_line(const float* x, const Place& at, const RowPlace& row) {
    [[maybe_unused]] const int64_t inner = at.entry->inner;
    if constexpr (kind == kMatrix) {
        return splat(row.limit > 0 ? x[row.line] : 0.0f);
    } else {
        Lane y;
        HF_LOPT_EACH(e) y.x[e] = at.live(row, e) ? x[row.line * inner + (at.start() + at.column(e)) % inner] : 0.0f;
        return y;
    }
}

// The numbers of an accumulator of a strided slice in the thread's columns of a row.
HF_LOPT_DEVICE Lane load_strided(const float* x, const int64_t (&step)[2], const Place& at, const RowPlace& row) {
    Lane y;
    HF_LOPT_EACH(e) y.x[e] = at.live(row, e) ? x[strided_place(step, at, row, e)] : 0.0f;
    return y;
}

// row factor x column factor, for each decay
template <Kind kind>
HF_LOPT_DEVICE void load_factors(const TensorTable& table, const Place& at, const RowPlace& row,
                                 const Lane (&along)[kFactored], Lane (&factor)[kFactored]) {
    const TensorEntry& t = *at.entry;
    const float* line = pointer<float>(table, t, sLineFactor);
#pragma unroll
    for (int k = 0; k < kFactored; k++) {
        if constexpr (kind == kStrided) {
            const float* vector = pointer<float>(table, t, sVectorFactor);
            factor[k] = load_strided(line + k * t.line_decay, t.line_step, at, row) *
                        load_strided(vector + k * t.vector_decay, t.vector_step, at, row);
        } else {
            factor[k] = load_line<kind>(line + k * t.line_decay, at, row) * along[k];
        }
    }
}

HF_LOPT_DEVICE void load_vector_factors(const TensorTable& table, const Place& at, Lane (&along)[kFactored]) {
    const TensorEntry& t = *at.entry;
    const float* x = pointer<float>(table, t, sVectorFactor);
#pragma unroll
    for (int k = 0; k < kFactored; k++) along[k] = load_vector(x + k * t.vector_decay, at);
}

// All features of element e of a tensor of rank < 2. `d`: its diagonal accumulators, old before and new after.
HF_LOPT_DEVICE void flat_features(const Updated& u, const FeatureConstants& c, int e, float (&x)[kInputs],
                                  Lane (&d)[kFactored]) {
    float old[kFactored], diagonal[kFactored];
    HF_LOPT_UNROLL
    for (int k = 0; k < kFactored; k++) old[k] = d[k].x[e];
    flat_features<Arithmetic>(element(u, e), c, old, x, diagonal);
    HF_LOPT_UNROLL
    for (int k = 0; k < kFactored; k++) d[k].x[e] = diagonal[k];
}

HF_LOPT_DEVICE void load_diagonals(const TensorTable& table, const Place& at, const RowPlace& row,
                                   Lane (&d)[kFactored]) {
    const float* x = pointer<float>(table, *at.entry, sD);
#pragma unroll
    for (int k = 0; k < kFactored; k++) d[k] = load(x + k * at.entry->decay, kFloat32, at, row);
}

}  // namespace hf_lopt
