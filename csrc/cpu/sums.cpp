// Pass 0: sums over the gradient. Reads the gradient only, unless the statistics of everything else are asked for too.
#include <algorithm>
#include <cstring>

#include "operands.h"

namespace hf_lopt {

namespace {

// A tensor of the list. With moments also the parameter, the momenta and the second moments.
struct SumsOperand {
    Array g, p;
    StoredState state;
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
            // Second moments are the last planes of the state, but the first statistics.
            const int plane = (int)(j < n_v ? n_m + j : j - n_v);
            for (int i = 0; i < count; i++) {
                rows[i] = o.state.read(plane, line_of(i), tile.start, tile.n, shape.columns, buffer + i * tile.n);
            }
            double* pair = stats + kGradientStats + 1 + 2 * j;
            kernel(rows, count, tile.n, pair, pair + 1);
        }
    }
}

// Row and column sums and statistics of a list of tensors. The arguments have passed `check_sums`.
class Sums {
  public:
    Sums(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensors& second_moments,
         const Ints& row_axes, const Ints& col_axes, double clip, bool moments, const Tensors& momentum_scales,
         const Tensors& second_scales)
        : n_v_(second_moments[0].size(0)),
          n_m_(momenta[0].size(0)),
          width_(statistics_width(n_v_, n_m_)),
          bound_((float)clip),
          moments_(moments),
          operands_(grads.size()),
          results_(2 * grads.size()) {
        shapes_.reserve(grads.size());
        for (size_t t = 0; t < grads.size(); t++) {
            shapes_.emplace_back(grads[t], row_axes[t], col_axes[t]);
            SumsOperand& o = operands_[t];
            o.g = Array(grads[t]);
            if (moments) {
                o.p = Array(params[t]);
                o.state = StoredState(momenta[t], second_moments[t], scales_of(momentum_scales, t),
                                      scales_of(second_scales, t), false, copies_);
                align(shapes_.back(), &o.state, RandomPlace());
            }
            for (const int64_t axis : {row_axes[t], col_axes[t]}) {
                if (axis < 0) {
                    results_.add_empty();
                } else {
                    results_.add_like(grads[t], axis);
                }
            }
        }
        results_.allocate(params[0]);
        for (size_t t = 0; t < grads.size(); t++) place_results(t);
        tiles_ = make_tiles(shapes_);
        place_parts();
    }

    std::tuple<Tensors, Tensors, Tensor> run(const Tensor& like) {
        parts_.reset(new float[part_count_]);
        tile_stats_.assign(tiles_.size() * width_, 0.0);
        std::vector<std::unique_ptr<float[]>> buffers(worker_count(tiles_));
        for (auto& buffer : buffers) buffer.reset(new float[2 * kRowElements]);
        for_each_tile(tiles_, [&](int64_t i, int64_t worker) { add_tile(i, buffers[worker].get()); });
        // Partial results are added in the order of the tiles, whichever thread made them.
        const int64_t n_tiles = (int64_t)tiles_.size();
        torch::stable::parallel_for(0, n_tiles, 64, [&](int64_t begin, int64_t end) { total_vectors(begin, end); });
        total_lines();
        const int64_t size[] = {(int64_t)shapes_.size(), width_};
        Tensor stats = torch::stable::new_zeros(like, {size, 2}, ScalarType::Double);
        double* out = static_cast<double*>(stats.data_ptr());
        for (int64_t i = 0; i < n_tiles; i++) {
            for (int64_t j = 0; j < width_; j++) out[tiles_[i].tensor * width_ + j] += tile_stats_[i * width_ + j];
        }
        return {results_.take(0, 2), results_.take(1, 2), std::move(stats)};
    }

  private:
    void place_results(size_t t) {
        const Shape& shape = shapes_[t];
        const size_t line = shape.row_is_line ? 2 * t : 2 * t + 1, vector = shape.row_is_line ? 2 * t + 1 : 2 * t;
        SumsOperand& o = operands_[t];
        o.line_out = results_.data(line);
        o.vector_out = results_.data(vector);
        if (shape.numel == 0) {
            std::fill_n(o.line_out, results_.numel(line), 0.0f);
            std::fill_n(o.vector_out, results_.numel(vector), 0.0f);
        }
    }

    // Where each tile leaves its column sums, if it does not see all lines, and each chunk of columns its line sums.
    void place_parts() {
        vector_part_.assign(tiles_.size(), -1);
        line_part_.assign(shapes_.size(), -1);
        for (size_t i = 0; i < tiles_.size(); i++) {
            const Tile& tile = tiles_[i];
            const Shape& shape = shapes_[tile.tensor];
            if (!shape.factored) continue;
            if (!(tile.first_rows && tile.last_rows)) {
                vector_part_[i] = part_count_;
                part_count_ += tile.n;
            }
            if (tile.chunks > 1 && line_part_[tile.tensor] < 0) {
                line_part_[tile.tensor] = part_count_;
                part_count_ += tile.chunks * shape.line_length();
            }
        }
    }

