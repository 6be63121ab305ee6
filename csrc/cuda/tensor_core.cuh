// Pass 2 of a matrix for a network of 32 hidden units, on the matrix units: mma.m16n8k16 of bfloat16 with float32
// sums.
//
// Every number is the sum of two bfloat16 numbers, high and low, and a product is high·high + high·low + low·high:
// what is left out is 2^-16 of it. The sums start at what the row, the column and the bias contribute.
//
// A warp works on a row, 32 columns at a time: 8 groups of 4 lanes with kLane columns each. The 16 features of an
// element are divided among the lanes of its group just as mma wants them: lane 0 has g, p, v and 1/sqrt(v), and lane
// k + 1 has m_k, m_k/sqrt(v), and g and m_k times the factors of decay k. So lane 0 also updates p and v, and lane k +
// 1 updates m_k; an element's numbers are never exchanged. An mma takes elements i and i + 1 of each group as its rows
// `group` and `group + 8`.
//
// In TF32 (mma.m16n8k8) a number keeps 11 bits, a product is one and the last layer is one too: under half of the
// instructions, and steps that differ by a few parts in 10^4. Which input of a product stands where is the same order
// on both sides, so it is chosen such that what a lane has is what it hands in: inputs q and q + 4 of a product are
// features 0 and 1, then 2 and 3, of lane q, and units 2 q and 2 q + 1 of the layer before. The matrix units cut
// numbers off after 11 bits. Rounding all of them first would take 160 instructions of 700; instead everything that
// goes in is larger by the mean of what is lost, kCut, which for the sums of a layer is a factor of its weights.
#pragma once

#include "apply.cuh"
#include "full_tiles.cuh"

