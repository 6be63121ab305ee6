// Pass 2: the network on the scaled features, new accumulators and the update of the parameter, all in place.
#include <algorithm>
#include <cmath>

#include "common.h"

namespace hf_lopt {

namespace {

// A float32 tensor of up to three axes with any strides; the first may have size 1 for all tensors.
class Table {
  public:
    Table(const Tensor& x, int64_t count)
        : data_(static_cast<const float*>(x.data_ptr())), size_(x.size(0)), last_((int)x.dim() - 1) {
        STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float, "the network must be float32");
        STD_TORCH_CHECK(size_ == 1 || size_ == count, "the network is for ", size_, " tensors, there are ", count);
        for (int64_t i = 0; i < x.dim() && i < 3; i++) stride_[i] = x.stride(i);
    }
    float operator()(int64_t t, int64_t i = 0, int64_t j = 0) const { return *at(t, i, j); }
    // A row of a matrix, or a vector (i = 0).
    template <int N>
    void copy(int64_t t, int64_t i, float* out) const {
        const float* x = at(t, i, 0);
        for (int j = 0; j < N; j++) out[j] = x[j * stride_[last_]];
    }

  private:
    const float* at(int64_t t, int64_t i, int64_t j) const {
        return data_ + (size_ > 1 ? t : 0) * stride_[0] + i * stride_[1] + j * stride_[2];
    }

    const float* data_;
    int64_t size_, stride_[3] = {0, 0, 0};
    int last_;
};

// What the vector features of a tensor contribute to the first layer.
template <int U>
struct VectorWeights {
    float line[kFactored][U], rsqrt_line[kFactored][U], vector[kFactored][U], rsqrt_vector[kFactored][U];
};

template <int U>
class Applier {
  public:
    Applier(const Common& common, const Weights& w)
        : problem_(common),
          exp_mult_((float)w.exp_mult),
          scale_(w.scale, slice_count(problem_.shapes)),
          decay_(w.decay, slice_count(problem_.shapes)) {
        const int64_t count = slice_count(problem_.shapes);
        for (const Tensor& x : w.weights) weights_.emplace_back(x, count);
        for (const Tensor& x : w.biases) biases_.emplace_back(x, count);
        STD_TORCH_CHECK(w.weights[0].size(1) == problem_.columns.count, "the first layer has ", w.weights[0].size(1),
                        " inputs, the features have ", problem_.columns.count, " columns");
        for (const Tensor& x : w.out) {
            STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float, "out must be float32");
            out_.emplace_back(x);
        }
        STD_TORCH_CHECK(out_.empty() || out_.size() == problem_.tensors.size(),
                        "out must be empty or have one tensor per parameter");
    }

    std::tuple<Tensor, Tensor> run(const Tensor& like) {
        // With many units the biases of a row are the larger part of a thread's memory: shorter rows keep it in cache.
        const int64_t row_elements = U > 8 ? kRowElements / 8 : kRowElements;
        const std::vector<Tile> tiles = make_tiles(problem_.shapes, row_elements);
        std::vector<double> partial(tiles.size() * kUpdateStats);
        std::vector<Buffers> buffers;
        for (int64_t i = 0; i < worker_count(tiles); i++) buffers.emplace_back(U, row_elements);
        for_each_tile(
            tiles, [&](int64_t i, int64_t worker) { apply(tiles[i], buffers[worker], &partial[i * kUpdateStats]); });
        problem_.store_copies();

        const int64_t count = slice_count(problem_.shapes), width = kUpdateStats + 1;
        const int64_t sums_size[] = {count, 1}, stats_size[] = {count, width};
        constexpr auto type = torch::headeronly::ScalarType::Double;
        Tensor sums = torch::stable::new_zeros(like, {sums_size, 2}, type);
        Tensor stats = torch::stable::new_zeros(like, {stats_size, 2}, type);
        double* sum = static_cast<double*>(sums.data_ptr());
        double* stat = static_cast<double*>(stats.data_ptr());
        for (size_t i = 0; i < tiles.size(); i++) {
            const int64_t t = tiles[i].slice;
            sum[t] += partial[i * kUpdateStats];
            // The two statistics of the gradient come first and stay zero.
            for (int j = 1; j < kUpdateStats; j++) stat[t * width + j + 1] += partial[i * kUpdateStats + j];
        }
        return {sums, stats};
    }