    void add_tile(int64_t index, float* buffer) {
        const Tile& tile = tiles_[index];
        const Shape& shape = shapes_[tile.tensor];
        const SumsOperand& o = operands_[tile.tensor];
        const Kernels& k = kernels();
        double* stats = &tile_stats_[index * width_];
        float* vector = !shape.factored            ? nullptr
                        : vector_part_[index] >= 0 ? parts_.get() + vector_part_[index]
                                                   : o.vector_out + tile.vector;
        if (vector) std::fill_n(vector, tile.n, 0.0f);
        float* lines = o.line_out;
        if (line_part_[tile.tensor] >= 0) {
            lines = parts_.get() + line_part_[tile.tensor] + tile.chunk * shape.line_length();
        }
        for (int64_t r = 0; r < tile.rows; r++) {
            const int64_t line = tile.line + r * tile.line_step;
            const float* g = o.g.read(line, tile.start, tile.n, shape.columns, buffer);
            const GradientSums s = k.gradient_sums(g, tile.n, bound_, vector);
            stats[0] += (double)s.nonfinite;
            stats[1] += s.squares;
            if (shape.factored && shape.inner == 1) {
                lines[line] = (float)s.clipped_squares;
            } else if (shape.factored) {
                add_inner(g, tile, shape.inner, lines + line * shape.inner);
            }
        }
        if (moments_) add_moments(shape, tile, o, n_v_, n_m_, buffer, stats);
    }

    // The line sums of a row whose line has a number for each of the `inner` places.
    void add_inner(const float* g, const Tile& tile, int64_t inner, float* out) const {
        std::fill_n(out, inner, 0.0f);
        int64_t position = tile.start % inner;
        for (int64_t i = 0; i < tile.n; i++) {
            const float x = std::min(bound_, std::max(-bound_, g[i]));
            out[position] += x * x;
            if (++position == inner) position = 0;
        }
    }

    // Column sums that several tiles have a part of; the tile of the first rows adds up all of them.
    void total_vectors(int64_t begin, int64_t end) {
        std::vector<double> total;
        for (int64_t i = begin; i < end; i++) {
            const Tile& tile = tiles_[i];
            if (vector_part_[i] < 0 || !tile.first_rows) continue;
            total.assign(tile.n, 0.0);
            for (int64_t j = i;; j += tile.chunks) {
                const float* x = parts_.get() + vector_part_[j];
                for (int64_t c = 0; c < tile.n; c++) total[c] += x[c];
                if (tiles_[j].last_rows) break;
            }
            float* out = operands_[tile.tensor].vector_out + tile.vector;
            for (int64_t c = 0; c < tile.n; c++) out[c] = (float)total[c];
        }
    }

    // Line sums that several chunks of columns have a part of.
    void total_lines() {
        for (const Tile& tile : tiles_) {
            const Shape& shape = shapes_[tile.tensor];
            if (line_part_[tile.tensor] < 0 || tile.chunk != 0) continue;
            float* out = operands_[tile.tensor].line_out;
            for (int64_t r = 0; r < tile.rows; r++) {
                const int64_t first = (tile.line + r * tile.line_step) * shape.inner;
                for (int64_t j = first; j < first + shape.inner; j++) {
                    double total = 0.0;
                    for (int64_t c = 0; c < tile.chunks; c++) {
                        total += parts_[line_part_[tile.tensor] + c * shape.line_length() + j];
                    }
                    out[j] = (float)total;
                }
            }
        }
    }

    int64_t n_v_, n_m_, width_;
    float bound_;
    bool moments_;
    ContiguousCopies copies_;
    std::vector<Shape> shapes_;
    std::vector<SumsOperand> operands_;
    std::vector<Tile> tiles_;
    ResultPieces results_;                          // of each tensor the row and the column sums
    std::vector<int64_t> vector_part_, line_part_;  // places in `parts_`, -1 for none
    int64_t part_count_ = 0;
    std::unique_ptr<float[]> parts_;
    std::vector<double> tile_stats_;  // (tiles, width)
};

}  // namespace

std::tuple<Tensors, Tensors, Tensor> sums(Tensors params, Tensors grads, Tensors momenta, Tensors second_moments,
                                          Ints row_axes, Ints col_axes, double clip, bool moments,
                                          Tensors momentum_scales, Tensors second_scales) {
    check_sums(params, grads, momenta, second_moments, row_axes, col_axes, moments, momentum_scales, second_scales);
    return Sums(params, grads, momenta, second_moments, row_axes, col_axes, clip, moments, momentum_scales,
                second_scales)
        .run(params[0]);
}

}  // namespace hf_lopt