namespace hf_lopt {

constexpr int kUnits = 32, kBlocksOfUnits = kUnits / 8, kBatchColumns = 32, kDepth = 16;

// Two bfloat16 numbers in one register, with what they leave of two float32 numbers in another.
struct Split {
    uint32_t high, low;
};

HF_LOPT_DEVICE Split split(float x, float y) {
    Split s;
    s.high = pack_bfloat16(x, y);
    s.low = pack_bfloat16(x - lower_number(s.high), y - upper_number(s.high));
    return s;
}

// How the matrix units are used.
enum Precision { kSplitBFloat16, kTf32 };

// The right-hand sides of both layers as a lane of the warp wants them: high b0, b1, low b0, b1 of a product; in TF32
// b0, b1 of two products. There the last layer is a product too, in which two columns of eight are used.
template <Precision precision>
struct Fragments {
    Word4 first[kBlocksOfUnits][kWarpSize];
    Word4 second[kUnits / kDepth][kBlocksOfUnits][kWarpSize];
    Word4 last[precision == kTf32 ? kUnits / kDepth : 1][kWarpSize];
};

// Input of the network that lane `q` of a group has in place `i`.
HF_LOPT_DEVICE int input_of(int q, int i) {
    const int of_first[4] = {kG, kP, kV, kRsqrtV}, of_others[4] = {kM, kMRsqrtV, kFacG, kFacM};
    return q == 0 ? of_first[i] : of_others[i] + q - 1;
}

HF_LOPT_DEVICE Word4 fragment(float x0, float x1, float x2, float x3) {
    const Split a = split(x0, x1), b = split(x2, x3);
    return {{a.high, b.high, a.low, b.low}};
}

HF_LOPT_DEVICE void load_fragments(const Shared<kUnits>& s, Fragments<kSplitBFloat16>& f) {
    const Network<kUnits>& w = s.net;
    constexpr int kFirst = kBlocksOfUnits * kWarpSize, kSecond = kUnits / kDepth * kFirst;
    for (int i = thread(); i < kFirst + kSecond; i += kThreads) {
        const int lane = i % kWarpSize, n = i / kWarpSize % kBlocksOfUnits, q = lane % 4, unit = n * 8 + lane / 4;
        if (i < kFirst) {
            f.first[n][lane] = fragment(w.first[input_of(q, 0)][unit], w.first[input_of(q, 1)][unit],
                                        w.first[input_of(q, 2)][unit], w.first[input_of(q, 3)][unit]);
        } else {
            const int step = i / kFirst - 1, k = step * kDepth + 2 * q;
            f.second[step][n][lane] =
                fragment(w.second[k][unit], w.second[k + 1][unit], w.second[k + 8][unit], w.second[k + 9][unit]);
        }
    }
    barrier();
}

// Half of a unit in the last place, 2^-11, over the mean of numbers between 1 and 2 that are as frequent as in use.
constexpr float kCut = 1.0f + 0.69314718f / 2048.0f;

// Multiplies what the sums of both hidden layers are formed of with kCut.
HF_LOPT_DEVICE void enlarge(Shared<kUnits>& s) {
    const auto all = [](float* x, int count) {
        for (int i = thread(); i < count; i += kThreads) x[i] *= kCut;
    };
    all(s.net.first[0], kInputs * kUnits);
    all(s.net.bias, kUnits);
    all(s.net.second[0], kUnits * kUnits);
    all(s.net.second_bias, kUnits);
    all(s.vectors.line[0], kFactored * kUnits);
    all(s.vectors.rsqrt_line[0], kFactored * kUnits);
    all(s.column_bias, kStrip * Shared<kUnits>::kColumnStride);
    barrier();
}

HF_LOPT_DEVICE Word4 tf32_fragment(float x0, float x1, float x2, float x3) {
    return {{to_tf32(x0), to_tf32(x1), to_tf32(x2), to_tf32(x3)}};
}

HF_LOPT_DEVICE void load_fragments(Shared<kUnits>& s, Fragments<kTf32>& f) {
    enlarge(s);
    const Network<kUnits>& w = s.net;
    constexpr int kSteps = kUnits / kDepth, kFirst = kBlocksOfUnits * kWarpSize, kSecond = kSteps * kFirst;
    for (int i = thread(); i < kFirst + kSecond + kSteps * kWarpSize; i += kThreads) {
        const int lane = i % kWarpSize, n = i / kWarpSize % kBlocksOfUnits, q = lane % 4, unit = n * 8 + lane / 4;
        if (i < kFirst) {
            f.first[n][lane] = tf32_fragment(w.first[input_of(q, 0)][unit], w.first[input_of(q, 1)][unit],
                                             w.first[input_of(q, 2)][unit], w.first[input_of(q, 3)][unit]);
        } else if (i < kFirst + kSecond) {
            const int step = i / kFirst - 1, k = step * kDepth + 2 * q;
            f.second[step][n][lane] =
                tf32_fragment(w.second[k][unit], w.second[k + 1][unit], w.second[k + 8][unit], w.second[k + 9][unit]);
        } else {
            const int step = (i - kFirst - kSecond) / kWarpSize, k = step * kDepth + 2 * q, output = lane / 4;
            const auto weight = [&](int j) { return output < 2 ? w.last[j][output] : 0.0f; };
            f.last[step][lane] = tf32_fragment(weight(k), weight(k + 1), weight(k + 8), weight(k + 9));
        }
    }
    barrier();
}

HF_LOPT_DEVICE void multiply_split(float (&d)[4], const uint32_t (&high)[4], const uint32_t (&low)[4],
                                   const Word4& b) {
    matrix_multiply_add(d, low, b.x[0], b.x[1]);
    matrix_multiply_add(d, high, b.x[2], b.x[3]);
    matrix_multiply_add(d, high, b.x[0], b.x[1]);
}

// A lane's place in a batch, as places of a tile: `load` and `store` of tiles.cuh then serve it.
HF_LOPT_DEVICE Place batch_place(const Place& at, int batch) {
    Place p = at;
    const int group = thread() % kWarpSize / 4;
    p.first_column = batch * kBatchColumns + (at.entry->wide ? group * kLane : group);
    p.column_step = at.entry->wide ? 1 : 8;
    return p;
}

// What a lane reads of a batch: the gradient, the second moment, and what the lane updates beside them, which is the
// parameter in lane 0 of a group and momentum k in lane k + 1.
struct Raw {
    Lane g, v, p_or_m;
};

template <class Args>
HF_LOPT_DEVICE Raw load_raw(const Args& a, const FormatsOf<Args>& formats, const Place& at, const RowPlace& row,
                            int q) {
    const TensorEntry& t = *at.entry;
    Raw r;
    r.g = load(pointer<void>(a.table, t, sG), t.g_type, at, row);
    r.v = formats.template load<false>(a.table, at, row, sV, 0);
    r.p_or_m = q == 0 ? load(pointer<void>(a.table, t, sP), t.p_type, at, row)
                      : formats.template load<false>(a.table, at, row, sM, q - 1);
    return r;
}

// The sums of units 2 q and 2 q + 1 of block n in elements e and e + 1 before the first layer's products. `column(e)`:
// of the lane's element e in the strip. `line_bias(n, i)`: what the row adds to unit 2 q + i of block n.
template <class LineBias, class Column>
HF_LOPT_DEVICE void first_sums(const Shared<kUnits>& s, LineBias line_bias, Column column, int e, int n,
                               float (&z)[4]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float* bias = s.bias(column(e + r), n * 8 + 2 * (thread() % 4));
        z[2 * r] = line_bias(n, 0) + bias[0];
        z[2 * r + 1] = line_bias(n, 1) + bias[1];
    }
}

