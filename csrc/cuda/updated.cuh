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

// How a thread reads and writes its numbers of accumulators, and writes those of parameters. Here all accumulators are
// float32, and nothing is rounded at random; stored.cuh has the other way.
struct InFloat32 {
    static constexpr Kind kOtherRows = kMatrix;  // what rows of a matrix that are not full are read as
    static constexpr int kRowsAhead = 2;         // under way in full tiles for networks of 32 units

    struct ForTile {};  // what a full tile keeps in shared memory
    struct Draws {};    // the random numbers of a thread in a row

    template <class Args>
    HF_LOPT_MEMBER InFloat32(const Args&, const Place&) {}

    // Of the decay `k` of momenta or second moments.
    template <bool strided>
    HF_LOPT_MEMBER Lane load(const TensorTable& table, const Place& at, const RowPlace& row, Slot slot, int k) const {
        const TensorEntry& t = *at.entry;
        return hf_lopt::load<strided>(pointer<float>(table, t, slot) + k * t.decay, kFloat32, at, row);
    }
    template <bool strided>
    HF_LOPT_MEMBER Draws draws(const Place&, const RowPlace&) const {
        return {};
    }
    // With the random numbers of a place of each element; `y` becomes what was stored.
    template <bool strided>
    HF_LOPT_MEMBER void store(const TensorTable& table, const Place& at, const RowPlace& row, Slot slot, int k,
                              const Draws&, int, Lane& y) const {
        const TensorEntry& t = *at.entry;
        hf_lopt::store<strided>(pointer<float>(table, t, slot) + k * t.decay, kFloat32, at, row, y);
    }
    template <bool strided>
    HF_LOPT_MEMBER void store_parameter(const TensorTable& table, const Place& at, const RowPlace& row,
                                        Lane& y) const {
        const TensorEntry& t = *at.entry;
        hf_lopt::store<strided>(pointer<void>(table, t, sP), t.p_type, at, row, y);
    }
    // Those of all decays; calls add(k) when momentum k is stored, and add(kMomenta) for the second moment.
    template <bool strided, class F>
    HF_LOPT_MEMBER void store_all(const TensorTable& table, const Place& at, const RowPlace& row, Updated& u,
                                  F add) const {
        const TensorEntry& t = *at.entry;
        float *m = pointer<float>(table, t, sM), *v = pointer<float>(table, t, sV);
#pragma unroll
        for (int k = 0; k < kMomenta; k++) {
            hf_lopt::store<strided>(m + k * t.decay, kFloat32, at, row, u.m[k]);
            add(k);
        }
        hf_lopt::store<strided>(v, kFloat32, at, row, u.v);
        add(kMomenta);
    }
    // Reads all of them by number: the second moments, then the momenta.
    struct Reader {
        const float *v, *m;

        template <class Args>
        HF_LOPT_MEMBER Reader(const Args& a, const Place& at)
            : v(pointer<float>(a.table, *at.entry, sV)), m(pointer<float>(a.table, *at.entry, sM)) {}
        HF_LOPT_MEMBER Lane load(const Place& at, const RowPlace& row, int j, int second_moments) const {
            const TensorEntry& t = *at.entry;
            const float* x = j < second_moments ? v + j * t.numel : m + (j - second_moments) * t.numel;
            return hf_lopt::load(x, kFloat32, at, row);
        }
    };
    // Whether the lines of the entry are what the formats are cut along.
    HF_LOPT_MEMBER bool along_lines() const { return true; }
};

// The one for the arguments of a kernel.
template <class Args>
struct FormatsFor {
    using Type = InFloat32;
};
template <class Args>
using FormatsOf = typename FormatsFor<Args>::Type;

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
HF_LOPT_DEVICE Updated update(InFloat32, const TensorTable& table, const FeatureConstants& c, const Place& at,
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
