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
#pragma once

#include "apply.cuh"

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

// The right-hand sides of both layers as a lane of the warp wants them: high b0, b1, low b0, b1.
struct Fragments {
    Word4 first[kBlocksOfUnits][kWarpSize];
    Word4 second[kUnits / kDepth][kBlocksOfUnits][kWarpSize];
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

HF_LOPT_DEVICE void load_fragments(const Network<kUnits>& w, Fragments& f) {
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

HF_LOPT_DEVICE Raw load_raw(const ApplyArgs& a, const Place& at, const RowPlace& row, int q) {
    const TensorEntry& t = *at.entry;
    Raw r;
    r.g = load(pointer<void>(a.table, t, sG), t.g_type, at, row);
    r.v = load(pointer<float>(a.table, t, sV), kFloat32, at, row);
    const float* m = pointer<float>(a.table, t, sM) + (q - 1) * t.decay;
    r.p_or_m = q == 0 ? load(pointer<void>(a.table, t, sP), t.p_type, at, row) : load(m, kFloat32, at, row);
    return r;
}

// The outputs for elements e and e + 1 of every group, in all lanes of the group. x: the lane's features of both.
HF_LOPT_DEVICE void evaluate(const Shared<kUnits>& s, const Fragments& f, const float (&line_bias)[kBlocksOfUnits][2],
                             const Place& at, int e, const float (&x)[2][4], float (&direction)[2],
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
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float* bias = s.bias(at.column(e + r), n * 8 + 2 * q);
            z[2 * r] = line_bias[n][0] + bias[0];
            z[2 * r + 1] = line_bias[n][1] + bias[1];
        }
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

// Lanes 1 to 3 of a group store their momentum; lane 0 the second moment and the parameter or the step.
HF_LOPT_DEVICE void store_raw(const ApplyArgs& a, const Place& at, const RowPlace& row, int q, Raw& r, Lane step) {
    const TensorEntry& t = *at.entry;
    if (q > 0) {
        store(pointer<float>(a.table, t, sM) + (q - 1) * t.decay, kFloat32, at, row, r.p_or_m);
        return;
    }
    store(pointer<float>(a.table, t, sV), kFloat32, at, row, r.v);
    if (a.into_out) {
        store(pointer<void>(a.table, t, sOut), kFloat32, at, row, step);
    } else {
        store(pointer<void>(a.table, t, sP), t.p_type, at, row, r.p_or_m);
    }
}

HF_LOPT_DEVICE void apply_on_tensor_cores(const ApplyArgs& a, const Place& tile, const Shared<kUnits>& s,
                                          const Fragments& f, double* out) {
    const TensorEntry& t = *tile.entry;
    const int q = thread() % 4, k = q > 0 ? q - 1 : 0;
    const float keep = a.constants.keep_m[k], add = a.constants.add_m[k];
    const float* along = s.factors[k];
    const float* line_factor = pointer<float>(a.table, t, sLineFactor) + k * t.line_decay;
    const float* line = pointer<float>(a.table, t, sLine);
    const int batches = (tile.width + kBatchColumns - 1) / kBatchColumns, turns = tile.turns();
    MomentSums<float> first, second;  // of p_or_m and of v
    float step2 = 0.0f;
    Raw next;
    if (turns > 0) next = load_raw(a, batch_place(tile, 0), tile.row(0), q);
    for (int turn = 0; turn < turns; turn++) {
        const RowPlace row = tile.row(turn);
        const float rho = line_factor[row.line];
        float line_bias[kBlocksOfUnits][2];
#pragma unroll
        for (int i = 0; i < 2 * kBlocksOfUnits; i++) {
            line_bias[i / 2][i % 2] = s.net.bias[i / 2 * 8 + 2 * q + i % 2];
        }
#pragma unroll
        for (int d = 0; d < kFactored; d++) {
            const float y = line[d * t.line_decay + row.line], root = inverse_root_of_vector<Arithmetic>(y);
#pragma unroll
            for (int i = 0; i < 2 * kBlocksOfUnits; i++) {
                const int unit = i / 2 * 8 + 2 * q + i % 2;
                line_bias[i / 2][i % 2] += s.vectors.line[d][unit] * y + s.vectors.rsqrt_line[d][unit] * root;
            }
        }
#pragma unroll 1
        for (int batch = 0; batch < batches; batch++) {
            const Place at = batch_place(tile, batch);
            Raw r = next;
            // The next numbers are on their way while these are worked on.
            if (batch + 1 < batches) {
                next = load_raw(a, batch_place(tile, batch + 1), row, q);
            } else if (turn + 1 < turns) {
                next = load_raw(a, batch_place(tile, 0), tile.row(turn + 1), q);
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
                evaluate(s, f, line_bias, at, e, x, direction, magnitude);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float p = r.p_or_m.x[e + i], y = direction[i] * exponential(magnitude[i]);
                    step.x[e + i] = y;
                    if (q == 0 && !a.into_out) r.p_or_m.x[e + i] = p - s.net.decay * p - y;
                    if (q == 0 && live[e + i]) step2 = fmaf(y, y, step2);
                }
            }
            store_raw(a, at, row, q, r, step);
            first.add(r.p_or_m, live);
            if (q == 0) second.add(r.v, live);
        }
    }
    double sums[kUpdateStats] = {step2, q == 0 ? first.squares : 0.0f, second.sum, second.squares};
#pragma unroll
    for (int d = 0; d < kMomenta; d++) {
        sums[4 + 2 * d] = q == d + 1 ? first.sum : 0.0f;
        sums[5 + 2 * d] = q == d + 1 ? first.squares : 0.0f;
    }
    block_sums(sums, kUpdateStats, out);
}

}  // namespace hf_lopt