// The outputs for elements e and e + 1 of every group, at least in its lane 0. x: the lane's features of both.
template <class LineBias, class Column>
HF_LOPT_DEVICE void evaluate(const Shared<kUnits>& s, const Fragments<kSplitBFloat16>& f, LineBias line_bias,
                             Column column, int e, const float (&x)[2][4], float (&direction)[2],
                             float (&magnitude)[2]) {
    const int lane = thread() % kWarpSize, q = lane % 4;
    uint32_t high[4], low[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const Split y = split(x[r][2 * half], x[r][2 * half + 1]);
            high[2 * half + r] = y.high;
            low[2 * half + r] = y.low;
        }
    }
    uint32_t hidden_high[kUnits / kDepth][4], hidden_low[kUnits / kDepth][4];
#pragma unroll
    for (int n = 0; n < kBlocksOfUnits; n++) {
        float z[4];
        first_sums(s, line_bias, column, e, n, z);
        multiply_split(z, high, low, f.first[n][lane]);
        // The sums of two blocks of 8 units are the left-hand side of the next product.
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const Split y = split(relu(z[2 * r]), relu(z[2 * r + 1]));
            hidden_high[n / 2][n % 2 * 2 + r] = y.high;
            hidden_low[n / 2][n % 2 * 2 + r] = y.low;
        }
    }
    float out[2][2] = {};
