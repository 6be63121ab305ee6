// Accumulators in the formats of hf_lopt/kernels/reference/formats.py, which specifies them, and parameters rounded at
// random: what kernels with `Stored` arguments read and write. The format is that of the tile's tensor, so that all
// threads of a block take the same branch.
#pragma once

#include "../random_rounding.h"
#include "full_tiles.cuh"

namespace hf_lopt {

// ---- numbers ------------------------------------------------------------------------------------------------------

// To a number of bfloat16, with 16 random bits. NaN stays.
HF_LOPT_DEVICE float round_at_random(float x, uint32_t random) {
    return x != x ? x : upper_number(bits_of(x) + random);
}

template <bool is_signed>
HF_LOPT_DEVICE float scale_of(float largest) {
    constexpr int levels = is_signed ? kMomentumCodes : kSecondCodes;
    if (largest < kLeastSize) largest = 0.0f;
    return (is_signed ? largest : sqrtf(largest)) / (float)(levels * levels);
}

HF_LOPT_DEVICE float inverse_of(float scale) { return scale > 0.0f ? reciprocal(scale) : 0.0f; }

// The code of x, rounded with 16 random bits; `x` becomes what is stored. A code that the rough roots leave off by one
// is next to its boundary, and the rounding puts it right.
template <bool is_signed>
HF_LOPT_DEVICE uint8_t encode_number(float& x, float scale, float inverse, uint32_t random) {
    constexpr float levels = is_signed ? kMomentumCodes : kSecondCodes, unit = 1.0f / 65536.0f;  // of random numbers
    const float y = (is_signed ? fabsf(x) : rough_root(x)) * inverse;                            // the code's square
    float code = floorf(rough_root(y));
    const float below = code * code;
    float width = code * (2.0f * unit) + unit, rest = y - below;
    if (!is_signed) {  // so that the expected second moment is right, and not the expected root
        width = width * (2.0f * below + (2.0f * code + 1.0f));
        rest = rest * (y + below);
    }
    if (((float)random + 0.5f) * width < rest) code += 1.0f;
    code = minimum(code, levels);
    float c = code;
    if (is_signed) {
        if (x < 0.0f) c = -code;
        x = c * code * scale;
    } else {
        if (x > 0.0f && inverse > 0.0f) c = maximum(code, 1.0f);  // never 0 for what is not
        const float root = c * c * scale;
        x = root * root;
    }
    return (uint8_t)(int)c;
}

// What a code stands for: that of a momentum, which is signed, or of a second moment.
template <bool is_signed>
HF_LOPT_DEVICE float decode_number(uint8_t code, float scale) {
    const float c = is_signed ? (float)(int8_t)code : (float)code;
    const float x = c * (is_signed ? fabsf(c) : c) * scale;
    return is_signed ? x : x * x;
}

// The random numbers of a thread's elements in a row.
struct RowDraws {
    uint32_t first[kLane];  // hashes
    uint32_t turn;

    HF_LOPT_MEMBER uint32_t operator()(int e, int slot) const {
        uint32_t hash = first[e];
#pragma unroll
        for (int i = 0; i < slot / 2; i++) hash = next_hash(hash);
        return random_bits(hash, turn, slot);
    }
};

HF_LOPT_DEVICE void round_at_random(Lane& y, const RowDraws& draws, int slot) {
    HF_LOPT_EACH(e) y.x[e] = round_at_random(y.x[e], draws(e, slot));
}

// The number of a row in the whole tensor, where axes before the rows are cut.
HF_LOPT_OUT_OF_LINE uint32_t row_of_cut_tensor(const FormatEntry& f, int64_t row) {
    uint32_t global = 0;
#pragma unroll 1
    for (int i = f.axes - 1; i > 0; i--) {
        global += (uint32_t)(row % f.size[i] + f.start[i]) * f.stride[i];
        row /= f.size[i];
    }
    return global + (uint32_t)(row + f.start[0]) * f.stride[0];
}

// The start of a row of the local tensor.
HF_LOPT_DEVICE uint32_t random_start(const FormatEntry& f, int64_t row) {
    const uint32_t global = f.axes == 1 ? (uint32_t)(row + f.start[0]) : row_of_cut_tensor(f, row);
    return row_hash(f.key, global) + f.first_column;
}

HF_LOPT_DEVICE uint32_t turn_of_step(const FormatTable& formats) { return formats.step ? turn_of(*formats.step) : 0; }

// ---- any tile -----------------------------------------------------------------------------------------------------

// A row of the local tensor, and a column of it.
struct Spot {
    int64_t row, column;
};

// Where elements are in a tile: in memory, and among the rows that formats are cut along.
template <bool strided>
struct Spots {
    const FormatEntry& format;
    Place at;
    RowPlace row;

