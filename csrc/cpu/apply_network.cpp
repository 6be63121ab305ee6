// Pass 2: the network on the scaled features, new accumulators and the update of the parameter, all in place.
#include <algorithm>
#include <cmath>

#include "operands.h"

namespace hf_lopt {

namespace {

constexpr int kStatsWidth = statistics_width(kSecondMoments, kMomenta);
constexpr int64_t kManyUnitsRow = kRowElements / 8;  // elements of a row for networks of many units
constexpr int64_t kLanes = 16;                       // of the widest vectors

// Zeros for Σ step² (rows, 1) and the statistics (rows, kStatsWidth).
std::tuple<Tensor, Tensor> new_results(const Tensor& like, int64_t rows) {
    const int64_t sums_size[] = {rows, 1}, stats_size[] = {rows, kStatsWidth};
    return {torch::stable::new_zeros(like, {sums_size, 2}, ScalarType::Double),
            torch::stable::new_zeros(like, {stats_size, 2}, ScalarType::Double)};
}

// Pass 2 for hidden layers of U units.
template <int U>
class Applier {
  public:
    // The arguments have passed the checks.
    Applier(PassOperands&& operands, const NetworkArguments& network)
        : operands_(std::move(operands)),
          exp_mult_((float)network.exp_mult),
          round_params_(network.rounding.step && network.rounding.params),
          scale_(view_of(network.scale)),
          decay_(view_of(network.decay)) {
        for (const Tensor& x : network.weights) weights_.push_back(view_of(x));
        for (const Tensor& x : network.biases) biases_.push_back(view_of(x));
        for (const Tensor& x : network.out) out_.emplace_back(x);
    }

    std::tuple<Tensor, Tensor> run(const Tensor& like) {
        // With many units the biases of a row are the larger part of a thread's memory: shorter rows keep it in cache.
        const int64_t row_elements = U > 8 ? kManyUnitsRow : kRowElements;
        const std::vector<Tile> tiles = make_tiles(operands_.shapes, row_elements);
        std::vector<double> partial(tiles.size() * kUpdateStats);
        std::vector<Buffers> buffers;
        for (int64_t i = 0; i < worker_count(tiles); i++) buffers.emplace_back(U, row_elements, operands_.stored);
        for_each_tile(
            tiles, [&](int64_t i, int64_t worker) { apply(tiles[i], buffers[worker], &partial[i * kUpdateStats]); });
        operands_.store_copies();

        auto [sums, stats] = new_results(like, slice_count(operands_.shapes));
        double* sum = static_cast<double*>(sums.data_ptr());
        double* stat = static_cast<double*>(stats.data_ptr());
        for (size_t i = 0; i < tiles.size(); i++) {
            const int64_t t = tiles[i].slice;
            sum[t] += partial[i * kUpdateStats];
            // The two statistics of the gradient come first and stay zero.
            for (int j = 1; j < kUpdateStats; j++) stat[t * kStatsWidth + j + 1] += partial[i * kUpdateStats + j];
        }
        return {sums, stats};
    }

  private:
    Network<U> network(int64_t t) const {
        Network<U> net;
        const FeatureColumns& columns = operands_.columns;
        for (int f = 0; f < kInputs; f++) first(t, columns.element[f], net.first[f]);
        for (int k = 0; k < kFactored; k++) {
            // For rank < 2 the row and the column accumulator are the same one.
            first(t, columns.vector[kRow][k], net.first[kD + k], columns.vector[kCol][k]);
            first(t, columns.vector[kRsqrtRow][k], net.first[kRsqrtD + k], columns.vector[kRsqrtCol][k]);
        }
        const float scale = scale_(t);
        for (int j = 0; j < U; j++) {
            net.bias[j] = biases_[0](t, j);
            copy_row(weights_[1], t, j, net.second[j]);
            net.second_bias[j] = biases_[1](t, j);
            net.last[j][0] = weights_[2](t, j, 0) * scale;
            net.last[j][1] = weights_[2](t, j, 1) * exp_mult_;
        }
        net.last_bias[0] = biases_[2](t, 0) * scale;
        net.last_bias[1] = biases_[2](t, 1) * exp_mult_;
        net.decay = decay_(t);
        return net;
    }

    VectorWeights<U> vector_weights(int64_t t, bool row) const {
        VectorWeights<U> w;
        const auto& columns = operands_.columns.vector;
        for (int k = 0; k < kFactored; k++) {
            first(t, columns[row ? kRow : kCol][k], w.line[k]);
            first(t, columns[row ? kRsqrtRow : kRsqrtCol][k], w.rsqrt_line[k]);
            first(t, columns[row ? kCol : kRow][k], w.vector[k]);
            first(t, columns[row ? kRsqrtCol : kRsqrtRow][k], w.rsqrt_vector[k]);
        }
        return w;
    }

