// Between pass 0 and pass 1: the factored accumulators and the factors formed from them, a block for each tensor and
// decay.
#include "simt.h"
#include "tensor_table.h"

namespace hf_lopt {
namespace {

constexpr float kMeanEps = 1e-9f;  // added to the mean of the row accumulator, and its lower bounds

HF_LOPT_DEVICE float factor(float x) { return inverse_root(x > kFactorEps ? x : x == x ? kFactorEps : x); }

// The sum of x over all threads of the block, in every one.
HF_LOPT_DEVICE double sum_of_block(double x) {
    HF_LOPT_SHARED double sums[kFactoredThreads / kWarpSize];
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    if (thread() % kWarpSize == 0) sums[thread() / kWarpSize] = x;
    barrier();
    double total = 0.0;
    for (int w = 0; w < kFactoredThreads / kWarpSize; w++) total += sums[w];
    barrier();
    return total;
}

HF_LOPT_KERNEL(kFactoredThreads, 1) update_factored_kernel(HF_LOPT_ARGUMENT FactoredArgs a) {
    const FactoredEntry& t = a.entries[block() / kFactored];
    const int k = block() % kFactored;
    const float keep = a.keep[k], add = a.add[k];
    const auto at = [&](int slot, int64_t length) {
        return reinterpret_cast<float*>(a.base[slot] + t.at[slot]) + k * length;
    };
    const auto updated = [&](float old, float sum, float size) {
        return ema(old, sum / size + kFactoredEps, keep, add);
    };

    const float *old_cols = at(fCols, t.cols), *col_sums = at(fColSums, 0);
    float *cols = at(fNewCols, t.cols), *col_factors = at(fColFactors, t.cols);
    for (int64_t i = thread(); i < t.cols; i += kFactoredThreads) {
        const float x = updated(old_cols[i], col_sums[i], t.col_size);
        cols[i] = x;
        col_factors[i] = factor(x);
    }

    const int64_t groups = t.outer * t.inner, length = groups * t.b;
    const float *old_rows = at(fRows, length), *row_sums = at(fRowSums, 0), *means = at(fMeans, groups);
    float *rows = at(fNewRows, length), *row_factors = at(fRowFactors, length);
    if (groups == 1) {
        // One mean for all rows of a matrix: found by the whole block.
        double sum = 0.0;
        for (int64_t i = thread(); i < length; i += kFactoredThreads) {
            const float x = updated(old_rows[i], row_sums[i], t.row_size);
            rows[i] = x;
            sum += x;
        }
        const float mean = t.means ? means[0] : (float)(sum_of_block(sum) / (double)t.b);
        // Every thread reads what it has written itself.
        for (int64_t i = thread(); i < length; i += kFactoredThreads)
            row_factors[i] = factor(rows[i] / (mean + kMeanEps));
        return;
    }
    for (int64_t group = thread(); group < groups; group += kFactoredThreads) {
        const int64_t first = group / t.inner * t.b * t.inner + group % t.inner;
        double sum = 0.0;
        for (int64_t i = 0; i < t.b; i++) {
            const int64_t j = first + i * t.inner;
            const float x = updated(old_rows[j], row_sums[j], t.row_size);
            rows[j] = x;
            sum += x;
        }
        const float mean = t.means ? means[group] : (float)(sum / (double)t.b);
        for (int64_t i = 0; i < t.b; i++) {
            const int64_t j = first + i * t.inner;
            row_factors[j] = factor(rows[j] / (mean + kMeanEps));
        }
    }
}

}  // namespace

void launch_update_factored(const FactoredArgs& args, int tensors, void* stream) {
    HF_LOPT_LAUNCH(update_factored_kernel, tensors * kFactored, kFactoredThreads, stream, args);
}

}  // namespace hf_lopt