#pragma unroll
    for (int n = 0; n < kBlocksOfUnits; n++) {
        const int unit = n * 8 + 2 * q;
        float z[4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            z[2 * r] = s.net.second_bias[unit];
            z[2 * r + 1] = s.net.second_bias[unit + 1];
        }
#pragma unroll
        for (int step = 0; step < kUnits / kDepth; step++) {
            multiply_split(z, hidden_high[step], hidden_low[step], f.second[step][n][lane]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float y = relu(z[i]);
            out[i / 2][0] = fmaf(y, s.net.last[unit + i % 2][0], out[i / 2][0]);
            out[i / 2][1] = fmaf(y, s.net.last[unit + i % 2][1], out[i / 2][1]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int o = 0; o < 2; o++) {
            out[r][o] += shuffle_xor(out[r][o], 1);
            out[r][o] += shuffle_xor(out[r][o], 2);
        }
        direction[r] = out[r][0] + s.net.last_bias[0];
        magnitude[r] = out[r][1] + s.net.last_bias[1];
    }
}

template <class LineBias, class Column>
HF_LOPT_DEVICE void evaluate(const Shared<kUnits>& s, const Fragments<kTf32>& f, LineBias line_bias, Column column,
                             int e, const float (&x)[2][4], float (&direction)[2], float (&magnitude)[2]) {
    const int lane = thread() % kWarpSize, q = lane % 4;
    uint32_t in[2][4], hidden[kBlocksOfUnits][4];
#pragma unroll
    for (int i = 0; i < 8; i++) in[i / 4][i % 4] = bits_of(x[i % 2][i / 2] * kCut);
    // The sums of a block of 8 units are the left-hand side of a product of the next layer.
    const auto into = [](const float (&z)[4], uint32_t (&y)[4]) {
        y[0] = bits_of(relu(z[0]));
        y[1] = bits_of(relu(z[2]));
        y[2] = bits_of(relu(z[1]));
        y[3] = bits_of(relu(z[3]));
    };
#pragma unroll
    for (int n = 0; n < kBlocksOfUnits; n++) {
        float z[4];
        first_sums(s, line_bias, column, e, n, z);
        const Word4 b = f.first[n][lane];
        matrix_multiply_add_tf32(z, in[0], b.x[0], b.x[1]);
        matrix_multiply_add_tf32(z, in[1], b.x[2], b.x[3]);
        into(z, hidden[n]);
    }
    float out[4] = {};
    if (q == 0) {
        out[0] = out[2] = s.net.last_bias[0];
        out[1] = out[3] = s.net.last_bias[1];
    }
#pragma unroll
    for (int n = 0; n < kBlocksOfUnits; n++) {
        const int unit = n * 8 + 2 * q;
        float z[4] = {s.net.second_bias[unit], s.net.second_bias[unit + 1], s.net.second_bias[unit],
                      s.net.second_bias[unit + 1]};
#pragma unroll
        for (int step = 0; step < kUnits / kDepth; step++) {
            const Word4 b = f.second[step][n][lane];
            matrix_multiply_add_tf32(z, hidden[2 * step], b.x[0], b.x[1]);
            matrix_multiply_add_tf32(z, hidden[2 * step + 1], b.x[2], b.x[3]);
        }
        uint32_t y[4];
        into(z, y);
        const Word4 b = f.last[n / 2][lane];
        matrix_multiply_add_tf32(out, y, b.x[n % 2 * 2], b.x[n % 2 * 2 + 1]);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        direction[r] = out[2 * r];
        magnitude[r] = out[2 * r + 1];
    }
}

// Lanes 1 to 3 of a group store their momentum; lane 0 the second moment and the parameter or the step.
template <class Args>
HF_LOPT_DEVICE void store_raw(const Args& a, const FormatsOf<Args>& formats, const Place& at, const RowPlace& row,
                              int q, Raw& r, Lane step) {
    const TensorEntry& t = *at.entry;
    const auto draws = formats.template draws<false>(at, row);
    if (q > 0) {
        formats.template store<false>(a.table, at, row, sM, q - 1, draws, q - 1, r.p_or_m);
        return;
    }
    formats.template store<false>(a.table, at, row, sV, 0, draws, kMomenta, r.v);
    if (a.into_out) {
        store(pointer<void>(a.table, t, sOut), kFloat32, at, row, step);
    } else {
        formats.template store_parameter<false>(a.table, at, row, r.p_or_m);
    }
}

// What a row adds to the first layer's sum of a unit, and its bias. `accumulator(d)`: of the row, for decay d.
template <class Accumulator>
HF_LOPT_DEVICE float bias_of_line(const Shared<kUnits>& s, Accumulator accumulator, int unit) {
    float bias = s.net.bias[unit];
#pragma unroll
    for (int d = 0; d < kFactored; d++) {
        const float y = accumulator(d), root = inverse_root_of_vector<Arithmetic>(y);
        bias += s.vectors.line[d][unit] * y + s.vectors.rsqrt_line[d][unit] * root;
    }
    return bias;
}

// Sums up what the lanes of the block have found. first: of what a lane updates; second: of v, in lane 0 of a group.
HF_LOPT_DEVICE void flush(const MomentSums<float>& first, const MomentSums<float>& second, float step2, int q,
                          double* out) {
    double sums[kUpdateStats] = {step2, q == 0 ? first.squares : 0.0f, second.sum, second.squares};
#pragma unroll
    for (int d = 0; d < kMomenta; d++) {
        sums[4 + 2 * d] = q == d + 1 ? first.sum : 0.0f;
        sums[5 + 2 * d] = q == d + 1 ? first.squares : 0.0f;
    }
    block_sums(sums, kUpdateStats, out);
}

// In shared memory.
template <class Formats>
struct ForFullTiles : Formats::ForTile {
    ComingRows<Formats::kRowsAhead> rows;
    OfLines factors, accumulators;
    float line_bias[kWarps][kUnits];  // of the row that a warp works on
};

// A full tile: what the other loop does, with places that are known when it begins.
template <Precision precision, class P, class G, class Args>
HF_LOPT_DEVICE void apply_full_on_tensor_cores(const Args& a, const Place& tile, const Shared<kUnits>& s,
                                               const Fragments<precision>& f, ForFullTiles<FormatsOf<Args>>& shared,
                                               double* out) {
    FullRows<FormatsOf<Args>::kRowsAhead, P, G, FormatsOf<Args>> rows(a, tile, full_tile(tile), shared.rows, shared);
    copy_lines(a.table, tile, sLineFactor, shared.factors);
    copy_lines(a.table, tile, sLine, shared.accumulators);
    rows.state.set_rows(tile);
    const int lane = thread() % kWarpSize, q = lane % 4, k = q > 0 ? q - 1 : 0, group = lane / 4;
    const float keep = a.constants.keep_m[k], add = a.constants.add_m[k], decay = s.net.decay;
    float* line_biases = shared.line_bias[tile.warp()];
    const float* along = s.factors[k] + group * kLane;
    MomentSums<float> first, second;  // of p_or_m and of v
    float step2 = 0.0f;
    barrier();
#pragma unroll 1
    for (int row = tile.warp(); rows.left > 0; row += kWarps) {
        auto& coming_row = rows.wait();
        warp_barrier();  // what other lanes have copied is there, too
        const float rho = shared.factors.row[row][k];
        line_biases[lane] = bias_of_line(s, [&](int d) { return shared.accumulators.row[row][d]; }, lane);
        warp_barrier();
        float line_bias[kBlocksOfUnits][2];
#pragma unroll
        for (int i = 0; i < 2 * kBlocksOfUnits; i++) line_bias[i / 2][i % 2] = line_biases[i / 2 * 8 + 2 * q + i % 2];
        const int64_t begin = rows.element + (group - lane) * kLane;
#pragma unroll 1
        for (int batch = 0; batch < kStrip / kBatchColumns; batch++) {
            const int first_column = batch * kBatchColumns + group * kLane;
            const int from = thread() / kWarpSize * kWarpSize + first_column / kLane;  // the thread that has copied it
            Raw r;
            r.g = load_four(coming<G>(coming_row.g, from));
            r.v = rows.state.second_moment(coming_row, from, row);
            r.p_or_m =
                q == 0 ? load_four(coming<P>(coming_row.p, from)) : rows.state.momentum(coming_row, k, from, row);
            Lane step, factor = load_four(along + batch * kBatchColumns) * rho;
#pragma unroll
            for (int e = 0; e < kLane; e += 2) {
                float x[2][4], direction[2], magnitude[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float g = clamp(r.g.x[e + i], a.constants.clip);
                    const float v = ema(r.v.x[e + i], g * g, a.constants.keep_v, a.constants.add_v);
                    const float root = inverse_root(v + a.constants.second_eps), p = r.p_or_m.x[e + i];
                    const float m = ema(p, g, keep, add);
                    x[i][0] = q == 0 ? g : m;
                    x[i][1] = q == 0 ? p : m * root;
                    x[i][2] = q == 0 ? v : g * factor.x[e + i];
                    x[i][3] = q == 0 ? root : m * factor.x[e + i];
                    r.v.x[e + i] = v;
                    if (q > 0) r.p_or_m.x[e + i] = m;
                }
                evaluate(
                    s, f, [&](int n, int i) { return line_bias[n][i]; }, [&](int i) { return first_column + i; }, e, x,
                    direction, magnitude);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    step.x[e + i] = direction[i] * exponential(magnitude[i]);
                    step2 = q == 0 ? fmaf(step.x[e + i], step.x[e + i], step2) : step2;
                }
            }
            const int64_t element = begin + batch * kBatchColumns;
            if (q > 0) {
                rows.state.store_momentum(k, element, row, first_column, r.p_or_m);
            } else {
                rows.state.store_second_moment(element, row, first_column, r.v);
                second.add(r.v);
                r.p_or_m = r.p_or_m - r.p_or_m * decay - step;
                rows.state.store_parameter(rows.p + element, row, first_column, r.p_or_m);
            }
            first.add(r.p_or_m);
        }
        warp_barrier();  // all lanes have read it
        rows.proceed(coming_row);
    }
    flush(first, second, step2, q, out);
}

