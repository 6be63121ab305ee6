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
    int64_t element, element_step;  // in the tensor
};

HF_LOPT_DEVICE FullTile full_tile(const Place& at) {
    const TensorEntry& t = *at.entry;
    FullTile f;
    f.turns = at.turns();
    f.column = at.first_column;
    f.element = at.line_of(at.warp()) * t.columns + at.start() + f.column;
    f.element_step = kWarps * t.mid * t.columns;
    return f;
}

HF_LOPT_DEVICE bool is_full(const Place& at) {
    const TensorEntry& t = *at.entry;
    return t.wide && t.factored && t.inner == 1 && at.width == kStrip;
}

// Likewise of a tensor that is not factored: all numbers of the tile's rows are there.
HF_LOPT_DEVICE bool is_full_flat(const Place& at) {
    const TensorEntry& t = *at.entry;
    const bool to_the_end = t.numel % t.columns == 0 || at.row_tile + 1 < t.row_tiles;
    return t.wide && !t.factored && at.width == kStrip && to_the_end;
}

// Calls f(P, G) with a parameter and a gradient of the types of a `full` tile, if there are loops for these.
template <class Formats, class F>
HF_LOPT_DEVICE bool with_types_of_full_tile(bool full, const Formats& formats, const Place& at, F f) {
    const TensorEntry& t = *at.entry;
    if (!full || t.p_type != t.g_type || !formats.along_lines()) return false;
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

// What is on its way from memory for each thread of a block: four numbers of float32, or of 16 bits in half of the
// place. Numbers of later turns come while a thread works on this one, and take no registers.
using Coming = Word4[kThreads];

// Four numbers of a thread.
template <class T>
HF_LOPT_DEVICE T* coming(Coming& place, int of_thread) {
    return reinterpret_cast<T*>(place) + of_thread * kLane;
}

template <class T>
HF_LOPT_DEVICE void begin_copy_of_four(Coming& to, const T* from) {
    begin_copy<kLane * sizeof(T)>(coming<T>(to, thread()), from);
}

// A row of all that a pass reads.
template <int momenta>
struct ComingRow {
    Coming g, p, m[momenta], v;
};
// `ahead`: how many rows are under way.
template <int ahead, int momenta = kMomenta>
using ComingRows = ComingRow<momenta>[ahead];

// The accumulators in a full tile, as they are read from `ComingRow`s and written. `row`: of the tile.
template <class Formats, int momenta>
struct FullState;

template <int momenta>
struct FullState<InFloat32, momenta> {
    float *m[momenta], *v;

    template <class Args>
    HF_LOPT_MEMBER FullState(const Args&, const Place&, InFloat32::ForTile&) {}

    HF_LOPT_MEMBER void set_pointers(const TensorTable& table, const TensorEntry& t) {
        v = pointer<float>(table, t, sV);
#pragma unroll
        for (int k = 0; k < momenta; k++) m[k] = pointer<float>(table, t, sM) + k * t.decay;
    }
    // What is the same for all columns of a row; a barrier has to follow.
    HF_LOPT_MEMBER void set_rows(const Place&) {}

    HF_LOPT_MEMBER void begin(ComingRow<momenta>& to, int64_t from) const {
#pragma unroll
        for (int k = 0; k < momenta; k++) begin_copy_of_four(to.m[k], m[k] + from);
        begin_copy_of_four(to.v, v + from);
    }
    // What `of_thread` has copied.
    HF_LOPT_MEMBER Lane momentum(ComingRow<momenta>& row, int k, int of_thread, int) const {
        return load_four(coming<float>(row.m[k], of_thread));
    }
    HF_LOPT_MEMBER Lane second_moment(ComingRow<momenta>& row, int of_thread, int) const {
        return load_four(coming<float>(row.v, of_thread));
    }
    // The numbers from `element` of the tensor, `column` of the strip on; `y` becomes what was stored.
    HF_LOPT_MEMBER void store_momentum(int k, int64_t element, int, int, Lane& y) const {
        store_four(m[k] + element, y);
    }
    HF_LOPT_MEMBER void store_second_moment(int64_t element, int, int, Lane& y) const { store_four(v + element, y); }
    // Those of a row, all at once or one after the other; calls add(k) for momentum k and add(kMomenta) when that is
    // done.
    template <class F>
    HF_LOPT_MEMBER void store(int64_t element, int, int, Updated& u, F add) const {
#pragma unroll
        for (int k = 0; k < kMomenta; k++) {
            store_four(m[k] + element, u.m[k]);
            add(k);
        }
        store_four(v + element, u.v);
        add(kMomenta);
    }
    // Those of a step that has one of each.
    HF_LOPT_MEMBER void store_both(int64_t element, int, int, Lane& new_m, Lane& new_v) const {
        store_four(m[0] + element, new_m);
        store_four(v + element, new_v);
    }
    template <class P>
    HF_LOPT_MEMBER void store_parameter(P* p, int, int, Lane& y) const {
        store_four(p, y);
    }
};

// The elements of a thread from row to row of a full tile. `wait` goes to the next row; `proceed` says that it has
// been read, so that another one may take its place.
template <int ahead, class P, class G, class Formats, int momenta = kMomenta>
struct FullRows {
    using Row = ComingRow<momenta>;
    P* p;
    const G* g;
    FullState<Formats, momenta> state;
    int64_t element, step;
    int left, turn = 0;  // rows after this one; rows until now
    Row* rows;

    template <class Args>
    HF_LOPT_MEMBER FullRows(const Args& a, const Place& at, const FullTile& f, ComingRows<ahead, momenta>& shared,
                            typename Formats::ForTile& tile)
        : state(a, at, tile), rows(shared) {
        const TensorEntry& t = *at.entry;
        p = pointer<P>(a.table, t, sP);
        g = pointer<G>(a.table, t, sG);
        state.set_pointers(a.table, t);
        step = f.element_step;
        element = f.element - step;
        left = f.turns;
#pragma unroll
        for (int i = 0; i < ahead; i++) begin(i, rows[i]);
    }

    // The row after `skipped` further ones.
    HF_LOPT_MEMBER void begin(int skipped, Row& to) const {
        if (left > skipped) {
            const int64_t from = element + (skipped + 1) * step;
            begin_copy_of_four(to.g, g + from);
            begin_copy_of_four(to.p, p + from);
            state.begin(to, from);
        }
        end_group();
    }

    HF_LOPT_MEMBER Row& wait() {
        wait_for_groups<ahead - 1>();
        element += step;
        left--;
        return rows[turn++ % ahead];
    }

    HF_LOPT_MEMBER void proceed(Row& row) const { begin(ahead - 1, row); }

    // `of_tile`: the number of the row in the tile.
    HF_LOPT_MEMBER Updated next(const FeatureConstants& c, int of_tile) {
        Updated u;
        Row& row = wait();
        u.g = load_four(coming<G>(row.g, thread()));
        u.p = load_four(coming<P>(row.p, thread()));
#pragma unroll
        for (int k = 0; k < kMomenta; k++) u.m[k] = state.momentum(row, k, thread(), of_tile);
        u.v = state.second_moment(row, thread(), of_tile);
        proceed(row);
        finish_update(u, c);
        return u;
    }
};

constexpr int kTileRows = kTurns * kWarps;  // of a tile whose rows are kStrip columns

// Numbers of the rows of a full tile for each decay; the last place is not used.
struct OfLines {
    alignas(16) float row[kTileRows][kLane];
};

// Calls f(row of the tile, its place in an accumulator with a number per line) in one thread for each row.
template <class F>
HF_LOPT_DEVICE void for_rows(const Place& at, F f) {
    for (int r = thread(); r < at.row_count(); r += kThreads) f(r, at.line_of(r));
}

// Those of an accumulator, or of factors, or their squares; a barrier has to follow.
HF_LOPT_DEVICE void copy_lines(const TensorTable& table, const Place& at, Slot slot, OfLines& to,
                               bool squared = false) {
    const TensorEntry& t = *at.entry;
    const float* x = pointer<float>(table, t, slot);
    for_rows(at, [&](int r, int64_t line) {
#pragma unroll
        for (int k = 0; k < kFactored; k++) {
            const float y = x[k * t.line_decay + line];
            to.row[r][k] = squared ? y * y : y;
        }
    });
}

}  // namespace hf_lopt
