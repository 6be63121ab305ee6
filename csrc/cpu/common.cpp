#include "common.h"

#include <algorithm>

namespace hf_lopt {

namespace {

void set_decays(const std::vector<double>& decays, int count, float* keep, float* add) {
    STD_TORCH_CHECK((int)decays.size() == count,
                    "the fused kernels are for 3 momenta, 1 second moment and 3 factored ", "accumulators");
    for (int i = 0; i < count; i++) {
        keep[i] = (float)decays[i];
        add[i] = 1.0f - keep[i];
    }
}

}  // namespace

int64_t slices_of(const Tensors& params, const Ints& slice_axes, size_t t) {
    if (slice_axes.empty()) return 1;
    STD_TORCH_CHECK(slice_axes.size() == 2 * params.size(), "slice axes must have two entries per parameter");
    const Tensor& p = params[t];
    const int64_t a = slice_axes[2 * t], b = slice_axes[2 * t + 1];
    if (p.dim() < 2 || p.numel() == 0) return 1;
    return p.numel() / (a == b ? p.size(a) : p.size(a) * p.size(b));
}

const float* Copies::readable(const Tensor& x) {
    if (x.is_contiguous()) return float_data(x, "accumulators");
    kept_.push_back(torch::stable::contiguous(x));
    return float_data(kept_.back(), "accumulators");
}

float* Copies::writable(const Tensor& x) {
    if (x.is_contiguous()) return float_data(x, "accumulators");
    written_.emplace_back(x, torch::stable::contiguous(x));
    return float_data(written_.back().second, "accumulators");
}

void Copies::store() {
    for (auto& [original, copy] : written_) torch::stable::copy_(original, copy);
}

Problem::Problem(const Common& x) : columns(columns_of(x.features)) {
    const size_t count = checked_count(x);
    set_decays(x.momentum_decays, kMomenta, constants.keep_m, constants.add_m);
    set_decays(x.second_decays, 1, &constants.keep_v, &constants.add_v);
    set_decays(x.factored_decays, kFactored, constants.keep_d, constants.add_d);
    constants.clip = (float)x.clip;
    constants.unclipped = std::min(kSmallClip, constants.clip);
    constants.second_eps = (float)x.second_eps;
    constants.diagonal_eps = (float)x.diagonal_eps;

    tensors.resize(count);
    shapes.reserve(count);
    for (size_t t = 0; t < count; t++) {
        Operands& o = tensors[t];
        o.shape = Shape(x.params[t], x.row_axes[t], x.col_axes[t], slices_of(x.params, x.slice_axes, t));
        shapes.push_back(o.shape);
        const int64_t n = o.shape.numel;
        STD_TORCH_CHECK(
            x.grads[t].numel() == n && x.momenta[t].numel() == kMomenta * n && x.second_moments[t].numel() == n,
            "a gradient or an accumulator has another shape than its parameter");
        o.p = Array(x.params[t]);
        o.g = Array(x.grads[t]);
        o.m = copies_.writable(x.momenta[t]);
        o.v = copies_.writable(x.second_moments[t]);
        if (!o.shape.factored) {
            STD_TORCH_CHECK(x.diagonals[t].numel() == kFactored * n,
                            "a diagonal accumulator has another shape than its ", "parameter");
            o.d = copies_.writable(x.diagonals[t]);
            continue;
        }
        const bool swap = !o.shape.row_is_line;
        const Tensors &line = swap ? x.cols : x.rows, &along = swap ? x.rows : x.cols;
        const Tensors& line_factor = swap ? x.col_factors : x.row_factors;
        const Tensors& along_factor = swap ? x.row_factors : x.col_factors;
        for (const Tensors* list : {&line, &line_factor}) {
            STD_TORCH_CHECK((*list)[t].numel() == kFactored * o.shape.line_length(), "a factored accumulator or its ",
                            "factors have the wrong shape");
        }
        for (const Tensors* list : {&along, &along_factor}) {
            STD_TORCH_CHECK((*list)[t].numel() == kFactored * o.shape.vector_length(),
                            "a factored accumulator or its ", "factors have the wrong shape");
        }
        o.line = copies_.readable(line[t]);
        o.vector = copies_.readable(along[t]);
        o.line_factor = copies_.readable(line_factor[t]);
        o.vector_factor = copies_.readable(along_factor[t]);
    }
}

Buffers::Buffers(int units, int64_t row_elements) {
    // An odd number of cache lines apart, so that the rows of a buffer do not compete for the same cache sets.
    stride = row_elements + 16;
    memory_.reset(new float[3 * kRowElements + (2 * kFactored + 2 * units) * stride]);
    g = memory_.get();
    p = g + kRowElements;
    step = p + kRowElements;
    factor = step + kRowElements;
    expanded = factor + kFactored * stride;
    bias = expanded + kFactored * stride;
    line_bias = bias + units * stride;
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

void make_row(const Operands& x, const Tile& tile, int64_t line, int slot, Buffers& buffers, Row& row) {
    const Shape& shape = x.shape;
    const int64_t offset = line * shape.columns + tile.start;
    row.step_out = nullptr;
    row.n = tile.n;
    row.g = x.g.read(line, tile.start, tile.n, shape.columns, buffers.g + slot * tile.n);
    row.p = row.p_out = x.p.read(line, tile.start, tile.n, shape.columns, buffers.p + slot * tile.n);
    for (int k = 0; k < kMomenta; k++) row.m[k] = x.m + k * shape.numel + offset;
    row.v = x.v + offset;
    if (!shape.factored) {
        for (int k = 0; k < kFactored; k++) row.d[k] = x.d + k * shape.numel + offset;
        return;
    }
    const bool inner = shape.inner > 1;
    if (inner) expand(x.line_factor, shape, tile, line, buffers.factor, buffers.stride);
    for (int k = 0; k < kFactored; k++) {
        const float* along = x.vector_factor + k * shape.vector_length() + tile.vector;
        row.rho[k] = inner ? 1.0f : x.line_factor[k * shape.line_length() + line];
        row.factor[k] = along;
        if (inner) {
            float* product = buffers.factor + k * buffers.stride;
            for (int64_t i = 0; i < tile.n; i++) product[i] *= along[i];
            row.factor[k] = product;
        }
    }
}

}  // namespace hf_lopt
