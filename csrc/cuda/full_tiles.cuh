// Full tiles: all kStrip columns are there, every row begins at a multiple of 16 bytes, and a thread's four numbers of
// a row are one load. Nearly all of a large matrix lies in such tiles. The passes have loops of their own for them,
// for numbers of types that are known when they are compiled: what the other loops ask for every row (how wide, which
// type, how many are there) is settled here before the first one. tests/test_cuda_build.py counts their instructions.
#pragma once

#include "updated.cuh"

namespace hf_lopt {

// Where a thread begins in a full tile, and how far its next row is, in numbers.
struct FullTile {
    int turns, column;              // of the strip
    int64_t line, line_step;        // in an accumulator with a number per line
    int64_t element, element_step;  // in the tensor
};

HF_LOPT_DEVICE FullTile full_tile(const Place& at) {
    const TensorEntry& t = *at.entry;
    FullTile f;
    f.turns = at.turns();
    f.column = at.first_column;
    f.line = at.line(at.first_row() + at.warp());
    f.line_step = kWarps * t.mid;
    f.element = f.line * t.columns + at.start() + f.column;
    f.element_step = f.line_step * t.columns;
    return f;
}

HF_LOPT_DEVICE bool is_full(const Place& at) {
    const TensorEntry& t = *at.entry;
    return t.wide && t.factored && t.inner == 1 && at.width == kStrip;
}

// Calls f(P, G) with a parameter and a gradient of the types of the tile, if it is a full one of types that there are
// loops for.
template <class F>
HF_LOPT_DEVICE bool with_types_of_full_tile(const Place& at, F f) {
    const TensorEntry& t = *at.entry;
    if (!is_full(at) || t.p_type != t.g_type) return false;
    if (t.p_type == kFloat32) {
        f(float{}, float{});
    } else if (t.p_type == kBFloat16) {
        f(BFloat16{}, BFloat16{});
    } else {
        return false;
    }
    return true;
}

HF_LOPT_DEVICE Lane load_four(const float* x) {
    Lane y;
    const Float4 z = *reinterpret_cast<const Float4*>(x);
    HF_LOPT_EACH(e) y.x[e] = z.x[e];
    return y;
}

HF_LOPT_DEVICE Lane load_four(const BFloat16* x) {
    const Word2 z = *reinterpret_cast<const Word2*>(x);
    return {{lower_number(z.x[0]), upper_number(z.x[0]), lower_number(z.x[1]), upper_number(z.x[1])}};
}

// `y` becomes what was stored, rounded.
HF_LOPT_DEVICE void store_four(float* x, const Lane& y) {
    Float4 z;
    HF_LOPT_EACH(e) z.x[e] = y.x[e];
    store_wide(x, z);
}

HF_LOPT_DEVICE void store_four(BFloat16* x, Lane& y) {
    const Word2 z = {{pack_bfloat16(y.x[0], y.x[1]), pack_bfloat16(y.x[2], y.x[3])}};
    y = {{lower_number(z.x[0]), upper_number(z.x[0]), lower_number(z.x[1]), upper_number(z.x[1])}};
    store_wide(x, z);
}

// The elements of a thread from row to row of a full tile.
template <class P, class G>
struct FullRows {
    P* p;
    const G* g;
    float *m[kMomenta], *v;
    int64_t element, step;

    HF_LOPT_MEMBER FullRows(const TensorTable& table, const TensorEntry& t, const FullTile& f) {
        p = pointer<P>(table, t, sP);
        g = pointer<G>(table, t, sG);
        v = pointer<float>(table, t, sV);
#pragma unroll
        for (int k = 0; k < kMomenta; k++) m[k] = pointer<float>(table, t, sM) + k * t.decay;
        element = f.element;
        step = f.element_step;
    }

    // All loads are under way before the first number is used.
    HF_LOPT_MEMBER Updated load(const FeatureConstants& c) const {
        Updated u;
        u.g = load_four(g + element);
        u.p = load_four(p + element);
#pragma unroll
        for (int k = 0; k < kMomenta; k++) u.m[k] = load_four(m[k] + element);
        u.v = load_four(v + element);
        start_loads();
        finish_update(u, c);
        return u;
    }
};

}  // namespace hf_lopt
