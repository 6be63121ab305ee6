// The checks of what stands beside the passes: Adam, given steps, and networks that are specialized for a tensor.
#include "arguments.h"

namespace hf_lopt {

int64_t check_adam_step(const Tensors& params, const Tensors& grads, const Tensors& momenta,
                        const Tensors& second_moments, const AdamArguments& step) {
    const size_t count = params.size();
    STD_TORCH_CHECK(count > 0, "there must be at least one parameter");
    STD_TORCH_CHECK(grads.size() == count && momenta.size() == count && second_moments.size() == count,
                    "all lists must have one entry per parameter: there are ", count, " parameters, ", grads.size(),
                    " grads, ", momenta.size(), " momenta, ", second_moments.size(), " second_moments");
    const TensorChecks check(params[0]);
    const int64_t given = step.scale.numel();
    STD_TORCH_CHECK(given == 1 || (given > 0 && given % (int64_t)count == 0), "there are ", given, " scales for ",
                    count, " tensors");
    const int64_t slices = given == 1 ? 1 : given / (int64_t)count;
    check.entries(step.scale, 1, (int64_t)count * slices, "scale");
    check.entries(step.decay, 1, (int64_t)count * slices, "decay");
    check.float32(step.momentum_correction, 1, "momentum_correction");
    check.float32(step.second_correction, 1, "second_correction");
    check.flag(step.skip, "skip");
    for (size_t t = 0; t < count; t++) {
        const int64_t i = (int64_t)t, n = params[t].numel();
        STD_TORCH_CHECK(n % slices == 0, "a tensor of ", n, " elements has no ", slices, " slices");
        check.floating(params[t], n, "params", i);
        check.floating(grads[t], n, "grads", i);
        check.accumulator(momenta[t], step.momentum_scales, params[t], 1, ScalarType::Char, "momenta", i);
        check.accumulator(second_moments[t], step.second_scales, params[t], 1, ScalarType::Byte, "second_moments", i);
    }
    return slices;
}

void check_pairs(const Tensors& targets, const Tensors& values, const char* target_name, const char* value_name) {
    STD_TORCH_CHECK(values.size() == targets.size(), "all lists must have one entry per parameter: there are ",
                    targets.size(), " ", target_name, " and ", values.size(), " ", value_name);
    if (targets.empty()) return;
    const TensorChecks check(targets[0]);
    for (size_t t = 0; t < targets.size(); t++) {
        const int64_t i = (int64_t)t, n = targets[t].numel();
        check.floating(targets[t], n, target_name, i);
        check.floating(values[t], n, value_name, i);
    }
}

bool check_rate(const TensorChecks& check, const Tensor& x, int64_t tensors, int64_t slices, const char* name) {
    const bool of_slices = x.numel() == slices;
    check.entries(x, 1, of_slices ? slices : tensors, name);
    return of_slices;
}

void check_squares(const TensorChecks& check, const std::optional<Tensor>& squares, const std::optional<Tensor>& numel,
                   int64_t slices) {
    if (!squares) return;
    STD_TORCH_CHECK(numel, "squares need the numbers of elements that they were taken over, got no numel");
    check.float64(*squares, slices, "squares");
    check.float64(*numel, slices, "numel");
    check.dims(*squares, 1, "squares");
    check.dims(*numel, 1, "numel");
}

std::vector<TensorPlace> check_places(const Tensors& params, const Rounding& rounding) {
    std::vector<TensorPlace> places;
    if (!rounding.step) return places;
    const TensorChecks check(params[0]);
    check.type(*rounding.step, ScalarType::Long, "step");
    check.numel(*rounding.step, 1, "step");
    size_t at = 0;
    for (const Tensor& p : params) {
        const int64_t dim = p.dim(), length = 2 + 2 * dim;
        STD_TORCH_CHECK(at + length <= rounding.places.size(), "places must have ", length,
                        " numbers for a tensor of ", dim, " axes, there are ", rounding.places.size(), " numbers for ",
                        params.size(), " tensors");
        const int64_t *numbers = rounding.places.data() + at, *starts = numbers + 2, *whole = starts + dim;
        const int64_t row_axis = numbers[1];
        STD_TORCH_CHECK(row_axis >= 0 && row_axis <= dim, "places: a tensor of ", dim, " axes has no axis ", row_axis);
        TensorPlace place;
        place.key = (uint32_t)numbers[0];
        for (int64_t i = 0; i < dim; i++) {
            if (i < row_axis) {
                place.sizes.push_back(p.size(i));
                place.starts.push_back(starts[i]);
                place.whole.push_back(whole[i]);
                continue;
            }
            place.row_length *= p.size(i);
            place.first_column = (uint32_t)(place.first_column * whole[i] + starts[i]);
            STD_TORCH_CHECK(i == row_axis || (starts[i] == 0 && whole[i] == p.size(i)),
                            "the fused kernels round rows at random that are not cut along axis ", i);
        }
        places.push_back(std::move(place));
        at += length;
    }
    STD_TORCH_CHECK(at == rounding.places.size(), "places has ", rounding.places.size(), " numbers, wanted ", at);
    return places;
}

namespace {

// The rows of a matrix, or a vector for one row: one for each of `count` tensors or one for all.
void check_rows(const Tensor& x, int64_t count, const char* name) {
    STD_TORCH_CHECK(x.dim() == 1 || x.dim() == 2, name, " must be a vector or a matrix, got ", x.dim(), " axes");
    const int64_t rows = x.dim() == 2 ? x.size(0) : 1;
    STD_TORCH_CHECK(rows == 1 || rows == count, name, ": there are ", rows, " rows for ", count, " tensors");
}

void check_feature_sums(const TensorChecks& check, const SpecializeArguments& x, int64_t count) {
    check.type(x.sums, ScalarType::Double, "sums");
    check.dims(x.sums, 2, "sums");
    STD_TORCH_CHECK(x.sums.size(0) == count, "sums: there are ", x.sums.size(0), " rows for ", count, " tensors");
}

// The widths of the layers that result, and that the networks and the sums have the widths that go with them.
void check_layers(const TensorChecks& check, const SpecializeArguments& x, NetworkSizes& sizes) {
    check.type(x.networks, ScalarType::Float, "networks");
    check_rows(x.networks, sizes.count, "networks");
    if (x.constants) {
        check.type(*x.constants, ScalarType::Float, "constants");
        check_rows(*x.constants, sizes.count, "constants");
        sizes.constants = x.constants->size(x.constants->dim() - 1);
    }
    STD_TORCH_CHECK(x.sizes.size() > 1, "a network has at least two widths, got ", x.sizes.size());
    for (const int64_t width : x.sizes) STD_TORCH_CHECK(width > 0, "a layer cannot be of width ", width);
    STD_TORCH_CHECK(x.outputs > 0 && x.outputs <= x.sizes.back(), "the networks have ", x.sizes.back(),
                    " outputs, of which ", x.outputs, " were asked for");
    STD_TORCH_CHECK(sizes.constants < x.sizes.front(), "the networks have ", x.sizes.front(), " inputs, there are ",
                    sizes.constants, " constants");
    sizes.widths = x.sizes;
    sizes.widths.front() -= sizes.constants;
    sizes.widths.back() = x.outputs;
    int64_t wanted = 0;
    for (size_t i = 0; i + 1 < x.sizes.size(); i++) {
        sizes.numbers += (sizes.widths[i] + 1) * sizes.widths[i + 1];
        wanted += (x.sizes[i] + 1) * x.sizes[i + 1];
    }
    const int64_t given = x.networks.size(x.networks.dim() - 1);
    STD_TORCH_CHECK(given == wanted, "networks of ", wanted, " numbers were given as ", given);
    check_feature_sums(check, x, sizes.count);
    STD_TORCH_CHECK(x.sums.size(1) == sizes.widths[0], "the first layer has ", sizes.widths[0], " inputs, there are ",
                    x.sums.size(1), " features");
}

}  // namespace

NetworkSizes check_specialize_networks(const SpecializeArguments& x) {
    const TensorChecks check(x.lr);
    check.dims(x.lr, 1, "lr");
    check.dims(x.numel, 1, "numel");
    check.type(x.numel, ScalarType::Double, "numel");
    NetworkSizes sizes;
    sizes.count = x.lr.size(0);
    // Without networks and floor nothing is asked of the elements.
    STD_TORCH_CHECK((x.sizes.empty() && !x.floor) || x.numel.size(0) == sizes.count, "there are ", x.numel.size(0),
                    " sizes for ", sizes.count, " tensors");
    check.entries(x.lr, 1, sizes.count, "lr");
    check.entries(x.weight_decay, 1, sizes.count, "weight_decay");
    for (size_t i = 0; i < x.factors.size(); i++) check.entries(x.factors[i], 1, sizes.count, "factors", (int64_t)i);
    if (!x.sizes.empty()) check_layers(check, x, sizes);
    if (x.floor) {
        check.entries(*x.floor, 1, sizes.count, "floor");
        check_feature_sums(check, x, sizes.count);
        STD_TORCH_CHECK(x.p_column >= 0 && x.p_column < x.sums.size(1),
                        "the scale of a parameter needs its sum of squares, got column ", x.p_column, " of sums");
    }
    return sizes;
}

}  // namespace hf_lopt
