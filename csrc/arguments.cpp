#include "arguments.h"

#include <algorithm>
#include <iterator>
#include <sstream>

#include "features.h"

namespace hf_lopt {

namespace {

// "momenta[3]", or the name alone.
std::string place(const char* name, int64_t index) {
    std::ostringstream out;
    out << name;
    if (index >= 0) out << '[' << index << ']';
    return out.str();
}

std::string shape_of(const Tensor& x) {
    std::ostringstream out;
    out << '(';
    for (int64_t i = 0; i < x.dim(); i++) out << (i ? ", " : "") << x.size(i);
    out << ')';
    return out.str();
}

bool is_floating(ScalarType type) {
    return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

void check_length(size_t got, size_t wanted, const char* name) {
    STD_TORCH_CHECK(got == wanted, "all lists must have one entry per parameter: ", name, " has ", got, ", there are ",
                    wanted, " parameters");
}

void check_any(const Tensors& params) { STD_TORCH_CHECK(!params.empty(), "there must be at least one parameter"); }

}  // namespace

// ---- a tensor -----------------------------------------------------------------------------------------------------

void TensorChecks::type(const Tensor& x, ScalarType wanted, const char* name, int64_t index) const {
    const ScalarType got = x.scalar_type();
    STD_TORCH_CHECK(got == wanted, place(name, index), " must be ", torch::headeronly::toString(wanted),
                    " for the fused kernels, got ", torch::headeronly::toString(got));
    device(x, name, index);
}

void TensorChecks::numel(const Tensor& x, int64_t wanted, const char* name, int64_t index) const {
    const int64_t got = x.numel();
    STD_TORCH_CHECK(got == wanted, place(name, index), " has another shape than its parameter: ", got,
                    " elements, wanted ", wanted, "; its shape is ", shape_of(x));
}

void TensorChecks::dims(const Tensor& x, int64_t wanted, const char* name, int64_t index) const {
    STD_TORCH_CHECK(x.dim() == wanted, place(name, index), " must have ", wanted, " axes, got shape ", shape_of(x));
}

void TensorChecks::device(const Tensor& x, const char* name, int64_t index) const {
    if (device_ < 0) return;  // the dispatcher sends what has tensors on an accelerator there
    const int got = x.get_device_index();
    STD_TORCH_CHECK(got == device_, place(name, index), " must be on device ", device_, " like the others, got ",
                    got < 0 ? "the CPU" : std::to_string(got));
}

void TensorChecks::floating(const Tensor& x, int64_t wanted, const char* name, int64_t index) const {
    const ScalarType got = x.scalar_type();
    STD_TORCH_CHECK(is_floating(got), place(name, index),
                    " must be float32, bfloat16 or float16 for the fused kernels, got ",
                    torch::headeronly::toString(got));
    device(x, name, index);
    numel(x, wanted, name, index);
}

void TensorChecks::float32(const Tensor& x, int64_t wanted, const char* name, int64_t index) const {
    type(x, ScalarType::Float, name, index);
    numel(x, wanted, name, index);
}

void TensorChecks::float64(const Tensor& x, int64_t wanted, const char* name, int64_t index) const {
    type(x, ScalarType::Double, name, index);
    STD_TORCH_CHECK(x.numel() == wanted, place(name, index), " must have ", wanted, " numbers, got shape ",
                    shape_of(x));
}

void TensorChecks::flag(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Bool && x.numel() == 1, name,
                    " must be a bool tensor of one element, got ", torch::headeronly::toString(x.scalar_type()),
                    " of shape ", shape_of(x));
    device(x, name);
}

void TensorChecks::entries(const Tensor& x, int64_t wanted, int64_t count, const char* name, int64_t index) const {
    type(x, ScalarType::Float, name, index);
    STD_TORCH_CHECK(x.dim() == wanted || (wanted == 1 && x.dim() == 0), place(name, index), " must have ", wanted,
                    " axes, got shape ", shape_of(x));
    const int64_t size = x.dim() ? x.size(0) : 1;
    STD_TORCH_CHECK(size == 1 || size == count, place(name, index), " is for ", size, " tensors, there are ", count);
}

void TensorChecks::accumulator(const Tensor& x, const Tensors& scales, const Tensor& param, int64_t depth,
                               ScalarType codes, const char* name, int64_t index) const {
    const ScalarType got = x.scalar_type();
    const int64_t n = param.numel();
    STD_TORCH_CHECK(got == ScalarType::Float || got == ScalarType::BFloat16 || got == codes, place(name, index),
                    " must be float32, bfloat16 or codes of type ", torch::headeronly::toString(codes), ", got ",
                    torch::headeronly::toString(got));
    device(x, name, index);
    numel(x, depth * n, name, index);
    if (got != codes) return;
    STD_TORCH_CHECK(index < (int64_t)scales.size(), place(name, index), " has codes, but there are scales for ",
                    scales.size(), " tensors");
    const Tensor& scale = scales[index];
    type(scale, ScalarType::Float, "scales", index);
    // All axes of the parameter before its rows, the decays in front, the blocks of a row at the end.
    const int64_t axis = scale.dim() - 2;
    STD_TORCH_CHECK(axis >= 0 && axis < param.dim(), place("scales", index), " has shape ", shape_of(scale),
                    ", which has no axes for the rows of a parameter of shape ", shape_of(param));
    int64_t rows = 1, columns = 1;
    for (int64_t i = 0; i < param.dim(); i++) (i < axis ? rows : columns) *= param.size(i);
    numel(scale, depth * rows * ((columns + kCodeBlock - 1) / kCodeBlock), "scales", index);
}

void TensorChecks::state(const Tensor& x, int64_t wanted, const char* name, int64_t index) const {
    type(x, ScalarType::Float, name, index);
    STD_TORCH_CHECK(x.numel() == wanted && x.is_contiguous(), place(name, index), " must be contiguous and have ",
                    wanted, " numbers, got shape ", shape_of(x));
}

// ---- pass 0, factored accumulators --------------------------------------------------------------------------------

ParameterSizes sizes_of(const Tensor& x, int64_t row_axis, int64_t col_axis, int64_t index) {
    ParameterSizes sizes{x.numel(), 0, 0, row_axis >= 0};
    if (!sizes.factored) return sizes;
    const auto shape = x.sizes();
    const int64_t dim = (int64_t)shape.size();
    STD_TORCH_CHECK(row_axis < dim && col_axis >= 0 && col_axis < dim && row_axis != col_axis,
                    "the factored axes must be two axes of the tensor: ", place("params", index), " has shape ",
                    shape_of(x), ", got axes ", row_axis, " and ", col_axis);
    sizes.row = sizes.col = 1;
    for (int64_t i = 0; i < dim; i++) {
        if (i != row_axis) sizes.row *= shape[i];
        if (i != col_axis) sizes.col *= shape[i];
    }
    return sizes;
}

void check_sums(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensors& second_moments,
                const Ints& row_axes, const Ints& col_axes, bool moments, const Tensors& momentum_scales,
                const Tensors& second_scales) {
    check_any(params);
    const size_t count = params.size();
    check_length(grads.size(), count, "grads");
    check_length(momenta.size(), count, "momenta");
    check_length(second_moments.size(), count, "second_moments");
    check_length(row_axes.size(), count, "row_axes");
    check_length(col_axes.size(), count, "col_axes");
    STD_TORCH_CHECK(momenta[0].dim() > 0 && second_moments[0].dim() > 0,
                    "momenta and second_moments must have the decays as their first axis, got shapes ",
                    shape_of(momenta[0]), " and ", shape_of(second_moments[0]));
    const TensorChecks check(params[0]);
    const int64_t n_m = momenta[0].size(0), n_v = second_moments[0].size(0);
    for (size_t t = 0; t < count; t++) {
        const int64_t n = params[t].numel();
        check.floating(grads[t], n, "grads", (int64_t)t);
        sizes_of(grads[t], row_axes[t], col_axes[t], (int64_t)t);  // that the axes are there
        if (!moments) continue;
        check.floating(params[t], n, "params", (int64_t)t);
        check.accumulator(momenta[t], momentum_scales, params[t], n_m, ScalarType::Char, "momenta", (int64_t)t);
        check.accumulator(second_moments[t], second_scales, params[t], n_v, ScalarType::Byte, "second_moments",
                          (int64_t)t);
    }
}

void check_update_factored(const Tensors& rows, const Tensors& cols, const Tensors& row_sums, const Tensors& col_sums,
                           const Tensors& row_means, const Ints& row_sizes, const Ints& col_sizes,
                           const Ints& row_axes, const Ints& col_axes, const Floats& decays,
                           std::vector<RowAccumulator>* row_accumulators) {
    check_any(rows);
    const size_t count = rows.size();
    check_length(cols.size(), count, "cols");
    check_length(row_sums.size(), count, "row_sums");
    check_length(col_sums.size(), count, "col_sums");
    check_length(row_means.size(), count, "row_means");
    check_length(row_sizes.size(), count, "row_sizes");
    check_length(col_sizes.size(), count, "col_sizes");
    check_length(row_axes.size(), count, "row_axes");
    check_length(col_axes.size(), count, "col_axes");
    const TensorChecks check(row_sums[0]);
    const int64_t depth = (int64_t)decays.size();
    row_accumulators->assign(count, RowAccumulator());
    for (size_t t = 0; t < count; t++) {
        if (row_axes[t] < 0) continue;
        const int64_t i = (int64_t)t;
        check.type(row_sums[t], ScalarType::Float, "row_sums", i);
        check.type(col_sums[t], ScalarType::Float, "col_sums", i);
        // Axis B in the row accumulator, which has lost axis A.
        const int64_t axis = col_axes[t] - (col_axes[t] > row_axes[t]);
        const auto shape = row_sums[t].sizes();
        STD_TORCH_CHECK(axis >= 0 && axis < (int64_t)shape.size(),
                        "the row sums do not have the axis of the columns: ", place("row_sums", i), " has shape ",
                        shape_of(row_sums[t]), ", the axes are ", row_axes[t], " and ", col_axes[t]);
        RowAccumulator& row = (*row_accumulators)[t];
        for (int64_t k = 0; k < (int64_t)shape.size(); k++) {
            (k < axis ? row.outer : k == axis ? row.b : row.inner) *= shape[k];
        }
        check.float32(rows[t], depth * row.outer * row.b * row.inner, "rows", i);
        check.float32(cols[t], depth * col_sums[t].numel(), "cols", i);
        if (row_means[t].numel()) check.float32(row_means[t], depth * row.outer * row.inner, "row_means", i);
    }
}

// ---- passes 1 and 2 -----------------------------------------------------------------------------------------------

void check_slice_axes(const Tensors& params, const Ints& slice_axes) {
    if (slice_axes.empty()) return;
    STD_TORCH_CHECK(slice_axes.size() == 2 * params.size(), "slice axes must have two entries per parameter, got ",
                    slice_axes.size(), " for ", params.size(), " parameters");
    for (size_t t = 0; t < params.size(); t++) {
        const int64_t dim = params[t].dim(), a = slice_axes[2 * t], b = slice_axes[2 * t + 1];
        if (dim < 2) continue;  // one slice, whatever the axes
        STD_TORCH_CHECK(a >= 0 && a < dim && b >= 0 && b < dim, place("params", (int64_t)t), " of shape ",
                        shape_of(params[t]), " has no slices over the axes ", a, " and ", b);
    }
}

void check_common(const CommonArguments& x) {
    check_any(x.params);
    const size_t count = x.params.size();
    const std::pair<const Tensors*, const char*> lists[] = {
        {&x.grads, "grads"}, {&x.momenta, "momenta"},         {&x.second_moments, "second_moments"},
        {&x.rows, "rows"},   {&x.row_factors, "row_factors"}, {&x.diagonals, "diagonals"},
        {&x.cols, "cols"},   {&x.col_factors, "col_factors"}};
    for (const auto& [list, name] : lists) check_length(list->size(), count, name);
    check_length(x.row_axes.size(), count, "row_axes");
    check_length(x.col_axes.size(), count, "col_axes");
    check_slice_axes(x.params, x.slice_axes);
    const TensorChecks check(x.params[0]);
    for (size_t t = 0; t < count; t++) {
        const int64_t i = (int64_t)t;
        const ParameterSizes sizes = sizes_of(x.params[t], x.row_axes[t], x.col_axes[t], i);
        check.floating(x.params[t], sizes.numel, "params", i);
        check.floating(x.grads[t], sizes.numel, "grads", i);
        check.accumulator(x.momenta[t], x.momentum_scales, x.params[t], kMomenta, ScalarType::Char, "momenta", i);
        check.accumulator(x.second_moments[t], x.second_scales, x.params[t], kSecondMoments, ScalarType::Byte,
                          "second_moments", i);
        if (!sizes.factored) {
            check.float32(x.diagonals[t], kFactored * sizes.numel, "diagonals", i);
            continue;
        }
        check.float32(x.rows[t], kFactored * sizes.row, "rows", i);
        check.float32(x.cols[t], kFactored * sizes.col, "cols", i);
        check.float32(x.row_factors[t], kFactored * sizes.row, "row_factors", i);
        check.float32(x.col_factors[t], kFactored * sizes.col, "col_factors", i);
    }
}

FeatureColumns feature_columns(const Names& features) {
    FeatureColumns columns;
    columns.count = 0;
    std::fill(std::begin(columns.element), std::end(columns.element), -1);
    for (auto& vector : columns.vector) std::fill(std::begin(vector), std::end(vector), -1);
    for (const std::string& name : features) {
        const FeatureGroup* group = std::find_if(std::begin(kFeatureGroups), std::end(kFeatureGroups),
                                                 [&](const FeatureGroup& other) { return name == other.name; });
        STD_TORCH_CHECK(group != std::end(kFeatureGroups), "no fused kernel for the feature ", name);
        int32_t* first = group->kind == kOfElement ? columns.element + group->first : columns.vector[group->first];
        STD_TORCH_CHECK(*first < 0, "the feature ", name, " is listed twice");
        for (int i = 0; i < group->width; i++) first[i] = columns.count++;
    }
    return columns;
}

FeatureConstants feature_constants(const CommonArguments& x) {
    STD_TORCH_CHECK(x.momentum_decays.size() == kMomenta && x.second_decays.size() == kSecondMoments &&
                        x.factored_decays.size() == kFactored,
                    "the fused kernels are for 3 momenta, 1 second moment and 3 factored accumulators, got ",
                    x.momentum_decays.size(), ", ", x.second_decays.size(), " and ", x.factored_decays.size());
    FeatureConstants c{};
    set_decays(x.momentum_decays, c.keep_m, c.add_m);
    set_decays(x.second_decays, &c.keep_v, &c.add_v);
    set_decays(x.factored_decays, c.keep_d, c.add_d);
    c.clip = (float)x.clip;
    c.unclipped = std::min(kSmallClip, c.clip);
    c.second_eps = (float)x.second_eps;
    c.diagonal_eps = (float)x.diagonal_eps;
    return c;
}

void set_decays(const Floats& decays, float* keep, float* add) {
    for (size_t i = 0; i < decays.size(); i++) {
        keep[i] = (float)decays[i];
        add[i] = 1.0f - keep[i];
    }
}

int64_t check_network(const CommonArguments& common, const FeatureColumns& columns, const NetworkArguments& x) {
    const TensorChecks check(common.params[0]);
    STD_TORCH_CHECK(x.weights.size() == 3 && x.biases.size() == 3,
                    "the fused kernels are for networks of two hidden layers and two outputs, got ", x.weights.size(),
                    " matrices and ", x.biases.size(), " biases");
    for (int i = 0; i < 3; i++) {
        check.dims(x.weights[i], 3, "weights", i);
        check.dims(x.biases[i], 2, "biases", i);
    }
    const int64_t units = x.weights[0].size(2), inputs = columns.count;
    STD_TORCH_CHECK(units == 4 || units == 8 || units == 32, "no fused kernel for hidden layers of ", units, " units");
    STD_TORCH_CHECK(x.weights[0].size(1) == inputs, "the first layer has ", x.weights[0].size(1),
                    " inputs, the features have ", inputs, " columns");
    const int64_t widths[] = {inputs, units, units, 2};
    for (int i = 0; i < 3; i++) {
        STD_TORCH_CHECK(x.weights[i].size(1) == widths[i] && x.weights[i].size(2) == widths[i + 1] &&
                            x.biases[i].size(1) == widths[i + 1],
                        "layer ", i, " of the network must be of ", widths[i], " by ", widths[i + 1],
                        " weights, got weights of shape ", shape_of(x.weights[i]), " and biases of shape ",
                        shape_of(x.biases[i]));
    }
    // Networks with many units are evaluated by kernels without the products of the clipped gradient.
    for (const std::string& name : common.features) {
        STD_TORCH_CHECK(units < 32 || (name != "clip_g" && name != "g_rsqrt_v"), "no fused kernel for the feature ",
                        name, " and hidden layers of ", units, " units");
    }
    check.flag(x.skip, "skip");
    STD_TORCH_CHECK(x.out.empty() || x.out.size() == common.params.size(),
                    "out must be empty or have one tensor per parameter, got ", x.out.size(), " for ",
                    common.params.size(), " parameters");
    for (size_t t = 0; t < x.out.size(); t++) check.float32(x.out[t], common.params[t].numel(), "out", (int64_t)t);
    return units;
}

void check_network_rows(const NetworkArguments& x, int64_t rows) {
    const TensorChecks check(x.skip);
    for (int i = 0; i < 3; i++) {
        check.entries(x.weights[i], 3, rows, "weights of the network", i);
        check.entries(x.biases[i], 2, rows, "biases of the network", i);
    }
    check.entries(x.scale, 1, rows, "the scale of the network");
    check.entries(x.decay, 1, rows, "the decay of the network");
}

}  // namespace hf_lopt
