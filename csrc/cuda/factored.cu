// Between pass 0 and pass 1: the factored accumulators and the factors formed from them.
//
// The rows of an embedding are too many for one block, and their factors need the mean of all of them. So the launch
// has two halves of as many blocks: the first makes the accumulators and adds up its part of the rows, the second
// waits for the sum and makes the factors of the rows. A block takes its number when it begins. So every block that
// waits does so for blocks that are running, and none waits for one that has no place to run.
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

// A block's part of a tensor, for one decay.
struct Chunk {
    const FactoredEntry* entry;
    int32_t tensor, k, number;
    float keep, add;

    HF_LOPT_MEMBER int64_t begin() const { return (int64_t)number * kFactoredChunk; }
    HF_LOPT_MEMBER int64_t end(int64_t length) const {
        return length < begin() + kFactoredChunk ? length : begin() + kFactoredChunk;
    }
    HF_LOPT_MEMBER float* at(const FactoredArgs& a, int slot, int64_t length) const {
        return reinterpret_cast<float*>(a.base[slot] + entry->at[slot]) + k * length;
    }
    HF_LOPT_MEMBER float updated(float old, float sum, float size) const {
        return ema(old, sum / size + kFactoredEps, keep, add);
    }
};

HF_LOPT_DEVICE Chunk chunk_of(const FactoredArgs& a, int32_t block) {
    int32_t low = 0, high = a.count;
    while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        if (a.entries[middle].first_block <= block) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const FactoredEntry& t = a.entries[low];
    const int32_t rest = block - t.first_block, k = rest / t.chunks;
    return {&t, low, k, rest % t.chunks, a.keep[k], a.add[k]};
}

HF_LOPT_DEVICE void update_columns(const FactoredArgs& a, const Chunk& c) {
    const FactoredEntry& t = *c.entry;
    const float *old = c.at(a, fCols, t.cols), *sums = c.at(a, fColSums, 0);
    float *cols = c.at(a, fNewCols, t.cols), *factors = c.at(a, fColFactors, t.cols);
    for (int64_t i = c.begin() + thread(); i < c.end(t.cols); i += kFactoredThreads) {
        const float x = c.updated(old[i], sums[i], t.col_size);
        cols[i] = x;
        factors[i] = factor(x);
    }
}

// Groups of rows with a mean each: a thread has whole groups.
HF_LOPT_DEVICE void update_groups(const FactoredArgs& a, const Chunk& c) {
    const FactoredEntry& t = *c.entry;
    const int64_t groups = t.outer * t.inner, length = groups * t.b;
    const float *old = c.at(a, fRows, length), *sums = c.at(a, fRowSums, 0), *means = c.at(a, fMeans, groups);
    float *rows = c.at(a, fNewRows, length), *factors = c.at(a, fRowFactors, length);
    for (int64_t group = c.begin() + thread(); group < c.end(groups); group += kFactoredThreads) {
        const int64_t first = group / t.inner * t.b * t.inner + group % t.inner;
        double sum = 0.0;
        for (int64_t i = 0; i < t.b; i++) {
            const int64_t j = first + i * t.inner;
            const float x = c.updated(old[j], sums[j], t.row_size);
            rows[j] = x;
            sum += x;
        }
        const float mean = t.means ? means[group] : (float)(sum / (double)t.b);
        for (int64_t i = 0; i < t.b; i++) {
            const int64_t j = first + i * t.inner;
            factors[j] = factor(rows[j] / (mean + kMeanEps));
        }
    }
}

// The block's part of the rows of a matrix, and of their sum.
HF_LOPT_DEVICE void update_rows(const FactoredArgs& a, const Chunk& c, int32_t block) {
    const FactoredEntry& t = *c.entry;
    const float *old = c.at(a, fRows, t.b), *sums = c.at(a, fRowSums, 0);
    float* rows = c.at(a, fNewRows, t.b);
    double sum = 0.0;
    for (int64_t i = c.begin() + thread(); i < c.end(t.b); i += kFactoredThreads) {
        const float x = c.updated(old[i], sums[i], t.row_size);
        rows[i] = x;
        sum += x;
    }
    const double total = sum_of_block(sum);
    if (thread() == 0) {
        a.partial[block] = total;
        fence();
        take_ticket(a.arrived + c.tensor * kFactored + c.k);
    }
}

HF_LOPT_DEVICE void finish_rows(const FactoredArgs& a, const Chunk& c) {
    const FactoredEntry& t = *c.entry;
    const float* rows = c.at(a, fNewRows, t.b);
    float* factors = c.at(a, fRowFactors, t.b);
    if (thread() == 0) wait_for_tickets(a.arrived + c.tensor * kFactored + c.k, (uint32_t)t.chunks);
    barrier();
    // In the order of the chunks.
    const double* partial = a.partial + t.first_block + c.k * t.chunks;
    double sum = 0.0;
    for (int i = 0; i < t.chunks; i++) sum += load_shared_result(partial + i);
    const float mean = t.means ? c.at(a, fMeans, 1)[0] : (float)(sum / (double)t.b);
    for (int64_t i = c.begin() + thread(); i < c.end(t.b); i += kFactoredThreads) {
        factors[i] = factor(load_shared_result(rows + i) / (mean + kMeanEps));
    }
}

HF_LOPT_KERNEL(kFactoredThreads, 4) update_factored_kernel(HF_LOPT_ARGUMENT FactoredArgs a) {
    HF_LOPT_SHARED int32_t number;
    if (thread() == 0) number = (int32_t)take_ticket(a.started);
    barrier();
    const bool first_half = number < a.blocks;
    const int32_t block = first_half ? number : number - a.blocks;
    const Chunk c = chunk_of(a, block);
    if (first_half) {
        update_columns(a, c);
        if (c.entry->one_mean()) {
            update_rows(a, c, block);
        } else {
            update_groups(a, c);
        }
    } else if (c.entry->one_mean()) {
        finish_rows(a, c);
    }
    barrier();
    if (thread() > 0) return;
    fence();
    if (take_ticket(a.done) < (uint32_t)(2 * a.blocks - 1)) return;
    // The last one: all counters are new again.
    *a.started = *a.done = 0;
    for (int i = 0; i < a.count * kFactored; i++) a.arrived[i] = 0;
}

}  // namespace

void launch_update_factored(const FactoredArgs& args, void* stream) {
    HF_LOPT_LAUNCH(update_factored_kernel, 2 * args.blocks, kFactoredThreads, stream, args);
}

}  // namespace hf_lopt