    // The weights of a column of features in the first layer, or the sum of those of two; zeros for -1.
    void first(int64_t t, int column, float* out, int other = -1) const {
        if (column < 0) {
            std::fill_n(out, U, 0.0f);
        } else {
            copy_row(weights_[0], t, column, out);
        }
        for (int j = 0; other >= 0 && j < U; j++) out[j] += weights_[0](t, other, j);
    }

    // The weights of one input of a layer.
    static void copy_row(const StridedView<float>& layer, int64_t t, int64_t input, float* out) {
        if (layer.stride[2] == 1) {
            std::copy_n(&layer.data[t * layer.stride[0] + input * layer.stride[1]], U, out);
        } else {
            for (int j = 0; j < U; j++) out[j] = layer(t, input, j);
        }
    }

    void apply(const Tile& tile, Buffers& buffers, double* stats) const {
        const Kernels& kernel = kernels();
        const Operands& x = operands_.tensors[tile.tensor];
        const Shape& shape = x.shape;
        const Network<U> net = network(tile.slice);
        VectorWeights<U> w;
        if (shape.factored) {
            w = vector_weights(tile.slice, shape.row_is_line);
            const float* vectors[kFactored];
            for (int k = 0; k < kFactored; k++) vectors[k] = x.vector + k * shape.vector_length() + tile.vector;
            kernel.vector_bias(vectors, w.vector[0], w.rsqrt_vector[0], U, tile.n, buffers.bias, buffers.stride);
        }
        const bool joined = joins_rows(x, tile);
        const int group =
            joined ? (int)std::min<int64_t>(kGroupRows, kManyUnitsRow / tile.n) : group_rows(shape, tile);
        RowData rows[kGroupRows];
        float row_bias[kGroupRows][U];
        for (int64_t r = 0; r < tile.rows; r += group) {
            const int count = (int)std::min<int64_t>(group, tile.rows - r);
            const auto line_of = [&](int i) { return tile.line + (r + i) * tile.line_step; };
            for (int i = 0; i < count; i++) std::copy_n(net.bias, U, row_bias[i]);
            if (shape.factored && shape.inner == 1) add_line_biases(x, line_of, count, w, buffers, row_bias);
            for (int i = 0; i < count; i++) {
                const int64_t line = line_of(i);
                RowData& row = rows[i];
                make_row(x, tile, line, i, buffers, row);
                row.row_bias = row_bias[i];
                row.bias = buffers.bias;
                row.bias_stride = buffers.stride;
                if (shape.factored && shape.inner > 1) row.bias = inner_bias(x, tile, line, w, buffers);
                if (!out_.empty()) {
                    float* buffer = buffers.step + i * tile.n;
                    row.step_out = out_[tile.tensor].read(line, tile.start, tile.n, shape.columns, buffer);
                }
            }
            const double p2 = stats[1];
            if (joined) {
                const RowData all = join(rows, count, buffers);
                run_rows(kernel, x, &all, 1, net, stats);
            } else {
                run_rows(kernel, x, rows, count, net, stats);
            }
            if (x.state.format() == kCodes) kernel.store_codes(rows, count, stats);
            if (!out_.empty()) {
                for (int i = 0; i < count; i++) {
                    out_[tile.tensor].write(rows[i].step_out, line_of(i), tile.start, tile.n, shape.columns);
                }
            } else if (!x.p.in_place()) {
                const float* stored[kGroupRows];
                for (int i = 0; i < count; i++) {
                    const int64_t line = line_of(i);
                    if (round_params_) {
                        const RandomRow random = x.place.row(line, tile.start);
                        x.p.write(rows[i].p_out, line, tile.start, tile.n, shape.columns, random);
                    } else {
                        x.p.write(rows[i].p_out, line, tile.start, tile.n, shape.columns);
                    }
                    stored[i] = rows[i].p_out;
                }
                double unused = 0.0;
                stats[1] = p2;  // Σp² of the parameter as it was rounded
                (shape.factored ? kernel.moments : kernel.moments_diagonal)(stored, count, tile.n, &unused, &stats[1]);
            }
        }
    }

    // Whether rows are so short that each would leave lanes of its only vector empty, where a row costs by the vector.
    // Several of them are one row then, since they lie one after the other.
    bool joins_rows(const Operands& x, const Tile& tile) const {
        return U > 8 && x.shape.factored && x.state.in_place() && tile.n < kLanes && tile.n == x.shape.columns &&
               x.shape.inner == 1 && tile.line_step == 1;
    }