    HF_LOPT_MEMBER int64_t element(int e) const {
        return strided ? strided_place(at.entry->step, at, row, e) : row.offset + at.column(e);
    }
    HF_LOPT_MEMBER Spot operator()(int e) const {
        if (format.lines_are_rows) return {format.first + row.line, at.start() + at.column(e)};
        const int64_t place = format.first + element(e), number = place / format.row;
        return {number, place - number * format.row};
    }
    HF_LOPT_MEMBER int64_t block(int e) const {
        const Spot s = (*this)(e);
        return s.row * format.blocks + s.column / kCodeBlock;
    }
};

// Elements whose row is not that of their line.
template <bool strided>
HF_LOPT_OUT_OF_LINE RowDraws draws_of_elements(Spots<strided> spots, uint32_t turn) {
    RowDraws d;
    d.turn = turn;
#pragma unroll 1
    for (int e = 0; e < kLane; e++) {
        const Spot s = spots.at.live(spots.row, e) ? spots(e) : Spot{0, 0};
        d.first[e] = hash_of_column(random_start(spots.format, s.row) + (uint32_t)s.column);
    }
    return d;
}

// Full tiles have loops of their own. What others do is called, so that it is there once in a kernel.
template <bool strided>
HF_LOPT_OUT_OF_LINE Lane load_state(Spots<strided> spots, const char* data, const float* scales, bool is_signed) {
    const int32_t type = spots.format.type;
    if (type == kFloat32) return load<strided>(data, kFloat32, spots.at, spots.row);
    if (type == kBFloat16) return load<strided>(data, kBFloat16, spots.at, spots.row);
    Lane y = splat(0.0f);
#pragma unroll 1
    for (int e = 0; e < kLane; e++) {
        if (!spots.at.live(spots.row, e)) continue;
        const float scale = scales[spots.block(e)];
        const uint8_t code = reinterpret_cast<const uint8_t*>(data)[spots.element(e)];
        y.x[e] = is_signed ? decode_number<true>(code, scale) : decode_number<false>(code, scale);
    }
    return y;
}

// Returns what was stored.
template <bool strided>
HF_LOPT_OUT_OF_LINE Lane store_state(Spots<strided> spots, char* data, const float* scales, bool is_signed,
                                     RowDraws draws, int slot, Lane y) {
    const int32_t type = spots.format.type;
    if (type == kFloat32) {
        store<strided>(data, kFloat32, spots.at, spots.row, y);
    } else if (type == kBFloat16) {
        round_at_random(y, draws, slot);
        store<strided>(data, kBFloat16, spots.at, spots.row, y);
    } else {
#pragma unroll 1
        for (int e = 0; e < kLane; e++) {
            if (!spots.at.live(spots.row, e)) continue;
            const float scale = scales[spots.block(e)], inverse = inverse_of(scale);
            const uint32_t random = draws(e, slot);
            reinterpret_cast<uint8_t*>(data)[spots.element(e)] =
                is_signed ? encode_number<true>(y.x[e], scale, inverse, random)
                          : encode_number<false>(y.x[e], scale, inverse, random);
        }
    }
    return y;
}

// See InFloat32.
class InAnyFormat {
  public:
    // A matrix is also one with `inner` of 1: slower, but such rows are few, and a loop for them in each kernel is
    // much.
    static constexpr Kind kOtherRows = kInner;
    static constexpr int kRowsAhead = 1;

