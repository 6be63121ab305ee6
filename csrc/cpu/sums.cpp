// Pass 0: sums over the gradient. Reads the gradient only, unless the statistics of everything else are asked for too.
#include <algorithm>
#include <cstring>

#include "common.h"

namespace hf_lopt {

namespace {

Tensor new_float(const Tensor& like, int64_t without) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < like.dim(); i++) {
        if (i != without) shape.push_back(like.size(i));
    }
    return torch::stable::new_empty(like, {shape.data(), shape.size()}, torch::headeronly::ScalarType::Float);
}

// A tensor of the list. With moments also the parameter, the momenta and the second moments.
struct SumsOperand {
    Array g, p;
    const float *m, *v;
    // Results, and partial results where a line or a column is divided among tiles.
    float *line_out, *vector_out, *line_part;
};

// Statistics of the parameter and the accumulators, formed as the update forms them: a run that is resumed goes on bit
// by bit like one that was not.
void add_moments(const Shape& shape, const Tile& tile, const SumsOperand& o, int64_t n_v, int64_t n_m, float* buffer,
                 double* stats) {
    const auto kernel = shape.factored ? kernels().moments : kernels().moments_diagonal;
    const int group = group_rows(shape, tile);
    const float* rows[kGroupRows];
    for (int64_t r = 0; r < tile.rows; r += group) {
        const int count = (int)std::min<int64_t>(group, tile.rows - r);
        const auto line_of = [&](int i) { return tile.line + (r + i) * tile.line_step; };
        for (int i = 0; i < count; i++) {
            rows[i] = o.p.read(line_of(i), tile.start, tile.n, shape.columns, buffer + i * tile.n);
        }
        double unused = 0.0;
        kernel(rows, count, tile.n, &unused, stats + kGradientStats);
        for (int64_t j = 0; j < n_v + n_m; j++) {
            const float* x = j < n_v ? o.v + j * shape.numel : o.m + (j - n_v) * shape.numel;
            for (int i = 0; i < count; i++) rows[i] = x + line_of(i) * shape.columns + tile.start;
            double* pair = stats + kGradientStats + 1 + 2 * j;
            kernel(rows, count, tile.n, pair, pair + 1);
        }
    }
}

}  // namespace

