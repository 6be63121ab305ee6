// Where a thread is in a tile, how it reads and writes its numbers there, and how a block sums up.
//
// A tile is a strip of kStrip columns by as many rows as give every thread kTurns turns. A turn is one iteration of a
// thread's loop over the rows of its tile. The threads of a warp share a row (narrow tensors: several rows), and in
// each turn every warp of the block takes the next one. Sums over columns stay in registers
// until the end of a tile. The partial sums of tiles are added up in their order by the last block to arrive, so that
// results do not depend on the order in which blocks run.
#pragma once

#include "simt.h"
#include "tensor_table.h"

namespace hf_lopt {

// The numbers of a thread in one row, with the arithmetic that features.h and network.h use.
struct Lane {
    float x[kLane];
};
#define HF_LOPT_EACH(e) _Pragma("unroll") for (int e = 0; e < kLane; e++)
HF_LOPT_DEVICE Lane splat(float y) { return {{y, y, y, y}}; }
#define HF_LOPT_LANE_OPERATOR(op)                            \
    HF_LOPT_DEVICE Lane operator op(Lane a, const Lane& b) { \
        HF_LOPT_EACH(e) a.x[e] = a.x[e] op b.x[e];           \
        return a;                                            \
    }                                                        \
    HF_LOPT_DEVICE Lane operator op(Lane a, float b) {       \
        HF_LOPT_EACH(e) a.x[e] = a.x[e] op b;                \
        return a;                                            \
    }
HF_LOPT_LANE_OPERATOR(+)
HF_LOPT_LANE_OPERATOR(-)
HF_LOPT_LANE_OPERATOR(*)
#undef HF_LOPT_LANE_OPERATOR
HF_LOPT_DEVICE Lane& operator+=(Lane& a, const Lane& b) { return a = a + b; }
template <class F>
HF_LOPT_DEVICE Lane map(Lane a, F f) {
    HF_LOPT_EACH(e) a.x[e] = f(a.x[e]);
    return a;
}
// NaN passes through: what it entered is not stored.
HF_LOPT_DEVICE float clamp(float x, float bound) { return maximum(minimum(x, bound), -bound); }
HF_LOPT_DEVICE float relu(float x) { return maximum(x, 0.0f); }
HF_LOPT_DEVICE float exponential(float x) { return x < kExpSmall && x > -kExpSmall ? exp_small(x) : expf(x); }

struct RowPlace {
    int64_t line, offset;  // number of the line; of the first element of the strip in the tensor
    int limit;             // columns of the strip that are there; 0 where the tile has no such row
};

// What a thread keeps of its place for the whole tile is in registers: it is as little as there can be.
struct Place {
    const TensorEntry* entry;
    int32_t tensor, tile, strip, row_tile, group;  // `tile`: of the tensor
    int width, rows_at_once, sub_row;  // columns of the strip; rows that a warp works on together, and the thread's
    int first_column, column_step;     // of the thread in the strip

    HF_LOPT_MEMBER int warp() const { return thread() / kWarpSize; }
    HF_LOPT_MEMBER int64_t start() const { return (int64_t)strip * kStrip; }  // the strip's first column
    HF_LOPT_MEMBER int column(int e) const { return first_column + e * column_step; }