  private:
    Network<U> network(int64_t t) const {
        Network<U> net;
        const Columns& columns = problem_.columns;
        for (int f = 0; f < kInputs; f++) first(t, columns.element[f], net.first[f]);
        for (int k = 0; k < kFactored; k++) {
            // For rank < 2 the row and the column accumulator are the same one.
            first(t, columns.vector[kRow][k], net.first[kD + k], columns.vector[kCol][k]);
            first(t, columns.vector[kRsqrtRow][k], net.first[kRsqrtD + k], columns.vector[kRsqrtCol][k]);
        }
        biases_[0].copy<U>(t, 0, net.bias);
        for (int i = 0; i < U; i++) weights_[1].copy<U>(t, i, net.second[i]);
        biases_[1].copy<U>(t, 0, net.second_bias);
        const float scale = scale_(t);
        for (int j = 0; j < U; j++) {
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
        const auto& columns = problem_.columns.vector;
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
        std::fill_n(out, U, 0.0f);
        float own[U];
        for (int c : {column, other}) {
            if (c < 0) continue;
            weights_[0].copy<U>(t, c, own);
            for (int j = 0; j < U; j++) out[j] += own[j];
        }
    }

    void apply(const Tile& tile, Buffers& buffers, double* stats) const {
        const Kernels& kernel = kernels();
        const Operands& x = problem_.tensors[tile.tensor];
        const Shape& shape = x.shape;
        const Network<U> net = network(tile.slice);
        VectorWeights<U> w;
        if (shape.factored) {
            w = vector_weights(tile.slice, shape.row_is_line);
            const float* vectors[kFactored];
            for (int k = 0; k < kFactored; k++) vectors[k] = x.vector + k * shape.vector_length() + tile.vector;
            kernel.vector_bias(vectors, w.vector[0], w.rsqrt_vector[0], U, tile.n, buffers.bias, buffers.stride);
        }
        const int group = group_rows(shape, tile);
        Row rows[kGroupRows];
        float row_bias[kGroupRows][U];
        for (int64_t r = 0; r < tile.rows; r += group) {
            const int count = (int)std::min<int64_t>(group, tile.rows - r);
            const auto line_of = [&](int i) { return tile.line + (r + i) * tile.line_step; };
            for (int i = 0; i < count; i++) std::copy_n(net.bias, U, row_bias[i]);
            if (shape.factored && shape.inner == 1) add_line_biases(x, line_of, count, w, buffers, row_bias);
            for (int i = 0; i < count; i++) {
                const int64_t line = line_of(i);
                Row& row = rows[i];
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
            run_rows(kernel, shape.factored, rows, count, net, stats);
            if (!out_.empty()) {
                for (int i = 0; i < count; i++) {
                    out_[tile.tensor].write(rows[i].step_out, line_of(i), tile.start, tile.n, shape.columns);
                }
            } else if (!x.p.in_place()) {
                const float* stored[kGroupRows];
                for (int i = 0; i < count; i++) {
                    x.p.write(rows[i].p_out, line_of(i), tile.start, tile.n, shape.columns);
                    stored[i] = rows[i].p_out;
                }
                double unused = 0.0;
                stats[1] = p2;  // Σp² of the parameter as it was rounded
                (shape.factored ? kernel.moments : kernel.moments_diagonal)(stored, count, tile.n, &unused, &stats[1]);
            }
        }
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

    void run_rows(const Kernels& k, bool factored, const Row* rows, int n, const Network<U>& net,
                  double* stats) const {
        const Constants& c = problem_.constants;
        if constexpr (U == 4) (factored ? k.apply_4 : k.apply_diagonal_4)(rows, n, c, net, stats);
        if constexpr (U == 8) (factored ? k.apply_8 : k.apply_diagonal_8)(rows, n, c, net, stats);
        if constexpr (U == 32) (factored ? k.apply_32 : k.apply_diagonal_32)(rows, n, c, net, stats);
    }

    Problem problem_;
    float exp_mult_;
    std::vector<Table> weights_, biases_;
    Table scale_, decay_;
    std::vector<Array> out_;
};

}  // namespace

std::tuple<Tensor, Tensor> apply_network(const Common& common, const Weights& w) {
    STD_TORCH_CHECK(!common.params.empty(), "there must be at least one parameter");
    STD_TORCH_CHECK(w.weights.size() == 3 && w.biases.size() == 3 && w.weights[2].size(2) == 2,
                    "the fused kernels are for networks of two hidden layers and two outputs");
    const int64_t units = w.weights[0].size(2);
    STD_TORCH_CHECK(w.weights[1].size(1) == units && w.weights[1].size(2) == units && w.weights[2].size(1) == units,
                    "the hidden layers must be of the same width");
    STD_TORCH_CHECK(w.skip.scalar_type() == torch::headeronly::ScalarType::Bool, "skip must be a bool tensor");
    if (*static_cast<const bool*>(w.skip.data_ptr())) {
        const int64_t count = slice_count(Problem(common).shapes);
        const int64_t sums_size[] = {count, 1}, stats_size[] = {count, kUpdateStats + 1};
        constexpr auto type = torch::headeronly::ScalarType::Double;
        return {torch::stable::new_zeros(common.params[0], {sums_size, 2}, type),
                torch::stable::new_zeros(common.params[0], {stats_size, 2}, type)};
    }
    STD_TORCH_CHECK(units == 4 || units == 8 || units == 32, "no fused kernel for hidden layers of ", units, " units");
    if (units == 4) return Applier<4>(common, w).run(common.params[0]);
    if (units == 8) return Applier<8>(common, w).run(common.params[0]);
    return Applier<32>(common, w).run(common.params[0]);
}

}  // namespace hf_lopt
