// Products of small matrices, for the instruction set that the including file is compiled for. Internal linkage.
//
// Matrices are row-major with a stride that is a multiple of kMatrixPad; the columns that pad them are zero, and stay
// so.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace hf_lopt {
namespace {

static_assert(kMatrixPad % kWidth == 0, "a row is a whole number of vectors");

// Rows and vectors of a tile that is held in registers.
constexpr int kProductRows = kRegisters == 32 ? 8 : 4, kProductVectors = 2;

// I rows by J vectors of the product. Element (i, k) of the left matrix is left[i * stride + k] or, transposed,
// left[k * stride + i]; `right` points to the first column of the tile.
template <int I, int J, bool kTransposed>
HF_LOPT_INLINE void product_tile(const float* left, const float* right, int64_t stride, int64_t depth,
                                 vf (&sum)[I][J]) {
    for (int i = 0; i < I; i++) {
        for (int j = 0; j < J; j++) sum[i][j] = splat(0.0f);
    }
    for (int64_t k = 0; k < depth; k++) {
        vf x[J];
        for (int j = 0; j < J; j++) x[j] = load(right + k * stride + j * kWidth);
#pragma GCC unroll 8
        for (int i = 0; i < I; i++) {
            const float y = kTransposed ? left[k * stride + i] : left[i * stride + k];
#pragma GCC unroll 2
            for (int j = 0; j < J; j++) sum[i][j] = x[j] * y + sum[i][j];
        }
    }
}

// out = b * left @ right + a * base, `rows` by `stride`; base may be null.
struct Product {
    const float *left, *right, *base;
    float* out;
    int64_t rows, depth, stride;
    float a, b;
};

template <int I, int J, bool kTransposed>
HF_LOPT_INLINE void product_at(const Product& x, int64_t row, int64_t column) {
    vf sum[I][J];
    const float* left = x.left + (kTransposed ? row : row * x.stride);
    product_tile<I, J, kTransposed>(left, x.right + column, x.stride, x.depth, sum);
    for (int i = 0; i < I; i++) {
        for (int j = 0; j < J; j++) {
            const int64_t place = (row + i) * x.stride + column + j * kWidth;
            store(x.out + place, x.base ? sum[i][j] * x.b + load(x.base + place) * x.a : sum[i][j]);
        }
    }
}

template <int J, bool kTransposed>
HF_LOPT_INLINE void product_columns(const Product& x, int64_t column) {
    int64_t row = 0;
    for (; row + kProductRows <= x.rows; row += kProductRows) product_at<kProductRows, J, kTransposed>(x, row, column);
    if (kProductRows > 4 && row + 4 <= x.rows) {
        product_at<4, J, kTransposed>(x, row, column);
        row += 4;
    }
    if (row + 2 <= x.rows) {
        product_at<2, J, kTransposed>(x, row, column);
        row += 2;
    }
    if (row < x.rows) product_at<1, J, kTransposed>(x, row, column);
}

template <bool kTransposed>
void product(const Product& x) {
    int64_t column = 0;
    for (; column + kProductVectors * kWidth <= x.stride; column += kProductVectors * kWidth) {
        product_columns<kProductVectors, kTransposed>(x, column);
    }
    for (; column < x.stride; column += kWidth) product_columns<1, kTransposed>(x, column);
}

double sum_of_squares(const float* x, int64_t n) {
    vd total{};
    for (int64_t i = 0; i < n; i += kWidth) {
        vd y = widen(load(x + i));
        total += y * y;
    }
    return sum(total);
}

void scale_by(float* x, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i += kWidth) store(x + i, load(x + i) * factor);
}

// Newton-Schulz on `y` (rows, stride), rows >= columns: y <- y (c0 + c1 y'y + c2 (y'y)²). With a norm_eps of at least
// zero the result is scaled to a mean square of 1, from `mean_square`. `work` has (rows + 2 columns) * stride numbers;
// which of the two holds the result is returned.
float* newton_schulz(float* y, float* work, int64_t rows, int64_t columns, int64_t stride, const NewtonSchulz& c,
                     float* mean_square) {
    const int64_t size = rows * stride;
    float *square = work + size, *polynomial = square + columns * stride;
    scale_by(y, size, (float)(1.0 / (__builtin_sqrt(sum_of_squares(y, size)) + c.eps)));
    for (int step = 0; step < c.steps; step++) {
        product<true>({y, y, nullptr, square, columns, rows, stride, 0.0f, 0.0f});
        product<true>({square, square, square, polynomial, columns, columns, stride, c.c1, c.c2});
        product<false>({y, polynomial, y, work, rows, columns, stride, c.c0, 1.0f});
        float* last = y;
        y = work;
        work = last;
    }
    const double mean = sum_of_squares(y, size) / ((double)rows * (double)columns);
    *mean_square = (float)mean;
    if (c.norm_eps >= 0.0) scale_by(y, size, (float)(1.0 / __builtin_sqrt(mean + c.norm_eps)));
    return y;
}

}  // namespace
}  // namespace hf_lopt
