// Pass 0: sums over the gradient. Reads the gradient only, unless the statistics of everything else are asked for too.
#include "full_tiles.cuh"
#include "moments.cuh"

namespace hf_lopt {
namespace {

constexpr int kBatch = 2;  // rows that a thread loads before it works on them
constexpr int kAhead = 3;  // batches that are under way

struct RowSums {
    double nonfinite, squares;
    float columns[kLane];
};

// Adds the squares of the thread's numbers of one row before the clip.
HF_LOPT_DEVICE void add_squares(const Lane& g, RowSums& sums) {
    float squares = 0.0f;
    HF_LOPT_EACH(e) squares = fmaf(g.x[e], g.x[e], squares);
    if (squares > 1e-25f && squares < 1e30f) {
        sums.squares += squares;
    } else {  // a sum that float32 cannot hold, or that has lost its small terms
        HF_LOPT_EACH(e) {
            sums.squares += (double)g.x[e] * g.x[e];
            sums.nonfinite += !(fabsf(g.x[e]) <= 3.402823466e38f);
        }
    }
}

// The squares after the clip, which are also added to the sums of the columns.
HF_LOPT_DEVICE Lane add_clipped(const Lane& g, float clip, RowSums& sums) {
    Lane clipped;
    HF_LOPT_EACH(e) {
        const float y = clamp(g.x[e], clip);
        clipped.x[e] = y * y;
        sums.columns[e] += clipped.x[e];
    }
    return clipped;
}

HF_LOPT_DEVICE Lane add(const Lane& g, float clip, RowSums& sums) {
    add_squares(g, sums);
    return add_clipped(g, clip, sums);
}

// The sums over a row: one number per line, or one for each of its `inner` places.
HF_LOPT_DEVICE void store_line(const SumsArgs& a, const Place& at, const RowPlace& row, const Lane& squares,
                               float (&buffer)[kWarps][kStrip]) {
    const TensorEntry& t = *at.entry;
    float* out = a.parts + t.line_part + at.strip * t.line_length();
    if (t.inner == 1) {
        float sum = 0.0f;
        HF_LOPT_EACH(e) sum += squares.x[e];
        for (int mask = t.lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (thread() % t.lanes == 0 && row.limit > 0) out[row.line] = sum;
        return;
    }
    float* mine = buffer[at.warp()] + at.sub_row * t.lanes * kLane;
    HF_LOPT_EACH(e) mine[at.column(e)] = squares.x[e];
    warp_barrier();
    const int places = t.inner < row.limit ? (int)t.inner : row.limit;
    for (int i = thread() % t.lanes; i < places; i += t.lanes) {
        float sum = 0.0f;
        for (int64_t c = i; c < row.limit; c += t.inner) sum += mine[c];
        out[row.line * t.inner + (at.start() + i) % t.inner] = sum;
    }
    warp_barrier();
}

// Σ_i x[i * stride] for i < count, several under way at once.
HF_LOPT_DEVICE double total_of(const float* x, int64_t count, int64_t stride) {
    constexpr int kAtOnce = 8;
    double total = 0.0;
    for (int64_t i = 0; i < count; i += kAtOnce) {
        float y[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) y[j] = i + j < count ? load_shared_result(x + (i + j) * stride) : 0.0f;
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) total += y[j];
    }
    return total;
}

// A tall matrix has many tiles above one another: each thread adds up a part of its column's.
HF_LOPT_DEVICE void total_columns(const SumsArgs& a, const Place& at) {
    HF_LOPT_SHARED double totals[kThreads];
    constexpr int kParts = kThreads / kStrip;
    const TensorEntry& t = *at.entry;
    const int64_t place = at.vector(), length = t.vector_length();
    const int c = thread() % kStrip, each = (t.row_tiles + kParts - 1) / kParts, first = thread() / kStrip * each;
    const int left = t.row_tiles - first, count = c < at.width ? (left < each ? left : each) : 0;
    totals[thread()] = total_of(a.parts + t.vector_part + first * length + place + c, count, length);
    barrier();
    float* out = pointer<float>(a.table, t, sVector);
    if (thread() < at.width) {
        double total = 0.0;
        for (int part = 0; part < kParts; part++) total += totals[part * kStrip + thread()];
        out[place + thread()] = (float)total;
    }
}

HF_LOPT_DEVICE void total_lines(const SumsArgs& a, const Place& at) {
    const TensorEntry& t = *at.entry;
    const int64_t length = t.line_length();
    const float* parts = a.parts + t.line_part;
    float* out = pointer<float>(a.table, t, sLine);
    if (t.inner == 1) {
        for_rows(at, [&](int, int64_t line) { out[line] = (float)total_of(parts + line, t.strips, length); });
        return;
    }
    for (int64_t i = thread(); i < at.row_count() * t.inner; i += kThreads) {
        const int64_t position = i % t.inner, number = at.line_of(i / t.inner) * t.inner + position;
        double total = 0.0;
        for (int64_t s = 0; s < t.strips; s++) {
            // The strip's first column at this place along the inner axes, if it has one.
            const int64_t distance = (position - s * kStrip % t.inner + t.inner) % t.inner;
            const int64_t left = t.columns - s * kStrip;
            if (distance < (left < kStrip ? left : kStrip)) total += load_shared_result(parts + s * length + number);
        }
        out[number] = (float)total;
    }
}

// What the block has added up. From registers: what other functions see is in memory, which costs a tenth of the pass
// (measured on an H200).
HF_LOPT_DEVICE void flush(const SumsArgs& a, const Place& at, RowSums& sums, float (&buffer)[kWarps][kStrip]) {
    const TensorEntry& t = *at.entry;
    if (t.factored) {
        // Over the rows that the warp works on together, then over the warps.
        HF_LOPT_EACH(e) {
            for (int mask = t.lanes; mask < kWarpSize; mask *= 2)
                sums.columns[e] += shuffle_xor(sums.columns[e], mask);
        }
        warp_barrier();
        if (at.sub_row == 0) {
            HF_LOPT_EACH(e) buffer[at.warp()][at.column(e)] = sums.columns[e];
        }
        barrier();
        float* out = a.parts + t.vector_part + at.row_tile * t.vector_length() + at.vector();
        for (int c = thread(); c < at.width; c += kThreads) {
            float total = 0.0f;
            for (int w = 0; w < kWarps; w++) total += buffer[w][c];
            out[c] = total;
        }
    }
    const double both[kGradientStats] = {sums.nonfinite, sums.squares};
    block_sums(both, kGradientStats, a.partial + (int64_t)block() * a.width);
}

// Rows of a full tile that a thread loads before it works on them: as many bytes of each type.
template <class G>
constexpr int kFullBatch = kBatch * (int)(sizeof(float) / sizeof(G));

// In shared memory.
struct ForFullTiles {
    Coming rows[kAhead][kBatch];
    float line_sums[kTileRows];
};

// A full tile; what is added up, and in which order, is what the other loop does.
template <class G>
HF_LOPT_DEVICE void add_full_rows(const SumsArgs& a, const Place& at, ForFullTiles& shared,
                                  float (&buffer)[kWarps][kStrip]) {
    RowSums sums = {};
    const TensorEntry& t = *at.entry;
    const FullTile f = full_tile(at);
    constexpr int kRows = kFullBatch<G>;
    const G* g = pointer<G>(a.table, t, sG) + f.element;
    const int64_t step = f.element_step;
    const int lane = thread() % kWarpSize;
    // Two rows of 16-bit numbers share a place.
    const auto place_of = [&](int batch, int r) {
        return coming<G>(shared.rows[batch][r % kBatch], thread()) + r / kBatch * kThreads * kLane;
    };
    const auto begin = [&](int batch, int left) {
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            if (r < left) begin_copy<kLane * sizeof(G)>(place_of(batch, r), g + r * step);
        }
        end_group();
        g += kRows * step;
    };
    // The row of the batch whose sum the thread ends up with.
    int row_of_sum = at.warp() + lane / (kWarpSize / kRows) * kWarps;
    const bool writes = lane % (kWarpSize / kRows) == 0;
#pragma unroll
    for (int i = 0; i < kAhead; i++) begin(i, f.turns - i * kRows);
    int batch = 0;
#pragma unroll 1
    for (int left = f.turns; left > 0; left -= kRows, batch = batch + 1 < kAhead ? batch + 1 : 0) {
        Lane x[kRows];
        wait_for_groups<kAhead - 1>();
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            x[r] = splat(0.0f);
            if (r < left) x[r] = load_four(place_of(batch, r));
        }
        begin(batch, left - kAhead * kRows);
        float row[kRows];
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            add_squares(x[r], sums);  // of zeros beyond the last row
            const Lane squares = add_clipped(x[r], a.clip, sums);
            row[r] = 0.0f;
            HF_LOPT_EACH(e) row[r] += squares.x[e];
        }
        // Half of the rows go to the other half of the lanes at each exchange, until there is one left.
        int mask = kWarpSize / 2;
#pragma unroll
        for (int count = kRows; count > 1; count /= 2, mask /= 2) {
            const bool upper = lane & mask;
#pragma unroll
            for (int r = 0; r < count / 2; r++) {
                const float kept = upper ? row[r + count / 2] : row[r], sent = upper ? row[r] : row[r + count / 2];
                row[r] = kept + shuffle_xor(sent, mask);
            }
        }
#pragma unroll
        for (; mask > 0; mask /= 2) row[0] += shuffle_xor(row[0], mask);
        if (writes && lane / (kWarpSize / kRows) < left) shared.line_sums[row_of_sum] = row[0];
        row_of_sum += kRows * kWarps;
    }
    if (t.factored) {
        barrier();
        float* out = a.parts + t.line_part + at.strip * t.line_length();
        for_rows(at, [&](int r, int64_t line) { out[line] = shared.line_sums[r]; });
    }
    flush(a, at, sums, buffer);
}

