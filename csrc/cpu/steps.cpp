// Steps of one pass: Adam with the variations of the learned rules, and a step that is already there.
#include <cmath>

#include "operands.h"

namespace hf_lopt {

namespace {

void write_parameter(const Array& p, float* values, const Tile& tile, int64_t line, int64_t columns, bool rounded,
                     const RandomPlace& place) {
    if (rounded) {
        p.write(values, line, tile.start, tile.n, columns, place.row(line, tile.start));
    } else {
        p.write(values, line, tile.start, tile.n, columns);
    }
}

}  // namespace

Tensor adam_step(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensors& second_moments,
                 const AdamArguments& step) {
    const int64_t slices = check_adam_step(params, grads, momenta, second_moments, step);
    const size_t count = params.size();
    const int64_t size = (int64_t)count;
    Tensor result = torch::stable::new_zeros(params[0], {&size, 1}, ScalarType::Double);
    if (*static_cast<const bool*>(step.skip.data_ptr())) return result;

    AdamConstants shared{};
    set_decays({step.momentum_decay}, &shared.keep_m, &shared.add_m);
    set_decays({step.second_decay}, &shared.keep_v, &shared.add_v);
    shared.clip = (float)step.clip;
    shared.second_scale = *float_data(step.second_correction);
    shared.inner_eps = (float)step.inner_eps;
    shared.outer_eps = (float)step.outer_eps;
    const float momentum_correction = *float_data(step.momentum_correction);
    const StridedView<float> scale = view_of(step.scale), decay = view_of(step.decay);
    std::vector<AdamConstants> constants(count * slices, shared);
    for (size_t i = 0; i < constants.size(); i++) {
        constants[i].step_scale = momentum_correction * scale((int64_t)i);
        constants[i].decay = decay((int64_t)i);
    }

    std::vector<Operands> operands(count);
    std::vector<Shape> shapes;
    ContiguousCopies copies;
    std::vector<RandomPlace> places = random_places(params, step.rounding);
    bool stored = false;
    for (size_t t = 0; t < count; t++) {
        Operands& o = operands[t];
        o.shape = Shape(params[t], -1, -1, slices);
        o.p = Array(params[t]);
        o.g = Array(grads[t]);
        o.place = std::move(places[t]);
        o.state = StoredState(momenta[t], second_moments[t], scales_of(step.momentum_scales, t),
                              scales_of(step.second_scales, t), true, copies);
        align(o.shape, &o.state, o.place);
        stored = stored || !o.state.in_place();
        shapes.push_back(o.shape);
    }
    const bool round_params = step.rounding.step && step.rounding.params;
    const std::vector<Tile> tiles = make_tiles(shapes);
    std::vector<double> partial(tiles.size());
    std::vector<Buffers> buffers;
    for (int64_t i = 0; i < worker_count(tiles); i++) buffers.emplace_back(0, kRowElements, stored);
    for_each_tile(tiles, [&](int64_t i, int64_t worker) {
        const Tile& tile = tiles[i];
        const Operands& x = operands[tile.tensor];
        const int64_t columns = x.shape.columns;
        Buffers& own = buffers[worker];
        for (int64_t line = tile.line; line < tile.line + tile.rows; line++) {
            RowData row{};
            row.n = tile.n;
            row.g = x.g.read(line, tile.start, tile.n, columns, own.g);
            row.p = row.p_out = x.p.read(line, tile.start, tile.n, columns, own.p);
            row.m[0] = x.state.read(0, line, tile.start, tile.n, columns, own.state);
            row.v = x.state.read(1, line, tile.start, tile.n, columns, own.state + kRowElements);
            partial[i] += kernels().adam(row, constants[tile.slice]);
            float* planes[] = {row.m[0], row.v};
            x.state.write(planes, line, tile.start, tile.n, columns, x.place);
            write_parameter(x.p, row.p_out, tile, line, columns, round_params, x.place);
        }
    });
    copies.store();
    double* out = static_cast<double*>(result.data_ptr());
    for (size_t i = 0; i < tiles.size(); i++) out[tiles[i].tensor] += partial[i];
    return result;
}

namespace {

// What `descend` works on: a parameter and its step.
struct Pair {
    Array p, step;
};

}  // namespace

void descend(Tensors params, Tensors steps, Tensor lr, Tensor weight_decay, std::optional<Tensor> squares,
             std::optional<Tensor> numel, double norm_eps, Ints slice_axes, Tensor skip, const Rounding& rounding) {
    check_pairs(params, steps, "params", "steps");
    check_slice_axes(params, slice_axes);
    if (params.empty()) return;
    const TensorChecks check(params[0]);
    check.flag(skip, "skip");
    std::vector<Pair> pairs;
    std::vector<Shape> shapes;
    const std::vector<RandomPlace> places = random_places(params, rounding);
    const bool round_params = rounding.step && rounding.params;
    for (size_t t = 0; t < params.size(); t++) {
        shapes.emplace_back(params[t], -1, -1, slices_of(params, slice_axes, t));
        align(shapes.back(), nullptr, places[t]);
        pairs.push_back({Array(params[t]), Array(steps[t])});
    }
    const int64_t slices = slice_count(shapes);
    const bool rate_of_slice = check_rate(check, lr, (int64_t)params.size(), slices, "lr");
    const bool decay_of_slice = check_rate(check, weight_decay, (int64_t)params.size(), slices, "weight_decay");
    check_squares(check, squares, numel, slices);
    if (*static_cast<const bool*>(skip.data_ptr())) return;
    const StridedView<float> rates = view_of(lr), decays = view_of(weight_decay);
    StridedView<double> sums{}, sizes{};
    if (squares) {
        sums = view_of<double>(*squares);
        sizes = view_of<double>(*numel);
    }
    const std::vector<Tile> tiles = make_tiles(shapes);
    std::vector<Buffers> buffers;
    for (int64_t i = 0; i < worker_count(tiles); i++) buffers.emplace_back(0, kRowElements, false);
    for_each_tile(tiles, [&](int64_t i, int64_t worker) {
        const Tile& tile = tiles[i];
        const float rate = rates(rate_of_slice ? tile.slice : tile.tensor);
        const float decay = rate * decays(decay_of_slice ? tile.slice : tile.tensor);
        const float unit = squares ? (float)(1.0 / std::sqrt(sums(tile.slice) / sizes(tile.slice) + norm_eps)) : 1.0f;
        const Pair& x = pairs[tile.tensor];
        const int64_t columns = shapes[tile.tensor].columns;
        for (int64_t line = tile.line; line < tile.line + tile.rows; line++) {
            float* p = x.p.read(line, tile.start, tile.n, columns, buffers[worker].p);
            const float* step = x.step.read(line, tile.start, tile.n, columns, buffers[worker].g);
            kernels().descend(p, step, tile.n, rate * unit, decay);
            write_parameter(x.p, p, tile, line, columns, round_params, places[tile.tensor]);
        }
    });
}

}  // namespace hf_lopt
