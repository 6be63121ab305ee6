// Newton-Schulz iterations on batches of small matrices, each of which stays in the cache of one core.
#include "orthogonalize.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "operands.h"

namespace hf_lopt {

namespace {

constexpr int64_t kBlock = 16;

// out[j * out_stride + i] = x[i * x_stride + j], in blocks that stay in the first cache.
void transpose(const float* x, int64_t rows, int64_t columns, int64_t x_stride, float* out, int64_t out_stride) {
    for (int64_t i0 = 0; i0 < rows; i0 += kBlock) {
        for (int64_t j = 0; j < columns; j++) {
            for (int64_t i = i0; i < std::min(rows, i0 + kBlock); i++) out[j * out_stride + i] = x[i * x_stride + j];
        }
    }
}

}  // namespace

std::tuple<Tensor, Tensor> orthogonalize(Tensor x, torch::headeronly::ScalarType dtype, Floats coefficients,
                                         int64_t steps, double eps, std::optional<double> norm_eps) {
    STD_TORCH_CHECK(x.dim() >= 2, "there must be matrices, got a tensor of rank ", x.dim());
    const TensorChecks check(x);
    check.type(x, ScalarType::Float, "x");
    STD_TORCH_CHECK(dtype == torch::headeronly::ScalarType::Float, "the fused kernel iterates in float32");
    STD_TORCH_CHECK(coefficients.size() == 3, "there must be three coefficients, got ", coefficients.size());
    x = torch::stable::contiguous(x);
    Tensor result = torch::stable::empty_like(x);
    const int64_t r = x.size(x.dim() - 2), c = x.size(x.dim() - 1);
    std::vector<int64_t> batch;
    for (int64_t axis = 0; axis + 2 < x.dim(); axis++) batch.push_back(x.size(axis));
    Tensor mean_squares = torch::stable::new_zeros(x, batch);
    if (x.numel() == 0) return {result, mean_squares};
    float* found = float_data(mean_squares);
    const float* in = float_data(x);
    float* out = float_data(result);
    const bool wide = c > r;
    const int64_t rows = wide ? c : r, columns = wide ? r : c;
    const int64_t stride = (columns + kMatrixPad - 1) / kMatrixPad * kMatrixPad;
    const NewtonSchulz constants{
        (float)coefficients[0], (float)coefficients[1], (float)coefficients[2], (int)steps, eps,
        norm_eps.value_or(-1.0)};
    const int64_t work = 2 * (rows + columns) * stride;
    torch::stable::parallel_for(0, x.numel() / (r * c), 1, [&](int64_t begin, int64_t end) {
        std::unique_ptr<float[]> memory(new float[work]);
        for (int64_t i = begin; i < end; i++) {
            const float* from = in + i * r * c;
            float *y = memory.get(), *to = out + i * r * c;
            // Anew for each: what is not finite spreads to the padding, too.
            for (int64_t k = 0; k < rows; k++) std::fill(y + k * stride + columns, y + (k + 1) * stride, 0.0f);
            if (wide) {
                transpose(from, r, c, c, y, stride);
            } else {
                for (int64_t k = 0; k < rows; k++) std::memcpy(y + k * stride, from + k * c, c * sizeof(float));
            }
            const float* z =
                kernels().newton_schulz(y, y + rows * stride, rows, columns, stride, constants, found + i);
            if (wide) {
                transpose(z, c, r, stride, to, c);
            } else {
                for (int64_t k = 0; k < rows; k++) std::memcpy(to + k * c, z + k * stride, c * sizeof(float));
            }
        }
    });
    return {result, mean_squares};
}

}  // namespace hf_lopt
