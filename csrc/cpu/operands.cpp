#include "operands.h"

#include <algorithm>

namespace hf_lopt {

namespace {

constexpr int64_t kPieceAlignment = 16;  // numbers, of 64 bytes

}  // namespace

int64_t slices_of(const Tensors& params, const Ints& slice_axes, size_t t) {
    const int64_t* axes = slice_of(slice_axes, t);
    if (!axes) return 1;
    const Tensor& p = params[t];
    const int64_t dim = p.dim(), n = p.numel();
    if (dim < 2 || n == 0) return 1;
    const int64_t first = std::min(axes[0], axes[1]), last = std::max(axes[0], axes[1]);
    const int64_t slices = n / (first == last ? p.size(last) : p.size(first) * p.size(last));
    STD_TORCH_CHECK(slices == 1 || (last == dim - 1 && first >= dim - 2),
                    "the fused kernels for the CPU take slices over the last axes, got axes ", first, " and ", last,
                    " of ", dim);
    return slices;
}

PassOperands::PassOperands(const CommonArguments& x, const Rounding* rounding)
    : columns(feature_columns(x.features)), constants(feature_constants(x)) {
    check_common(x);
    const size_t count = x.params.size();
    tensors.resize(count);
    shapes.reserve(count);
    std::vector<RandomPlace> places = random_places(x.params, rounding ? *rounding : Rounding{});
    for (size_t t = 0; t < count; t++) {
        Operands& o = tensors[t];
        o.shape = Shape(x.params[t], x.row_axes[t], x.col_axes[t], slices_of(x.params, x.slice_axes, t));
        o.p = Array(x.params[t]);
        o.g = Array(x.grads[t]);
        o.place = std::move(places[t]);
        o.state = StoredState(x.momenta[t], x.second_moments[t], scales_of(x.momentum_scales, t),
                              scales_of(x.second_scales, t), rounding != nullptr, copies_);
        align(o.shape, &o.state, o.place);
        stored = stored || o.state.format() == kCodes;
        shapes.push_back(o.shape);
        if (!o.shape.factored) {
            o.d = float_data(copies_.writable(x.diagonals[t]));
            continue;
        }
        const float* row = float_data(copies_.readable(x.rows[t]));
        const float* col = float_data(copies_.readable(x.cols[t]));
        const float* row_factor = float_data(copies_.readable(x.row_factors[t]));
        const float* col_factor = float_data(copies_.readable(x.col_factors[t]));
        const bool row_is_line = o.shape.row_is_line;
        o.line = row_is_line ? row : col;
        o.vector = row_is_line ? col : row;
        o.line_factor = row_is_line ? row_factor : col_factor;
        o.vector_factor = row_is_line ? col_factor : row_factor;
    }
}

ResultPieces::ResultPieces(size_t pieces) {
    sizes_.reserve(3 * pieces);
    ends_.reserve(pieces);
    tensors_.reserve(pieces);
    data_.reserve(pieces);
}

void ResultPieces::add_like(const Tensor& x, int64_t without) {
    const auto shape = x.sizes();
    for (int64_t i = 0; i < (int64_t)shape.size(); i++) {
        if (i != without) sizes_.push_back(shape[i]);
    }
    ends_.push_back(sizes_.size());
}

void ResultPieces::add_empty() {
    sizes_.push_back(0);
    ends_.push_back(sizes_.size());
}

int64_t ResultPieces::numel(size_t i) const {
    int64_t numel = 1;
    for (size_t k = i ? ends_[i - 1] : 0; k < ends_[i]; k++) numel *= sizes_[k];
    return numel;
}

bool ResultPieces::take_earlier() {
    std::vector<Tensors> lists = take_spare();
    const size_t count = lists.size(), pieces = ends_.size();
    for (const Tensors& list : lists) {
        if (list.size() * count != pieces) return false;
    }
    size_t begin = 0;
    for (size_t i = 0; i < pieces && count; i++) {
        Tensor& x = lists[i % count][i / count];
        const auto shape = x.sizes();
        if (!std::equal(shape.begin(), shape.end(), sizes_.begin() + begin, sizes_.begin() + ends_[i])) return false;
        begin = ends_[i];
        data_.push_back(float_data(x));
        tensors_.push_back(std::move(x));
    }
    return count > 0;
}

void ResultPieces::allocate(const Tensor& like) {
    if (take_earlier()) return;
    tensors_.clear();
    data_.clear();
    std::vector<int64_t> starts, strides;
    starts.reserve(ends_.size());
    int64_t total = 0;
    for (size_t i = 0; i < ends_.size(); i++) {
        starts.push_back(total);
        total += (numel(i) + kPieceAlignment - 1) / kPieceAlignment * kPieceAlignment;
    }
    const Tensor whole = torch::stable::new_empty(like, {&total, 1}, ScalarType::Float);
    float* first = float_data(whole);
    for (size_t i = 0; i < ends_.size(); i++) {
        const size_t begin = i ? ends_[i - 1] : 0, dims = ends_[i] - begin;
        const int64_t* shape = sizes_.data() + begin;
        strides.assign(dims, 1);
        for (size_t k = dims; k-- > 1;) strides[k - 1] = strides[k] * shape[k];
        AtenTensorHandle view;
        TORCH_ERROR_CODE_CHECK(
            aoti_torch__reinterpret_tensor(whole.get(), (int64_t)dims, shape, strides.data(), starts[i], &view));
        tensors_.emplace_back(view);
        data_.push_back(first + starts[i]);
    }
}

Tensors ResultPieces::take(size_t first, size_t step) {
    Tensors found;
    found.reserve(tensors_.size() / step);
    for (size_t i = first; i < tensors_.size(); i += step) found.push_back(std::move(tensors_[i]));
    return found;
}

Buffers::Buffers(int units, int64_t row_elements, bool stored) {
    // An odd number of cache lines apart, so that the rows of a buffer do not compete for the same cache sets.
    stride = row_elements + 16;
    const int64_t planes = stored ? StoredState::kMost : 0;
    memory_.reset(new float[(3 + planes) * kRowElements + (2 * kFactored + 2 * units) * stride]);
    g = memory_.get();
    p = g + kRowElements;
    step = p + kRowElements;
    factor = step + kRowElements;
    expanded = factor + kFactored * stride;
    bias = expanded + kFactored * stride;
    line_bias = bias + units * stride;
    state = line_bias + units * stride;
}

void expand(const float* accumulator, const Shape& shape, const Tile& tile, int64_t line, float* out, int64_t stride) {
    for (int k = 0; k < kFactored; k++) {
        const float* x = accumulator + k * shape.line_length() + line * shape.inner;
        int64_t position = tile.start % shape.inner;
        for (int64_t i = 0; i < tile.n; i++) {
            out[k * stride + i] = x[position];
            if (++position == shape.inner) position = 0;
        }
    }
}

}  // namespace hf_lopt