    // The warp's row in turn `turn`.
    HF_LOPT_MEMBER RowPlace row(int turn) const {
        const TensorEntry& t = *entry;
        const int64_t r = first_row() + (int64_t)(turn * kWarps + warp()) * rows_at_once + sub_row;
        RowPlace out;
        out.line = line(r);
        out.offset = out.line * t.columns + start();
        out.limit = r < t.rows ? width : 0;
        if (!t.factored && out.limit > t.numel - out.offset) out.limit = (int)(t.numel - out.offset);
        return out;
    }
    HF_LOPT_MEMBER int64_t first_row() const { return (int64_t)row_tile * tile_rows(); }
    HF_LOPT_MEMBER int64_t tile_rows() const { return (int64_t)kTurns * kWarps * rows_at_once; }
    // Rows of the tile that are there.
    HF_LOPT_MEMBER int64_t row_count() const {
        const int64_t left = entry->rows - first_row();
        return left < tile_rows() ? left : tile_rows();
    }
    // Turns until this warp has no more rows; the same for all its threads.
    HF_LOPT_MEMBER int turns() const {
        const int64_t left = row_count() - (int64_t)warp() * rows_at_once, step = (int64_t)kWarps * rows_at_once;
        return left <= 0 ? 0 : (int)((left + step - 1) / step);
    }
    HF_LOPT_MEMBER int64_t line_of(int64_t row_in_tile) const { return line(first_row() + row_in_tile); }
    // Of row `r` of the tensor.
    HF_LOPT_MEMBER int64_t line(int64_t r) const {
        const TensorEntry& t = *entry;
        return t.mid == 1 ? group * t.rows + r : (group / t.mid * t.rows + r) * t.mid + group % t.mid;
    }
    // Of the strip in the vector accumulator.
    HF_LOPT_MEMBER int64_t vector() const { return group * entry->columns + start(); }
    HF_LOPT_MEMBER bool live(const RowPlace& row, int e) const { return column(e) < row.limit; }
};

template <class T>
HF_LOPT_DEVICE T* pointer(const TensorTable& table, const TensorEntry& t, Slot slot) {
    return reinterpret_cast<T*>(table.base[slot] + t.at[slot]);
}

// What a block knows of its tile, in shared memory: each look into the memory of the device takes as long as a row.
struct TileOfBlock {
    TensorEntry entry;
    int32_t tensor, tile;  // `tile`: of the tensor
};
HF_LOPT_DEVICE TileOfBlock& tile_of_block() {
    HF_LOPT_SHARED TileOfBlock tile;
    return tile;
}

// The place of this thread, again.
HF_LOPT_DEVICE Place same_place() {
    const TileOfBlock& found = tile_of_block();
    const TensorEntry& t = found.entry;
    Place at;
    at.entry = &t;
    at.tensor = found.tensor;
    at.tile = found.tile;
    at.strip = at.tile % t.strips;
    const int32_t rest = at.tile / t.strips;
    at.row_tile = rest % t.row_tiles;
    at.group = rest / t.row_tiles;
    at.width = (int)(t.columns - at.start() < kStrip ? t.columns - at.start() : kStrip);
    at.rows_at_once = kWarpSize / t.lanes;
    at.sub_row = thread() % kWarpSize / t.lanes;
    const int lane = thread() % t.lanes;
    at.first_column = t.wide ? lane * kLane : lane;
    at.column_step = t.wide ? 1 : t.lanes;
    return at;
}

// Finds the tile of the block: what a kernel begins with. All threads look at once: a search by halves waits for
// memory again and again.
HF_LOPT_DEVICE Place place(const TensorTable& table) {
    TileOfBlock& found = tile_of_block();
    for (int32_t i = thread(); i < table.count; i += kThreads) {
        const int32_t first = table.first_tile[i];
        if (first > block() || block() >= table.first_tile[i + 1]) continue;
        found.tensor = i;
        found.tile = block() - first;
    }
    barrier();
    constexpr int kWords = sizeof(TensorEntry) / sizeof(int64_t);
    static_assert(sizeof(TensorEntry) % sizeof(int64_t) == 0, "it is copied in words");
    const int64_t* from = reinterpret_cast<const int64_t*>(table.entries + found.tensor);
    for (int i = thread(); i < kWords; i += kThreads) reinterpret_cast<int64_t*>(&found.entry)[i] = from[i];
    barrier();
    return same_place();
}

// ---- numbers ------------------------------------------------------------------------------------------------------

HF_LOPT_DEVICE float decode(uint16_t x, int32_t type) { return type == kBFloat16 ? from_bfloat16(x) : from_half(x); }
HF_LOPT_DEVICE uint16_t encode(float x, int32_t type) { return type == kBFloat16 ? to_bfloat16(x) : to_half(x); }

// Where element e of the thread's columns is, with the steps of a strided slice.
HF_LOPT_DEVICE int64_t strided_place(const int64_t (&step)[2], const Place& at, const RowPlace& row, int e) {
    return row.line * step[0] + (at.start() + at.column(e)) * step[1];
}

// The thread's numbers of a row, zero where there are none.
template <bool strided = false>
HF_LOPT_DEVICE Lane load(const void* data, int32_t type, const Place& at, const RowPlace& row) {
    Lane y = splat(0.0f);
    if constexpr (strided) {
        HF_LOPT_EACH(e) {
            if (!at.live(row, e)) continue;
            const int64_t i = strided_place(at.entry->step, at, row, e);
            y.x[e] = type == kFloat32 ? static_cast<const float*>(data)[i]
                                      : decode(static_cast<const uint16_t*>(data)[i], type);
        }
    } else if (type == kFloat32) {
        const float* x = static_cast<const float*>(data) + row.offset;
        if (at.entry->wide) {
            if (at.live(row, 0)) {
                const Float4 z = *reinterpret_cast<const Float4*>(x + at.column(0));
                HF_LOPT_EACH(e) y.x[e] = z.x[e];
            }
        } else {
            HF_LOPT_EACH(e) if (at.live(row, e)) y.x[e] = x[at.column(e)];
        }
    } else {
        const uint16_t* x = static_cast<const uint16_t*>(data) + row.offset;
        if (at.entry->wide) {
            if (at.live(row, 0)) {
                const Short4 z = *reinterpret_cast<const Short4*>(x + at.column(0));
                HF_LOPT_EACH(e) y.x[e] = decode(z.x[e], type);
            }
        } else {
            HF_LOPT_EACH(e) if (at.live(row, e)) y.x[e] = decode(x[at.column(e)], type);
        }
    }
    return y;
}

// Writes them; `y` becomes what was stored, rounded.
template <bool strided = false>
HF_LOPT_DEVICE void store(void* data, int32_t type, const Place& at, const RowPlace& row, Lane& y) {
    if constexpr (strided) {
        HF_LOPT_EACH(e) {
            const uint16_t z = type == kFloat32 ? 0 : encode(y.x[e], type);
            const int64_t i = strided_place(at.entry->step, at, row, e);
            if (type != kFloat32) y.x[e] = decode(z, type);
            if (!at.live(row, e)) continue;
            if (type == kFloat32) {
                static_cast<float*>(data)[i] = y.x[e];
            } else {
                static_cast<uint16_t*>(data)[i] = z;
            }
        }
    } else if (type == kFloat32) {
        float* x = static_cast<float*>(data) + row.offset;
        if (at.entry->wide) {
            if (!at.live(row, 0)) return;
            Float4 z;
            HF_LOPT_EACH(e) z.x[e] = y.x[e];
            store_wide(x + at.column(0), z);
        } else {
            HF_LOPT_EACH(e) if (at.live(row, e)) x[at.column(e)] = y.x[e];
        }
    } else {
        uint16_t* x = static_cast<uint16_t*>(data) + row.offset;
        Short4 z;
        HF_LOPT_EACH(e) z.x[e] = encode(y.x[e], type);
        HF_LOPT_EACH(e) y.x[e] = decode(z.x[e], type);
        if (at.entry->wide) {
            if (at.live(row, 0)) store_wide(x + at.column(0), z);
        } else {
            HF_LOPT_EACH(e) if (at.live(row, e)) x[at.column(e)] = z.x[e];
        }
    }
}

// ---- sums of a block ----------------------------------------------------------------------------------------------

HF_LOPT_DEVICE double warp_sum(double x) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// out[j] = Σ x[j] over the threads of the block, for j < N; every call needs a barrier before the next one's writes.
template <int N>
HF_LOPT_DEVICE void block_sums(const double (&x)[N], int count, double* out) {
    HF_LOPT_SHARED double sums[kWarps][N];
#pragma unroll
    for (int j = 0; j < N; j++) {
        const double sum = warp_sum(x[j]);
        if (thread() % kWarpSize == 0) sums[thread() / kWarpSize][j] = sum;
    }
    barrier();
    if (thread() < count) {
        double total = 0.0;
        for (int w = 0; w < kWarps; w++) total += sums[w][thread()];
        out[thread()] = total;
    }
    barrier();
}

// A ticket that `count` blocks take; none if it is null.
struct Ticket {
    uint32_t* number;
    int count;
};

// Whether this block is the last one to take each ticket, which is then new again; what the others wrote before is
// visible to all threads of the last one.
template <int N>
HF_LOPT_DEVICE void last_to_arrive(const Ticket (&tickets)[N], bool (&result)[N]) {
    HF_LOPT_SHARED bool last[N];
    barrier();
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (thread() != i * kWarpSize) continue;  // a warp each, so that they do not wait for one another
        last[i] = false;
        if (tickets[i].number) {
            fence();
            if (take_ticket(tickets[i].number) == (uint32_t)tickets[i].count - 1) {
                last[i] = true;
                *tickets[i].number = 0;
                fence();
            }
        }
    }
    barrier();
#pragma unroll
    for (int i = 0; i < N; i++) result[i] = last[i];
    barrier();  // before the flags are used again
}

