// Pass 1: the sum of squares of every feature column. Read-only.
#include <algorithm>

#include "operands.h"

namespace hf_lopt {

namespace {

// Σ x² and Σ 1/(x + eps) over a part of each accumulator, which are `stride` apart: the squares of a vector feature
// and of its inverse root. All in one loop, since one sum alone waits for each of its additions.
void vector_squares(const float* x, int64_t stride, int64_t n, double* squares, double* inverse) {
    double a[kFactored] = {}, b[kFactored] = {};
    for (int64_t i = 0; i < n; i++) {
        for (int k = 0; k < kFactored; k++) {
            const float value = x[k * stride + i];
            a[k] += (double)value * value;
            b[k] += 1.0f / (value + kVectorEps);
        }
    }
    for (int k = 0; k < kFactored; k++) {
        squares[k] += a[k];
        inverse[k] += b[k];
    }
}

}  // namespace

Tensor feature_sums(const CommonArguments& common) {
    const PassOperands operands(common);
    const std::vector<Tile> tiles = make_tiles(operands.shapes);
    std::vector<double> partial(tiles.size() * kSums);
    std::vector<Buffers> buffers;
    for (int64_t i = 0; i < worker_count(tiles); i++) buffers.emplace_back(0, kRowElements, operands.stored);

    for_each_tile(tiles, [&](int64_t index, int64_t worker) {
        const Tile& tile = tiles[index];
        const Operands& x = operands.tensors[tile.tensor];
        const Shape& shape = x.shape;
        const auto kernel =
            shape.factored ? kernels().feature_sums[x.state.format()] : kernels().feature_sums_diagonal;
        double* sums = &partial[index * kSums];
        double (*vectors)[kFactored] = reinterpret_cast<double (*)[kFactored]>(sums + kInputs);
        const bool row = shape.row_is_line;
        const int group = group_rows(shape, tile);
        RowData rows[kGroupRows];
        for (int64_t r = 0; r < tile.rows; r += group) {
            const int count = (int)std::min<int64_t>(group, tile.rows - r);
            for (int i = 0; i < count; i++) {
                const int64_t line = tile.line + (r + i) * tile.line_step;
                make_row(x, tile, line, i, buffers[worker], rows[i]);
            }
            // Lines beside each other are one piece of the accumulator.
            const int together = tile.line_step == 1 ? count : 1;
            for (int i = 0; shape.factored && tile.chunk == 0 && i < count; i += together) {
                const int64_t line = tile.line + (r + i) * tile.line_step;
                vector_squares(x.line + line * shape.inner, shape.line_length(), together * shape.inner,
                               vectors[row ? kRow : kCol], vectors[row ? kRsqrtRow : kRsqrtCol]);
            }
            kernel(rows, count, operands.constants, sums);
        }
        if (shape.factored && tile.first_rows) {
            vector_squares(x.vector + tile.vector, shape.vector_length(), tile.n, vectors[row ? kCol : kRow],
                           vectors[row ? kRsqrtCol : kRsqrtRow]);
        }
    });

    const int64_t count = slice_count(operands.shapes), width = operands.columns.count;
    const int64_t size[] = {count, width};
    Tensor result = torch::stable::new_zeros(common.params[0], {size, 2}, torch::headeronly::ScalarType::Double);
    double* out = static_cast<double*>(result.data_ptr());
    for (size_t i = 0; i < tiles.size(); i++) {
        const Shape& shape = operands.shapes[tiles[i].tensor];
        const double* sums = &partial[i * kSums];
        double* total = out + tiles[i].slice * width;
        for (int f = 0; f < kInputs; f++) {
            if (operands.columns.element[f] >= 0) total[operands.columns.element[f]] += sums[f];
        }
        for (int v = 0; v < kVectorFeatures; v++) {
            const bool of_line = shape.row_is_line == (v == kRow || v == kRsqrtRow);
            // A vector feature is constant along the axis that its accumulator averages over.
            const double repeats = !shape.factored ? 1.0
                                                   : (double)shape.numel / (double)(of_line ? shape.line_length()
                                                                                            : shape.vector_length());
            const bool root = v == kRsqrtRow || v == kRsqrtCol;
            for (int k = 0; k < kFactored; k++) {
                const int column = operands.columns.vector[v][k];
                if (column < 0) continue;
                const double x = shape.factored ? sums[kInputs + v * kFactored + k] : sums[(root ? kRsqrtD : kD) + k];
                total[column] += repeats * x;
            }
        }
    }
    return result;
}

}  // namespace hf_lopt