    // Rows as one: what is constant along each of them varies along that one, formed with the same roundings.
    RowData join(const RowData* rows, int count, Buffers& buffers) const {
        static constexpr float kZeros[U] = {};
        RowData all = rows[0];
        all.n = count * rows[0].n;
        for (int k = 0; k < kFactored; k++) {
            float* out = buffers.factor + k * buffers.stride;
            all.factor[k] = out;
            all.rho[k] = 1.0f;
            for (int i = 0; i < count; i++) {
                for (int64_t c = 0; c < rows[i].n; c++) *out++ = rows[i].factor[k][c] * rows[i].rho[k];
            }
        }
        all.bias = buffers.line_bias;
        all.row_bias = kZeros;
        for (int j = 0; j < U; j++) {
            float* out = buffers.line_bias + j * buffers.stride;
            for (int i = 0; i < count; i++) {
                const float* bias = rows[i].bias + j * rows[i].bias_stride;
                for (int64_t c = 0; c < rows[i].n; c++) *out++ = rows[i].row_bias[j] + bias[c];
            }
        }
        return all;
    }

    // What the features that are constant along a row add, for several rows at once.
    template <class LineOf>
    void add_line_biases(const Operands& x, const LineOf& line_of, int count, const VectorWeights<U>& w,
                         Buffers& buffers, float (*bias)[U]) const {
        const float* lines[kFactored];
        for (int k = 0; k < kFactored; k++) {
            float* line = buffers.expanded + k * buffers.stride;
            for (int i = 0; i < count; i++) line[i] = x.line[k * x.shape.line_length() + line_of(i)];
            lines[k] = line;
        }
        kernels().vector_bias(lines, w.line[0], w.rsqrt_line[0], U, count, buffers.line_bias, buffers.stride);
        for (int i = 0; i < count; i++) {
            for (int j = 0; j < U; j++) bias[i][j] += buffers.line_bias[j * buffers.stride + i];
        }
    }

    // The biases of both factored accumulators at every column of a row, where the line's varies with the inner axes.
    const float* inner_bias(const Operands& x, const Tile& tile, int64_t line, const VectorWeights<U>& w,
                            Buffers& buffers) const {
        expand(x.line, x.shape, tile, line, buffers.expanded, buffers.stride);
        const float* lines[kFactored];
        for (int k = 0; k < kFactored; k++) lines[k] = buffers.expanded + k * buffers.stride;
        kernels().vector_bias(lines, w.line[0], w.rsqrt_line[0], U, tile.n, buffers.line_bias, buffers.stride);
        for (int j = 0; j < U; j++) {
            for (int64_t i = 0; i < tile.n; i++) {
                buffers.line_bias[j * buffers.stride + i] += buffers.bias[j * buffers.stride + i];
            }
        }
        return buffers.line_bias;
    }

    void run_rows(const Kernels& k, const Operands& x, const RowData* rows, int n, const Network<U>& net,
                  double* stats) const {
        const bool factored = x.shape.factored;
        const Format format = x.state.format();
        const FeatureConstants& c = operands_.constants;
        if constexpr (U == 4) (factored ? k.apply_4[format] : k.apply_diagonal_4)(rows, n, c, net, stats);
        if constexpr (U == 8) (factored ? k.apply_8[format] : k.apply_diagonal_8)(rows, n, c, net, stats);
        if constexpr (U == 32) (factored ? k.apply_32[format] : k.apply_diagonal_32)(rows, n, c, net, stats);
    }

    PassOperands operands_;
    float exp_mult_;
    bool round_params_;
    std::vector<StridedView<float>> weights_, biases_;
    StridedView<float> scale_, decay_;
    std::vector<Array> out_;
};

}  // namespace

std::tuple<Tensor, Tensor> apply_network(const CommonArguments& common, const NetworkArguments& network) {
    PassOperands operands(common, &network.rounding);
    const int64_t units = check_network(common, operands.columns, network), rows = slice_count(operands.shapes);
    check_network_rows(network, rows);
    const Tensor& like = common.params[0];
    if (*static_cast<const bool*>(network.skip.data_ptr())) return new_results(like, rows);
    if (units == 4) return Applier<4>(std::move(operands), network).run(like);
    if (units == 8) return Applier<8>(std::move(operands), network).run(like);
    return Applier<32>(std::move(operands), network).run(like);
}

}  // namespace hf_lopt