HF_LOPT_DEVICE bool last_to_arrive(uint32_t* ticket, int count) {
    bool last[1];
    last_to_arrive({{ticket, count}}, last);
    return last[0];
}

// Calls f(j, Σ_i partial[i][j]) for j < width in one thread each, by all warps of the block; the sums of a tile are
// `stride` apart.
template <class F>
HF_LOPT_DEVICE void total_of_tiles(const double* partial, int tiles, int width, int stride, F f) {
    for (int j = thread() / kWarpSize; j < width; j += kWarps) {
        double total = 0.0;
        for (int i = thread() % kWarpSize; i < tiles; i += kWarpSize) {
            total += load_shared_result(partial + (int64_t)i * stride + j);
        }
        total = warp_sum(total);
        if (thread() % kWarpSize == 0) f(j, total);
    }
}

// Running sums of what an update leaves, and of what pass 0 finds: the same additions in the same order, so that a run
// that is resumed goes on bit by bit like one that was not. float32 for the rows of a matrix, float64 otherwise.
template <class T>
struct MomentSums {
    T sum = 0, squares = 0;

    HF_LOPT_MEMBER void add(const Lane& y, const bool (&live)[kLane]) { HF_LOPT_EACH(e) if (live[e]) add((T)y.x[e]); }
    HF_LOPT_MEMBER void add(const Lane& y) { HF_LOPT_EACH(e) add((T)y.x[e]); }
    HF_LOPT_MEMBER void add(T x) {
        sum += x;
        squares = sizeof(T) == 4 ? (T)fmaf((float)x, (float)x, (float)squares)
                                 : (T)fma((double)x, (double)x, (double)squares);
    }
};

}  // namespace hf_lopt
