// Between the first and the second pass: row and column accumulators and their factors. Small vectors, a tensor to a
// task.
#include <algorithm>
#include <vector>

#include "operands.h"

namespace hf_lopt {

namespace {

// 1/sqrt(max(R / (mean_B(R) + 1e-9), 1e-9)); `total` is ΣR, `means` may give mean_B(R).
void row_factors(const float* row, const RowAccumulator& s, double total, const float* means, float* out) {
    const bool whole = !means && s.outer == 1 && s.inner == 1;
    if (whole) return kernels().factors(row, s.b, (float)(total / (double)s.b) + kFactorEps, out);
    if (!means && s.inner == 1) {  // a stack, each with a mean of its own
        for (int64_t o = 0; o < s.outer; o++, row += s.b, out += s.b) {
            double sum = 0.0;
            for (int64_t b = 0; b < s.b; b++) sum += row[b];
            kernels().factors(row, s.b, (float)(sum / (double)s.b) + kFactorEps, out);
        }
        return;
    }
    std::vector<float> mean(s.inner), divided(s.inner);
    for (int64_t o = 0; o < s.outer; o++, row += s.b * s.inner, out += s.b * s.inner) {
        for (int64_t i = 0; i < s.inner; i++) {
            double sum = 0.0;
            if (!means) {
                for (int64_t b = 0; b < s.b; b++) sum += row[b * s.inner + i];
            }
            mean[i] = (means ? means[o * s.inner + i] : (float)(sum / (double)s.b)) + kFactorEps;
        }
        for (int64_t b = 0; b < s.b; b++) {
            for (int64_t i = 0; i < s.inner; i++) divided[i] = row[b * s.inner + i] / mean[i];
            kernels().factors(divided.data(), s.inner, 1.0f, out + b * s.inner);
        }
    }
}

}  // namespace

std::tuple<Tensors, Tensors, Tensors, Tensors> update_factored(Tensors rows, Tensors cols, Tensors row_sums,
                                                               Tensors col_sums, Tensors row_means, Ints row_sizes,
                                                               Ints col_sizes, Ints row_axes, Ints col_axes,
                                                               Floats decays) {
    std::vector<RowAccumulator> row_accumulators;
    check_update_factored(rows, cols, row_sums, col_sums, row_means, row_sizes, col_sizes, row_axes, col_axes, decays,
                          &row_accumulators);
    const size_t count = rows.size();
    const int64_t depth = (int64_t)decays.size();
    std::vector<float> keeps(depth), adds(depth);
    set_decays(decays, keeps.data(), adds.data());
    ResultPieces results(4 * count);  // of each tensor the new row and column accumulators and their factors
    for (size_t t = 0; t < count; t++) {
        const bool factored = row_axes[t] >= 0;
        if (factored) {
            for (Tensors* list : {&rows, &cols, &row_sums, &col_sums, &row_means}) {
                if (!(*list)[t].is_contiguous()) (*list)[t] = torch::stable::contiguous((*list)[t]);
            }
        }
        for (int i = 0; i < 4; i++) {
            if (factored) {
                results.add_like(i % 2 ? cols[t] : rows[t]);
            } else {
                results.add_empty();
            }
        }
    }
    results.allocate(row_sums[0]);
    torch::stable::parallel_for(0, (int64_t)count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            if (row_axes[t] < 0) continue;
            const RowAccumulator& shape = row_accumulators[t];
            const int64_t n = row_sums[t].numel(), m = col_sums[t].numel();
            const bool given = row_means[t].numel() > 0;
            const float *old_row = float_data(rows[t]), *old_col = float_data(cols[t]);
            const float *row_sum = float_data(row_sums[t]), *col_sum = float_data(col_sums[t]);
            for (int64_t d = 0; d < depth; d++) {
                const float keep = keeps[d], add = adds[d];
                float *row = results.data(4 * t) + d * n, *col = results.data(4 * t + 1) + d * m;
                const double total =
                    kernels().ema_of_means(old_row + d * n, row_sum, n, (float)row_sizes[t], keep, add, row);
                kernels().ema_of_means(old_col + d * m, col_sum, m, (float)col_sizes[t], keep, add, col);
                const float* means = given ? float_data(row_means[t]) + d * shape.outer * shape.inner : nullptr;
                row_factors(row, shape, total, means, results.data(4 * t + 2) + d * n);
                kernels().factors(col, m, 1.0f, results.data(4 * t + 3) + d * m);
            }
        }
    });
    return {results.take(0, 4), results.take(1, 4), results.take(2, 4), results.take(3, 4)};
}

}  // namespace hf_lopt