// Any tile, in batches of rows.
HF_LOPT_OUT_OF_LINE void add_other_rows(const SumsArgs& a, float (&buffer)[kWarps][kStrip]) {
    const Place at = same_place();
    const TensorEntry& t = *at.entry;
    RowSums sums = {};
    const void* g = pointer<void>(a.table, t, sG);
    const int turns = at.turns();
    for (int first = 0; first < turns; first += kBatch) {
        Lane x[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
            RowPlace row = at.row(first + i);
            if (first + i >= turns) row.limit = 0;
            x[i] = load(g, t.g_type, at, row);
        }
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
            if (first + i >= turns) break;
            const RowPlace row = at.row(first + i);
            const Lane squares = add(x[i], a.clip, sums);
            if (t.factored) store_line(a, at, row, squares, buffer);
        }
    }
    flush(a, at, sums, buffer);
}

HF_LOPT_KERNEL(kThreads, 4) sums_kernel(HF_LOPT_ARGUMENT SumsArgs a) {
    HF_LOPT_SHARED float buffer[kWarps][kStrip];
    HF_LOPT_SHARED ForFullTiles shared;
    const Place at = place(a.table);
    const TensorEntry& t = *at.entry;
    const bool full = t.factored ? is_full(at) : is_full_flat(at);
    if (full && t.g_type == kFloat32) {
        add_full_rows<float>(a, at, shared, buffer);
    } else if (full && t.g_type == kBFloat16) {
        add_full_rows<BFloat16>(a, at, shared, buffer);
    } else {
        add_other_rows(a, buffer);
    }
    if (a.moments) {
        double* stats = a.partial + (int64_t)block() * a.width;
        if (t.factored) {
            moments<float>(a, stats);
        } else {
            moments<double>(a, stats);
        }
    }

    uint32_t* first = a.table.tickets + t.first_ticket;
    Ticket tickets[3] = {{first, t.tiles()}};
    if (t.factored) {
        const int strips = (int)t.groups * t.strips;
        tickets[1] = {first + 1 + at.group * t.strips + at.strip, t.row_tiles};
        tickets[2] = {first + 1 + strips + at.group * t.row_tiles + at.row_tile, t.strips};
    }
    bool last[3];
    last_to_arrive(tickets, last);
    if (last[1]) total_columns(a, at);
    if (last[2]) total_lines(a, at);
    if (last[0]) {
        const int width = a.moments ? a.width : kGradientStats;
        double* out = a.stats + (int64_t)at.tensor * a.width;
        const double* partial = a.partial + (int64_t)a.table.first_tile[at.tensor] * a.width;
        total_of_tiles(partial, t.tiles(), width, a.width, [&](int j, double total) { out[j] = total; });
        for (int j = width + thread(); j < a.width; j += kThreads) out[j] = 0.0;
    }
}

}  // namespace

void launch_sums(const SumsArgs& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(sums_kernel, tiles, kThreads, stream, args);
}

}  // namespace hf_lopt