    struct ForTile;
    struct Reader;
    using Draws = RowDraws;

    template <class Args>
    HF_LOPT_MEMBER InAnyFormat(const Stored<Args>& a, const Place& at)
        : table_(a.formats), entry_(a.formats.entries[at.tensor]) {}

    template <bool strided>
    HF_LOPT_MEMBER Lane load(const TensorTable& table, const Place& at, const RowPlace& row, Slot slot, int k) const {
        const int of_v = slot == sV;
        const float* scales = table_.scales[of_v] + entry_.scales[of_v] + k * entry_.scale_decay;
        return load_state(Spots<strided>{entry_, at, row}, plane(table, at, slot, k), scales, !of_v);
    }
    template <bool strided>
    HF_LOPT_MEMBER Draws draws(const Place& at, const RowPlace& row) const {
        Draws d = {};
        // No one asks for any.
        if (entry_.type == kFloat32 && !rounds(at.entry->p_type)) return d;
        if (strided || !entry_.lines_are_rows) {
            return draws_of_elements(Spots<strided>{entry_, at, row}, turn_of_step(table_));
        }
        d.turn = turn_of_step(table_);
        const uint32_t start = random_start(entry_, entry_.first + row.line) + (uint32_t)at.start();
        HF_LOPT_EACH(e) d.first[e] = hash_of_column(start + (uint32_t)at.column(e));
        return d;
    }
    template <bool strided>
    HF_LOPT_MEMBER void store(const TensorTable& table, const Place& at, const RowPlace& row, Slot slot, int k,
                              const Draws& draws, int random_slot, Lane& y) const {
        const int of_v = slot == sV;
        const float* scales = table_.other_scales[of_v] + entry_.other_scales[of_v] + k * entry_.scale_decay;
        y = store_state(Spots<strided>{entry_, at, row}, plane(table, at, slot, k), scales, !of_v, draws, random_slot,
                        y);
    }
    template <bool strided>
    HF_LOPT_MEMBER void store_parameter(const TensorTable& table, const Place& at, const RowPlace& row,
                                        Lane& y) const {
        const TensorEntry& t = *at.entry;
        if (rounds(t.p_type)) round_at_random(y, draws<strided>(at, row), kParameterSlot);
        hf_lopt::store<strided>(pointer<void>(table, t, sP), t.p_type, at, row, y);
    }
    template <bool strided, class F>
    HF_LOPT_MEMBER void store_all(const TensorTable& table, const Place& at, const RowPlace& row, Updated& u,
                                  F add) const {
        const Draws d = draws<strided>(at, row);
#pragma unroll
        for (int k = 0; k < kMomenta; k++) {
            store<strided>(table, at, row, sM, k, d, k, u.m[k]);
            add(k);
        }
        store<strided>(table, at, row, sV, 0, d, kMomenta, u.v);
        add(kMomenta);
    }
    // Also where all that is asked for are numbers of bfloat16: they have no place among blocks or random numbers.
    HF_LOPT_MEMBER bool along_lines() const {
        return entry_.lines_are_rows || (entry_.type != kCodes && !table_.step);
    }
    // Whether parameters of a type are rounded at random.
    HF_LOPT_MEMBER bool rounds(int32_t type) const { return type == kBFloat16 && table_.round_params; }

    HF_LOPT_MEMBER const FormatTable& table() const { return table_; }
    HF_LOPT_MEMBER const FormatEntry& entry() const { return entry_; }
    HF_LOPT_MEMBER int number_bytes() const { return entry_.type == kFloat32 ? 4 : entry_.type == kBFloat16 ? 2 : 1; }
    HF_LOPT_MEMBER char* plane(const TensorTable& table, const Place& at, Slot slot, int k) const {
        return pointer<char>(table, *at.entry, slot) + k * at.entry->decay * number_bytes();
    }

