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

Ints shape_of(const Tensor& x) {
    Ints shape;
    for (int64_t i = 0; i < x.dim(); i++) shape.push_back(x.size(i));
    return shape;
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
    ResultPieces results;  // of each tensor the new row and column accumulators and their factors
    std::vector<float*> data[4];
    for (size_t t = 0; t < count; t++) {
        const bool factored = row_axes[t] >= 0;
        if (factored) {
            for (Tensors* list : {&rows, &cols, &row_sums, &col_sums, &row_means}) {
                if (!(*list)[t].is_contiguous()) (*list)[t] = torch::stable::contiguous((*list)[t]);
            }
        }
        for (int i = 0; i < 4; i++) results.add(factored ? shape_of(i % 2 ? cols[t] : rows[t]) : Ints{0});
    }
    results.allocate(row_sums[0]);
    Tensors out[4];
    for (size_t k = 0; k < 4 * count; k++) {
        out[k % 4].push_back(results.tensor(k));
        data[k % 4].push_back(results.data(k));
    }
    torch::stable::parallel_for(0, (int64_t)count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            if (row_axes[t] < 0) continue;
            const RowAccumulator& shape = row_accumulators[t];
            const int64_t n = row_sums[t].numel(), m = col_sums[t].numel();
            const bool given = row_means[t].numel() > 0;
            for (int64_t d = 0; d < depth; d++) {
                const float keep = keeps[d], add = adds[d];
                float *row = data[0][t] + d * n, *col = data[1][t] + d * m;
                const double total = kernels().ema_of_means(float_data(rows[t]) + d * n, float_data(row_sums[t]), n,
                                                            (float)row_sizes[t], keep, add, row);
                kernels().ema_of_means(float_data(cols[t]) + d * m, float_data(col_sums[t]), m, (float)col_sizes[t],
                                       keep, add, col);
                const float* means = given ? float_data(row_means[t]) + d * shape.outer * shape.inner : nullptr;
                row_factors(row, shape, total, means, data[2][t] + d * n);
                kernels().factors(col, m, 1.0f, data[3][t] + d * m);
            }
        }
    });
    return {std::move(out[0]), std::move(out[1]), std::move(out[2]), std::move(out[3])};
}

}  // namespace hf_lopt
