// The decision about a step and the scheduler's inputs in one block; the LSTM, its heads and the mixture of networks
// in a block per tensor. Latency is what counts here, so a block has as many threads as there can be.
#include "scheduler.h"
#include "simt.h"

namespace hf_lopt {
namespace {

// ---- the run ------------------------------------------------------------------------------------------------------

HF_LOPT_DEVICE bool finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

HF_LOPT_DEVICE bool anything_bad(const AdvanceArgs& a) {
    HF_LOPT_SHARED bool found[kManyThreads / kWarpSize];
    int bad = thread() == 0 && ((a.bad && *a.bad) || (a.loss && !finite(*a.loss)));
    for (int l = 0; l < a.stat_lists; l++) {
        for (int64_t i = thread(); i < a.stat_rows[l]; i += kManyThreads) bad |= a.stats[l][i * a.stat_width[l]] > 0.0;
    }
    for (int l = 0; l < a.sum_lists; l++) {
        for (int64_t i = thread(); i < a.sum_count[l]; i += kManyThreads) bad |= !finite(a.sums[l][i]);
    }
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) bad |= shuffle_xor(bad, mask);
    if (thread() % kWarpSize == 0) found[thread() / kWarpSize] = bad;
    barrier();
    bool any = false;
    for (bool of_warp : found) any |= of_warp;
    return any;
}

// The loss buffer and the loss features; see `next_loss_buffer` in Python. For one thread.
HF_LOPT_DEVICE void update_loss_buffer(const AdvanceArgs& a, const double* correction, int64_t step, bool skip,
                                       float* features) {
    double loss = *a.loss, largest = loss;
    for (int i = 0; i < kLossDecays && step > 0; i++) {
        const double mean = a.loss_means[i] / correction[i];
        if (i == 0 || mean > largest || mean != mean) largest = mean;
    }
    if (largest != 0.0 && loss > 2.0 * fabs(largest)) loss = 2.0 * fabs(largest);
    double corrected[kLossDecays], minimum[kLossDecays];
    for (int i = 0; i < kLossDecays; i++) {
        const double next = a.loss_decay[i] * a.loss_means[i] + (1.0 - a.loss_decay[i]) * loss;
        const double mean = step > 0 && a.loss_min[i] >= kLossMinStart ? correction[i] * loss : next;
        corrected[i] = mean / correction[i];
        minimum[i] = a.loss_min[i] < corrected[i] ? a.loss_min[i] : corrected[i];
        if (skip) continue;
        a.loss_means[i] = (float)mean;
        a.loss_min[i] = (float)minimum[i];
    }
    for (int i = 0; i < kLossFeatures; i++) {
        const double slower = corrected[i + 1] - minimum[i];
        const double slope = (corrected[i] - minimum[i]) / (slower > 1e-8 ? slower : 1e-8) - 1.0;
        features[i] = step + 1 > 2 ? (float)(slope > 1.0 ? 1.0 : slope < -1.0 ? -1.0 : slope) : 0.0f;
    }
}

HF_LOPT_DEVICE float log_magnitude(double x) {
    const double y = log(1e-8 + fabs(10.0 * x));
    return (float)(0.5 * (y > 5.0 ? 5.0 : y < -5.0 ? -5.0 : y));
}

// One of VeLO's features of tensor t: L(mean v), ranks, L(var m), L(var v).
HF_LOPT_DEVICE float tensor_feature(const AdvanceArgs& a, int64_t t, int i) {
    if (i >= 1 && i <= kRanks) return a.ranks[t * kRanks + i - 1];
    const double numel = a.numel[t], mean_p2 = a.totals[t * a.totals_width + a.p_column] / numel;
    const double square = 1.0 / (mean_p2 > 1e-9 ? mean_p2 : 1e-9);
    // After the three statistics of gradient and parameter: (Σv, Σv²), then (Σm, Σm²) for each momentum.
    const double* pairs = a.moments + t * a.moments_width + 3;
    const double v = pairs[0] / numel, v2 = pairs[1] / numel;
    if (i == 0) return log_magnitude(sqrt(square) * v);
    const int k = (i - 1 - kRanks) % kMomenta;
    const double m = pairs[2 + 2 * k] / numel, m2 = pairs[3 + 2 * k] / numel;
    return log_magnitude(square * (i - 1 - kRanks < kMomenta ? m2 - m * m : v2 - 2.0 * m * v + m * m));
}

HF_LOPT_KERNEL(kManyThreads, 1) advance_kernel(HF_LOPT_ARGUMENT AdvanceArgs a) {
    HF_LOPT_SHARED double correction[kLossDecays];
    HF_LOPT_SHARED float features[kRunFeatures];
    const bool skip = anything_bad(a);
    const int64_t step = a.counters[0];
    const int i = thread();
    if (i < kTimes) {
        const float fractions[kTimes] = {0.03f, 0.1f, 0.2f, 0.4f, 0.6f, 0.8f, 0.9f, 1.0f, 1.1f};
        features[i] = a.horizon > 0.0f ? tanhf(10.0f * ((float)step / a.horizon - fractions[i])) : 0.0f;
    } else if (i < kTimes + kLossFeatures) {
        features[i] = 0.0f;
    } else if (i < kRunFeatures) {
        const float scales[kSteps] = {1.0f,    3.0f,    10.0f,    30.0f,    100.0f,   300.0f,
                                      1000.0f, 3000.0f, 10000.0f, 30000.0f, 100000.0f};
        features[i] = tanhf((float)step / scales[i - kShared] - 1.0f);
    } else if (i >= 2 * kWarpSize && i < 2 * kWarpSize + a.corrections) {
        const double decay = a.corrected[i - 2 * kWarpSize];
        a.features[kRunFeatures + i - 2 * kWarpSize] = (float)(1.0 / (1.0 - pow(decay, (double)(step + 1))));
    } else if (i >= 3 * kWarpSize && i < 3 * kWarpSize + kLossDecays && a.loss_means) {
        correction[i - 3 * kWarpSize] = 1.0 - pow(a.loss_decay[i - 3 * kWarpSize], (double)(step + 1));
    }
    barrier();
    if (i == 0) {
        if (a.loss_means) update_loss_buffer(a, correction, step, skip, features + kTimes);
        *a.skip = skip;
        a.counters[0] = step + !skip;
        a.counters[1] += skip;
        a.counters[2] = skip ? a.counters[2] + 1 : 0;
    }
    barrier();
    if (i < kRunFeatures) a.features[i] = features[i];
    const int width = kShared + (a.moments ? kTensorInputs : 0);
    for (int64_t j = i; j < (int64_t)a.rows * width; j += kManyThreads) {
        const int column = (int)(j % width);
        a.inputs[j] = column < kShared ? features[column] : tensor_feature(a, j / width, column - kShared);
    }
}

// ---- the scheduler ------------------------------------------------------------------------------------------------

HF_LOPT_KERNEL(kThreads, 2) pool_kernel(HF_LOPT_ARGUMENT PoolArgs a) {
    constexpr int kRows = kThreads / kPoolColumns;
    HF_LOPT_SHARED float pooled[kRows][kPoolColumns];
    const int c = thread() % kPoolColumns, r = thread() / kPoolColumns, unit = block() * kPoolColumns + c;
    const bool live = unit < a.units;
    float largest = 0.0f;
    for (int64_t t = r; t < a.rows && live; t += kRows) {
        const float x = a.mixed[t * 2 * a.units + unit];
        if (x > largest || x != x) largest = x;
    }
    pooled[r][c] = largest;
    barrier();
    for (int i = 0; i < kRows; i++) {
        const float x = pooled[i][c];
        if (x > largest || x != x) largest = x;
    }
    for (int64_t t = r; t < a.rows && live; t += kRows) {
        float* out = a.out + t * 2 * a.units;
        out[unit] = a.mixed[t * 2 * a.units + a.units + unit] + largest;
        out[a.units + unit] = reinterpret_cast<const float*>(a.base + a.entries[t].hidden)[unit];
    }
}

HF_LOPT_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// out[j] = Σ_i x[i] w[i][j] for j < count, by all threads: several share a column where there are few.
HF_LOPT_DEVICE void multiply(const float* x, const float* w, int length, int count, float* partial, float* out) {
    const int shares = count < kManyThreads ? kManyThreads / count : 1;
    for (int first = 0; first < count; first += kManyThreads) {
        const int share = thread() / count, j = shares > 1 ? thread() % count : first + thread();
        float sum = 0.0f;
        if (shares > 1 ? share < shares : j < count) {
#pragma unroll 8
            for (int i = shares > 1 ? share : 0; i < length; i += shares)
                sum = fmaf(x[i], w[(int64_t)i * count + j], sum);
        }
        partial[thread()] = sum;
        barrier();
        if (thread() < count - first) {
            float total = 0.0f;
            for (int s = 0; s < shares; s++) total += partial[s * count + thread()];
            out[first + thread()] = total;
        }
        barrier();
    }
}

HF_LOPT_KERNEL(kManyThreads, 1) lstm_kernel(HF_LOPT_ARGUMENT LstmArgs a) {
    HF_LOPT_SHARED float hidden[kMaxHidden], heads[kMaxHeads], partial[kManyThreads];
    const int64_t t = block();
    const bool skip = *a.skip;
    const float* gates = a.gates + t * 4 * a.units;
    float* hidden_state = reinterpret_cast<float*>(a.hidden_base + a.entries[t].hidden);
    float* cell_state = reinterpret_cast<float*>(a.cell_base + a.entries[t].cell);
    for (int u = thread(); u < a.units; u += kManyThreads) {
        const float i = gates[u], g = gates[a.units + u], f = gates[2 * a.units + u], o = gates[3 * a.units + u];
        const float cell = sigmoid(f + 1.0f) * cell_state[u] + sigmoid(i) * tanhf(g);
        hidden[u] = sigmoid(o) * tanhf(cell);
        if (skip) continue;
        cell_state[u] = cell;
        hidden_state[u] = hidden[u];
    }
    barrier();
    const int count = a.controls_count;
    multiply(hidden, a.heads, a.units, count + 1, partial, heads);
    for (int j = thread(); j <= count; j += kManyThreads) heads[j] += a.heads_bias[j];
    barrier();
    if (thread() == 0) a.lr_mult[t] = a.celo ? 0.1f * expf(heads[count]) : heads[count];
    for (int j = thread(); j < count; j += kManyThreads) a.controls[t * count + j] = heads[j];
    if (count == 0) return;
    if (a.celo) {
        float largest = heads[0], sum = 0.0f;
        for (int j = 1; j < count; j++) largest = heads[j] > largest ? heads[j] : largest;
        for (int j = 0; j < count; j++) sum += expf(heads[j] - largest);
        barrier();
        for (int j = thread(); j < count; j += kManyThreads) heads[j] = expf(heads[j] - largest) / sum;
        barrier();
    }
    // In pieces, because the results of a piece go through the block's memory.
    float* networks = a.networks + t * a.weights;
    multiply(heads, a.bank, count, a.weights, partial, networks);
}

// ---- the networks -------------------------------------------------------------------------------------------------

HF_LOPT_KERNEL(kThreads, 2) specialize_kernel(HF_LOPT_ARGUMENT SpecializeArgs a) {
    const int64_t t = block();
    const double numel = a.numel[t];
    const double* sums = a.sums + t * a.sums_width;
    if (thread() == 0) {
        const float lr = a.lr(t);
        float scale = lr;
        for (int i = 0; i < a.factors_count; i++) scale *= a.factors[i](t);
        if (a.has_floor) {
            const float rms = (float)sqrt(sums[a.p_column] / numel + 1e-9), floor = a.floor(t);
            scale *= rms > floor || rms != rms ? rms : floor;
        }
        a.scale[t] = scale * a.step_mult;
        a.decay[t] = lr * a.weight_decay(t);
    }
    const float* network = a.networks + t * a.row;
    float* out = a.out + t * a.out_row;
    for (int layer = 0; layer < a.layers; layer++) {
        const bool first = layer == 0, last = layer == a.layers - 1;
        const int n_in = a.sizes[layer], n_out = a.sizes[layer + 1], kept_out = last ? a.outputs : n_out;
        const int kept_in = first ? n_in - a.constants_count : n_in;
        const float* bias = network + n_in * n_out;
        for (int i = thread(); i < kept_in * kept_out; i += kThreads) {
            const int row = i / kept_out;
            float w = network[row * n_out + i % kept_out];
            if (first) w *= (float)(1.0 / sqrt(sums[row] / numel + a.norm_eps));
            out[i] = w;
        }
        for (int j = thread(); j < kept_out; j += kThreads) {
            float b = bias[j];
            for (int c = 0; first && c < a.constants_count; c++) {
                b = fmaf(a.constants[t * a.constants_row + c], network[(kept_in + c) * n_out + j], b);
            }
            out[kept_in * kept_out + j] = b;
        }
        network = bias + n_out;
        out += (kept_in + 1) * kept_out;
    }
}

}  // namespace

void launch_advance(const AdvanceArgs& args, void* stream) {
    HF_LOPT_LAUNCH(advance_kernel, 1, kManyThreads, stream, args);
}
void launch_pool(const PoolArgs& args, void* stream) {
    HF_LOPT_LAUNCH(pool_kernel, (args.units + kPoolColumns - 1) / kPoolColumns, kThreads, stream, args);
}
void launch_lstm(const LstmArgs& args, int rows, void* stream) {
    HF_LOPT_LAUNCH(lstm_kernel, rows, kManyThreads, stream, args);
}
void launch_specialize(const SpecializeArgs& args, int rows, void* stream) {
    HF_LOPT_LAUNCH(specialize_kernel, rows, kThreads, stream, args);
}

}  // namespace hf_lopt