  private:
    const FormatTable& table_;
    const FormatEntry& entry_;
};

struct InAnyFormat::Reader {
    const TensorTable& table;
    InAnyFormat formats;

    template <class Args>
    HF_LOPT_MEMBER Reader(const Args& a, const Place& at) : table(a.table), formats(a, at) {}
    HF_LOPT_MEMBER Lane load(const Place& at, const RowPlace& row, int j, int second_moments) const {
        const bool second = j < second_moments;
        return formats.load<false>(table, at, row, second ? sV : sM, second ? j : j - second_moments);
    }
};

template <bool strided = false>
HF_LOPT_DEVICE Updated update(const InAnyFormat& formats, const TensorTable& table, const FeatureConstants& c,
                              const Place& at, const RowPlace& row) {
    const TensorEntry& t = *at.entry;
    Updated u;
    u.g = load<strided>(pointer<void>(table, t, sG), t.g_type, at, row);
    u.p = load<strided>(pointer<void>(table, t, sP), t.p_type, at, row);
#pragma unroll
    for (int k = 0; k < kMomenta; k++) u.m[k] = formats.load<strided>(table, at, row, sM, k);
    u.v = formats.load<strided>(table, at, row, sV, 0);
    finish_update(u, c);
    return u;
}

template <class Args>
struct FormatsFor<Stored<Args>> {
    using Type = InAnyFormat;
};

// ---- full tiles ---------------------------------------------------------------------------------------------------

// Of each row: the scales of its block, momenta first, and the start of its random numbers.
struct InAnyFormat::ForTile {
    OfLines scales, other_scales;
    uint32_t random[kTileRows];
};
static_assert(kLane == kMomenta + 1, "OfLines has a place for each accumulator");
static_assert(kCodeBlock % kStrip == 0, "a strip is in one block");

template <int momenta>
struct FullState<InAnyFormat, momenta> {
    InAnyFormat formats;
    InAnyFormat::ForTile& tile;
    char *m, *v;
    int64_t m_step;  // bytes from one decay to the next
    int32_t type;
    uint32_t start, turn;  // of the strip, of the step

    template <class Args>
    HF_LOPT_MEMBER FullState(const Args& a, const Place& at, InAnyFormat::ForTile& shared)
        : formats(a, at),
          tile(shared),
          type(formats.entry().type),
          start((uint32_t)at.start()),
          turn(turn_of_step(formats.table())) {}

    HF_LOPT_MEMBER void set_pointers(const TensorTable& table, const TensorEntry& t) {
        m = pointer<char>(table, t, sM);
        v = pointer<char>(table, t, sV);
        m_step = t.decay * formats.number_bytes();
    }

    HF_LOPT_MEMBER void set_rows(const Place& at) {
        const FormatTable& table = formats.table();
        const FormatEntry& f = formats.entry();
        for_rows(at, [&](int r, int64_t line) {
            const int64_t row = f.first + line, block = row * f.blocks + at.start() / kCodeBlock;
            tile.random[r] = random_start(f, row);
            if (type != kCodes) return;
#pragma unroll
            for (int k = 0; k <= kMomenta; k++) {
                const int of_v = k == kMomenta;
                if (k >= momenta && !of_v) continue;
                const int64_t place = block + (of_v ? 0 : k * f.scale_decay);
                tile.scales.row[r][k] = table.scales[of_v][f.scales[of_v] + place];
                if (table.step) tile.other_scales.row[r][k] = table.other_scales[of_v][f.other_scales[of_v] + place];
            }
        });
    }