template <Precision precision, class Args>
HF_LOPT_DEVICE void apply_on_tensor_cores(const Args& a, const Place& tile, const Shared<kUnits>& s,
                                          const Fragments<precision>& f, double* out) {
    const TensorEntry& t = *tile.entry;
    const FormatsOf<Args> formats(a, tile);
    const int q = thread() % 4, k = q > 0 ? q - 1 : 0;
    const float keep = a.constants.keep_m[k], add = a.constants.add_m[k];
    const float* along = s.factors[k];
    const float* line_factor = pointer<float>(a.table, t, sLineFactor) + k * t.line_decay;
    const float* line = pointer<float>(a.table, t, sLine);
    const int batches = (tile.width + kBatchColumns - 1) / kBatchColumns, turns = tile.turns();
    MomentSums<float> first, second;  // of p_or_m and of v
    float step2 = 0.0f;
    Raw next;
    if (turns > 0) next = load_raw(a, formats, batch_place(tile, 0), tile.row(0), q);
    for (int turn = 0; turn < turns; turn++) {
        const RowPlace row = tile.row(turn);
        const float rho = line_factor[row.line];
        float line_bias[kBlocksOfUnits][2];
#pragma unroll
        for (int i = 0; i < 2 * kBlocksOfUnits; i++) {
            const auto accumulator = [&](int d) { return line[d * t.line_decay + row.line]; };
            line_bias[i / 2][i % 2] = bias_of_line(s, accumulator, i / 2 * 8 + 2 * q + i % 2);
        }
#pragma unroll 1
        for (int batch = 0; batch < batches; batch++) {
            const Place at = batch_place(tile, batch);
            Raw r = next;
            // The next numbers are on their way while these are worked on.
            if (batch + 1 < batches) {
                next = load_raw(a, formats, batch_place(tile, batch + 1), row, q);
            } else if (turn + 1 < turns) {
                next = load_raw(a, formats, batch_place(tile, 0), tile.row(turn + 1), q);
            }
            Lane step;
            bool live[kLane];
#pragma unroll
            for (int e = 0; e < kLane; e += 2) {
                float x[2][4], direction[2], magnitude[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    live[e + i] = at.live(row, e + i);
                    const float g = clamp(r.g.x[e + i], a.constants.clip);
                    const float v = ema(r.v.x[e + i], g * g, a.constants.keep_v, a.constants.add_v);
                    const float root = inverse_root(v + a.constants.second_eps), p = r.p_or_m.x[e + i];
                    const float m = ema(p, g, keep, add);
                    const float factor = live[e + i] ? rho * along[at.column(e + i)] : 0.0f;
                    x[i][0] = q == 0 ? g : m;
                    x[i][1] = q == 0 ? p : m * root;
                    x[i][2] = q == 0 ? v : g * factor;
                    x[i][3] = q == 0 ? root : m * factor;
                    r.v.x[e + i] = v;
                    if (q > 0) r.p_or_m.x[e + i] = m;
                }
                evaluate(
                    s, f, [&](int n, int i) { return line_bias[n][i]; }, [&](int i) { return at.column(i); }, e, x,
                    direction, magnitude);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float p = r.p_or_m.x[e + i], y = direction[i] * exponential(magnitude[i]);
                    step.x[e + i] = y;
                    if (q == 0 && !a.into_out) r.p_or_m.x[e + i] = p - s.net.decay * p - y;
                    if (q == 0 && live[e + i]) step2 = fmaf(y, y, step2);
                }
            }
            store_raw(a, formats, at, row, q, r, step);
            first.add(r.p_or_m, live);
            if (q == 0) second.add(r.v, live);
        }
    }
    flush(first, second, step2, q, out);
}