std::tuple<Tensors, Tensors, Tensor> sums(Tensors params, Tensors grads, Tensors momenta, Tensors second_moments,
                                          Ints row_axes, Ints col_axes, double clip, bool moments) {
    const size_t count = params.size();
    check_sums(params, grads, momenta, second_moments, row_axes, col_axes, moments);
    const int64_t n_v = second_moments[0].size(0), n_m = momenta[0].size(0);
    const int64_t width = statistics_width(n_v, n_m);

    ContiguousCopies copies;
    std::vector<Shape> shapes;
    std::vector<SumsOperand> operands(count);
    Tensors rows, cols;
    for (size_t t = 0; t < count; t++) {
        shapes.emplace_back(grads[t], row_axes[t], col_axes[t]);
        SumsOperand& o = operands[t];
        o.g = Array(grads[t]);
        if (moments) {
            o.p = Array(params[t]);
            o.m = float_data(copies.readable(momenta[t]));
            o.v = float_data(copies.readable(second_moments[t]));
        }
        const int64_t zero = 0;
        for (auto [out, axis] : {std::pair(&rows, row_axes[t]), std::pair(&cols, col_axes[t])}) {
            out->push_back(axis >= 0
                               ? new_float(grads[t], axis)
                               : torch::stable::new_empty(grads[t], {&zero, 1}, torch::headeronly::ScalarType::Float));
        }
        Tensor &line = shapes[t].row_is_line ? rows[t] : cols[t], &vector = shapes[t].row_is_line ? cols[t] : rows[t];
        o.line_out = static_cast<float*>(line.data_ptr());
        o.vector_out = static_cast<float*>(vector.data_ptr());
        if (shapes[t].numel == 0) {
            std::fill_n(o.line_out, line.numel(), 0.0f);
            std::fill_n(o.vector_out, vector.numel(), 0.0f);
        }
    }

    const std::vector<Tile> tiles = make_tiles(shapes);
    // Where each tile leaves its column sums, if it does not see all lines, and each chunk of columns its line sums.
    std::vector<int64_t> vector_part(tiles.size(), -1), line_part(count, -1);
    int64_t part = 0;
    for (size_t i = 0; i < tiles.size(); i++) {
        const Tile& tile = tiles[i];
        const Shape& shape = shapes[tile.tensor];
        if (!shape.factored) continue;
        if (!(tile.first_rows && tile.last_rows)) {
            vector_part[i] = part;
            part += tile.n;
        }
        if (tile.chunks > 1 && line_part[tile.tensor] < 0) {
            line_part[tile.tensor] = part;
            part += tile.chunks * shape.line_length();
        }
    }
    std::unique_ptr<float[]> parts(new float[part]);
    std::vector<double> tile_stats(tiles.size() * width);
    const float bound = (float)clip;
    std::vector<std::unique_ptr<float[]>> buffers(worker_count(tiles));
    for (auto& buffer : buffers) buffer.reset(new float[2 * kRowElements]);

    for_each_tile(tiles, [&](int64_t index, int64_t worker) {
        const Tile& tile = tiles[index];
        const Shape& shape = shapes[tile.tensor];
        const SumsOperand& o = operands[tile.tensor];
        const Kernels& k = kernels();
        float* buffer = buffers[worker].get();
        double* stats = &tile_stats[index * width];
        float* vector = !shape.factored           ? nullptr
                        : vector_part[index] >= 0 ? parts.get() + vector_part[index]
                                                  : o.vector_out + tile.vector;
        if (vector) std::fill_n(vector, tile.n, 0.0f);
        float* lines = o.line_out;
        if (line_part[tile.tensor] >= 0)
            lines = parts.get() + line_part[tile.tensor] + tile.chunk * shape.line_length();
        for (int64_t r = 0; r < tile.rows; r++) {
            const int64_t line = tile.line + r * tile.line_step;
            const float* g = o.g.read(line, tile.start, tile.n, shape.columns, buffer);
            const GradientSums s = k.gradient_sums(g, tile.n, bound, vector);
            stats[0] += (double)s.nonfinite;
            stats[1] += s.squares;
            if (shape.factored && shape.inner == 1) {
                lines[line] = (float)s.clipped_squares;
            } else if (shape.factored) {
                float* out = lines + line * shape.inner;
                std::fill_n(out, shape.inner, 0.0f);
                int64_t position = tile.start % shape.inner;
                for (int64_t i = 0; i < tile.n; i++) {
                    const float x = std::min(bound, std::max(-bound, g[i]));
                    out[position] += x * x;
                    if (++position == shape.inner) position = 0;
                }
            }
        }
        if (moments) add_moments(shape, tile, o, n_v, n_m, buffer, stats);
    });

    // Partial results are added in the order of the tiles, whichever thread made them.
    const int64_t n_tiles = (int64_t)tiles.size();
    torch::stable::parallel_for(0, n_tiles, 64, [&](int64_t begin, int64_t end) {
        std::vector<double> total;
        for (int64_t i = begin; i < end; i++) {
            const Tile& tile = tiles[i];
            if (vector_part[i] < 0 || !tile.first_rows) continue;
            total.assign(tile.n, 0.0);
            for (int64_t j = i;; j += tile.chunks) {
                const float* x = parts.get() + vector_part[j];
                for (int64_t c = 0; c < tile.n; c++) total[c] += x[c];
                if (tiles[j].last_rows) break;
            }
            float* out = operands[tile.tensor].vector_out + tile.vector;
            for (int64_t c = 0; c < tile.n; c++) out[c] = (float)total[c];
        }
    });
    for (int64_t i = 0; i < n_tiles; i++) {
        const Tile& tile = tiles[i];
        const Shape& shape = shapes[tile.tensor];
        if (line_part[tile.tensor] < 0 || tile.chunk != 0) continue;
        float* out = operands[tile.tensor].line_out;
        for (int64_t r = 0; r < tile.rows; r++) {
            const int64_t first = (tile.line + r * tile.line_step) * shape.inner;
            for (int64_t j = first; j < first + shape.inner; j++) {
                double total = 0.0;
                for (int64_t c = 0; c < tile.chunks; c++) {
                    total += parts[line_part[tile.tensor] + c * shape.line_length() + j];
                }
                out[j] = (float)total;
            }
        }
    }
    const int64_t size[] = {(int64_t)count, width};
    Tensor stats = torch::stable::new_zeros(params[0], {size, 2}, torch::headeronly::ScalarType::Double);
    double* out = static_cast<double*>(stats.data_ptr());
    for (int64_t i = 0; i < n_tiles; i++) {
        for (int64_t j = 0; j < width; j++) out[tiles[i].tensor * width + j] += tile_stats[i * width + j];
    }
    return {std::move(rows), std::move(cols), std::move(stats)};
}

}  // namespace hf_lopt