    HF_LOPT_MEMBER void begin(ComingRow<momenta>& to, int64_t from) const {
        if (type == kFloat32) {
            begin_as<float>(to, from);
        } else if (type == kBFloat16) {
            begin_as<BFloat16>(to, from);
        } else {
            begin_as<uint8_t>(to, from);
        }
    }
    HF_LOPT_MEMBER Lane momentum(ComingRow<momenta>& row, int k, int of_thread, int of_tile) const {
        return load<true>(row.m[k], of_thread, of_tile, k);
    }
    HF_LOPT_MEMBER Lane second_moment(ComingRow<momenta>& row, int of_thread, int of_tile) const {
        return load<false>(row.v, of_thread, of_tile, kMomenta);
    }
    HF_LOPT_MEMBER void store_momentum(int k, int64_t element, int row, int column, Lane& y) const {
        store_one<true>(m + k * m_step, element, row, draws(row, column), k, k, y);
    }
    HF_LOPT_MEMBER void store_second_moment(int64_t element, int row, int column, Lane& y) const {
        store_one<false>(v, element, row, draws(row, column), kMomenta, kMomenta, y);
    }
    template <class F>
    HF_LOPT_MEMBER void store(int64_t element, int row, int column, Updated& u, F add) const {
        const RowDraws d = draws(row, column);
#pragma unroll
        for (int k = 0; k < kMomenta; k++) {
            store_one<true>(m + k * m_step, element, row, d, k, k, u.m[k]);
            add(k);
        }
        store_one<false>(v, element, row, d, kMomenta, kMomenta, u.v);
        add(kMomenta);
    }
    HF_LOPT_MEMBER void store_both(int64_t element, int row, int column, Lane& new_m, Lane& new_v) const {
        const RowDraws d = draws(row, column);
        store_one<true>(m, element, row, d, 0, 0, new_m);
        store_one<false>(v, element, row, d, kMomenta, 1, new_v);
    }
    template <class P>
    HF_LOPT_MEMBER void store_parameter(P* p, int row, int column, Lane& y) const {
        if (std::is_same_v<P, BFloat16> && formats.table().round_params) {
            round_at_random(y, draws(row, column), kParameterSlot);
        }
        store_four(p, y);
    }

  private:
    HF_LOPT_MEMBER RowDraws draws(int row, int column) const {
        RowDraws d;
        d.turn = turn;
        HF_LOPT_EACH(e) d.first[e] = hash_of_column(tile.random[row] + start + (uint32_t)(column + e));
        return d;
    }
    template <class T>
    HF_LOPT_MEMBER void begin_as(ComingRow<momenta>& to, int64_t from) const {
#pragma unroll
        for (int k = 0; k < momenta; k++) {
            begin_copy_of_four(to.m[k], reinterpret_cast<const T*>(m + k * m_step) + from);
        }
        begin_copy_of_four(to.v, reinterpret_cast<const T*>(v) + from);
    }
    template <bool is_signed>
    HF_LOPT_MEMBER Lane load(Coming& from, int of_thread, int row, int plane) const {
        if (type == kFloat32) return load_four(coming<float>(from, of_thread));
        if (type == kBFloat16) return load_four(coming<BFloat16>(from, of_thread));
        const uint32_t codes = *reinterpret_cast<const uint32_t*>(coming<uint8_t>(from, of_thread));
        const float scale = tile.scales.row[row][plane];
        Lane y;
        HF_LOPT_EACH(e) y.x[e] = decode_number<is_signed>((uint8_t)(codes >> 8 * e), scale);
        return y;
    }
    template <bool is_signed>
    HF_LOPT_MEMBER void store_one(char* data, int64_t element, int row, const RowDraws& draws, int plane, int slot,
                                  Lane& y) const {
        if (type == kFloat32) {
            store_four(reinterpret_cast<float*>(data) + element, y);
        } else if (type == kBFloat16) {
            round_at_random(y, draws, slot);
            store_four(reinterpret_cast<BFloat16*>(data) + element, y);
        } else {
            const float scale = tile.other_scales.row[row][plane], inverse = inverse_of(scale);
            uint32_t codes = 0;
            HF_LOPT_EACH(e) {
                codes |= (uint32_t)encode_number<is_signed>(y.x[e], scale, inverse, draws(e, slot)) << 8 * e;
            }
            *reinterpret_cast<uint32_t*>(data + element) = codes;
        }
    }
};

}  // namespace hf_lopt
