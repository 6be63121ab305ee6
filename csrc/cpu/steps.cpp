// Steps of one pass: Adam with the variations of the learned rules, and a step that is already there.
#include <cmath>

#include "common.h"

namespace hf_lopt {

namespace {

float number(const Tensor& x, int64_t i = 0) {
    STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float && i < x.numel(),
                    "step sizes, decays and corrections must be float32, with a number per parameter or one for all");
    return static_cast<const float*>(x.data_ptr())[i * (x.dim() > 0 ? x.stride(0) : 0)];
}

double large_number(const Tensor& x, int64_t i, int64_t count) {
    STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Double && x.dim() == 1 && x.size(0) == count,
                    "squares and sizes must be float64, with a number for each slice");
    return static_cast<const double*>(x.data_ptr())[i * x.stride(0)];
}

// Slices of each of `count` tensors, for which there are numbers of their own.
int64_t slices(const Tensor& numbers, size_t count) {
    const int64_t n = numbers.numel();
    STD_TORCH_CHECK(n % (int64_t)count == 0, "there are ", n, " scales for ", count, " tensors");
    return n / (int64_t)count;
}

}  // namespace

Tensor adam_step(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensors& second_moments,
                 const AdamStep& step) {
    const size_t count = params.size();
    STD_TORCH_CHECK(count > 0 && grads.size() == count && momenta.size() == count && second_moments.size() == count,
                    "all lists must have one tensor per parameter");
    const int64_t size = (int64_t)count;
    Tensor result = torch::stable::new_zeros(params[0], {&size, 1}, torch::headeronly::ScalarType::Double);
    STD_TORCH_CHECK(step.skip.scalar_type() == torch::headeronly::ScalarType::Bool, "skip must be a bool tensor");
    if (*static_cast<const bool*>(step.skip.data_ptr())) return result;

    AdamConstants shared{};
    shared.keep_m = (float)step.momentum_decay;
    shared.add_m = 1.0f - shared.keep_m;
    shared.keep_v = (float)step.second_decay;
    shared.add_v = 1.0f - shared.keep_v;
    shared.clip = (float)step.clip;
    shared.second_scale = number(step.second_correction);
    shared.inner_eps = (float)step.inner_eps;
    shared.outer_eps = (float)step.outer_eps;
    const float momentum_correction = number(step.momentum_correction);

    std::vector<Operands> operands(count);
    std::vector<AdamConstants> constants(step.scale.numel(), shared);
    for (size_t i = 0; i < constants.size(); i++) {
        constants[i].step_scale = momentum_correction * number(step.scale, (int64_t)i);
        constants[i].decay = number(step.decay, (int64_t)i);
    }
    std::vector<Shape> shapes;
    Copies copies;
    for (size_t t = 0; t < count; t++) {
        Operands& o = operands[t];
        o.shape = Shape(params[t], -1, -1, slices(step.scale, count));
        shapes.push_back(o.shape);
        STD_TORCH_CHECK(grads[t].numel() == o.shape.numel && momenta[t].numel() == o.shape.numel &&
                            second_moments[t].numel() == o.shape.numel,
                        "a gradient or an accumulator has another shape than its parameter");
        o.p = Array(params[t]);
        o.g = Array(grads[t]);
        o.m = copies.writable(momenta[t]);
        o.v = copies.writable(second_moments[t]);
    }
    const std::vector<Tile> tiles = make_tiles(shapes);
    std::vector<double> partial(tiles.size());
    std::vector<Buffers> buffers;
    for (int64_t i = 0; i < worker_count(tiles); i++) buffers.emplace_back(0, kRowElements);
    for_each_tile(tiles, [&](int64_t i, int64_t worker) {
        const Tile& tile = tiles[i];
        const Operands& x = operands[tile.tensor];
        Row row{};
        row.n = tile.n;
        const int64_t columns = x.shape.columns, offset = tile.line * columns + tile.start;
        row.g = x.g.read(tile.line, tile.start, tile.n, columns, buffers[worker].g);
        row.p = row.p_out = x.p.read(tile.line, tile.start, tile.n, columns, buffers[worker].p);
        row.m[0] = x.m + offset;
        row.v = x.v + offset;
        partial[i] = kernels().adam(row, constants[tile.slice]);
        x.p.write(row.p_out, tile.line, tile.start, tile.n, columns);
    });
    copies.store();
    double* out = static_cast<double*>(result.data_ptr());
    for (size_t i = 0; i < tiles.size(); i++) out[tiles[i].tensor] += partial[i];
    return result;
}

void descend(Tensors params, Tensors steps, Tensor lr, Tensor weight_decay, std::optional<Tensor> squares,
             std::optional<Tensor> numel, double norm_eps, Ints slice_axes, Tensor skip) {
    const size_t count = params.size();
    STD_TORCH_CHECK(steps.size() == count, "all lists must have one tensor per parameter");
    STD_TORCH_CHECK(skip.scalar_type() == torch::headeronly::ScalarType::Bool, "skip must be a bool tensor");
    if (!count || *static_cast<const bool*>(skip.data_ptr())) return;
    struct Pair {
        Array p, step;
    };
    std::vector<Pair> pairs;
    std::vector<Shape> shapes;
    for (size_t t = 0; t < count; t++) {
        STD_TORCH_CHECK(steps[t].numel() == params[t].numel(), "a step has another shape than its parameter");
        shapes.emplace_back(params[t], -1, -1, slices_of(params, slice_axes, t));
        pairs.push_back({Array(params[t]), Array(steps[t])});
    }
    const int64_t total = slice_count(shapes);
    const auto unit = [&](int64_t slice) {
        return squares ? (float)(1.0 /
                                 std::sqrt(large_number(*squares, slice, total) / large_number(*numel, slice, total) +
                                           norm_eps))
                       : 1.0f;
    };
    // Of a slice or of its tensor.
    const auto place = [&](const Tensor& x, const Tile& tile) {
        return x.numel() == total ? tile.slice : x.numel() == 1 ? 0 : tile.tensor;
    };
    const std::vector<Tile> tiles = make_tiles(shapes);
    std::vector<Buffers> buffers;
    for (int64_t i = 0; i < worker_count(tiles); i++) buffers.emplace_back(0, kRowElements);
    for_each_tile(tiles, [&](int64_t i, int64_t worker) {
        const Tile& tile = tiles[i];
        const float rate = number(lr, place(lr, tile));
        const Pair& x = pairs[tile.tensor];
        const int64_t columns = shapes[tile.tensor].columns;
        float* p = x.p.read(tile.line, tile.start, tile.n, columns, buffers[worker].p);
        const float* step = x.step.read(tile.line, tile.start, tile.n, columns, buffers[worker].g);
        kernels().descend(p, step, tile.n, rate * unit(tile.slice),
                          rate * number(weight_decay, place(weight_decay, tile)));
        x.p.write(p, tile.line, tile.start, tile.n, columns);
    });
}

}  // namespace hf_lopt