// Rows that are not full.
template <Precision precision, class Args>
HF_LOPT_OUT_OF_LINE void apply_other_on_tensor_cores(const Args& a, const Shared<kUnits>& s,
                                                     const Fragments<precision>& f, double* out) {
    const Place at = same_place();
    apply_on_tensor_cores(a, at, s, f, out);
}

// A tile of either kernel.
template <Precision precision, class Args>
HF_LOPT_DEVICE void apply_tile_of_many(const Args& a, Shared<kUnits>& s, Fragments<precision>& f,
                                       ForFullTiles<FormatsOf<Args>>& shared) {
    apply_tile<kUnits>(a, s, [&](const Place& at, double* partial) {
        if (at.entry->inner > 1) {
            apply_elements<kUnits, kInner>(a, s, partial);
        } else if (at.entry->lanes < kWarpSize) {
            apply_elements<kUnits, kMatrix>(a, s, partial);
        } else {
            load_fragments(s, f);
            if (a.into_out || !with_types_of_full_tile(is_full(at), FormatsOf<Args>(a, at), at, [&](auto p, auto g) {
                    apply_full_on_tensor_cores<precision, decltype(p), decltype(g)>(a, at, s, f, shared, partial);
                })) {
                apply_other_on_tensor_cores(a, s, f, partial);
            }
        }
    });
}

}  // namespace hf_lopt
