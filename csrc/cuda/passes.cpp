#include <algorithm>
#include <cmath>

#include "operators.h"

namespace hf_lopt {

std::tuple<Tensors, Tensors, Tensor> sums(Tensors params, Tensors grads, Tensors momenta, Tensors second_moments,
                                          Ints row_axes, Ints col_axes, double clip, bool moments) {
    const size_t count = params.size();
    STD_TORCH_CHECK(count > 0, "there must be at least one parameter");
    STD_TORCH_CHECK(grads.size() == count && momenta.size() == count && second_moments.size() == count &&
                        row_axes.size() == count && col_axes.size() == count,
                    "all lists must have one entry per parameter");
    const Device device(params[0]);
    SumsArgs args{};
    args.second_moments = (int32_t)second_moments[0].size(0);
    args.momenta = (int32_t)momenta[0].size(0);
    STD_TORCH_CHECK(!moments || args.second_moments + args.momenta <= 1 + kMomenta,
                    "the fused kernels are for 3 momenta and 1 second moment");
    args.width = kGradientStats + 1 + 2 * (args.second_moments + args.momenta);
    args.clip = (float)clip;
    args.moments = moments;

    TableBuilder builder;
    Copies copies;
    Pieces pieces;
    std::vector<int64_t> places;
    for (size_t t = 0; t < count; t++) {
        builder.add(grads[t], row_axes[t], col_axes[t]);
        const Entry& e = builder.entry(t);
        builder.set_any(sG, t, copies.readable(grads[t]));
        if (moments) {
            builder.set_any(sP, t, copies.readable(params[t]));
            builder.set_float(sM, t, copies.readable(momenta[t]), "momenta");
            builder.set_float(sV, t, copies.readable(second_moments[t]), "second moments");
        }
        places.push_back(pieces.add(e.factored ? e.line_length() : 0));
        places.push_back(pieces.add(e.factored ? e.vector_length() : 0));
    }
    pieces.allocate(params[0], builder.any_empty());
    Tensors rows, cols;
    for (size_t t = 0; t < count; t++) {
        const Entry& e = builder.entry(t);
        builder.set(sLine, t, pieces.data() + places[2 * t]);
        builder.set(sVector, t, pieces.data() + places[2 * t + 1]);
        const int line = e.row_is_line ? 0 : 1;
        rows.push_back(
            pieces.piece(places[2 * t + line], e.factored ? shape_without(grads[t], row_axes[t]) : Ints{0}));
        cols.push_back(
            pieces.piece(places[2 * t + 1 - line], e.factored ? shape_without(grads[t], col_axes[t]) : Ints{0}));
    }
    args.table = builder.build(params[0], device.stream(), true, true);
    const Tensor stats = doubles(params[0], {(int64_t)count, args.width}, builder.any_empty());
    if (builder.tiles() > 0) {
        const Tensor parts = floats(params[0], {builder.parts()});
        const Tensor partial = doubles(params[0], {builder.tiles(), args.width});
        args.parts = float_data(parts);
        args.partial = double_data(partial);
        args.stats = double_data(stats);
        launch_sums(args, builder.tiles(), device.stream());
    }
    return {std::move(rows), std::move(cols), stats};
}

std::tuple<Tensors, Tensors, Tensors, Tensors> update_factored(Tensors rows, Tensors cols, Tensors row_sums,
                                                               Tensors col_sums, Tensors row_means, Ints row_sizes,
                                                               Ints col_sizes, Ints row_axes, Ints col_axes,
                                                               Floats decays) {
    const size_t count = rows.size();
    STD_TORCH_CHECK(count > 0, "there must be at least one parameter");
    for (const Tensors* list : {&cols, &row_sums, &col_sums, &row_means}) {
        STD_TORCH_CHECK(list->size() == count, "all lists must have one tensor per parameter");
    }
    for (const Ints* list : {&row_sizes, &col_sizes, &row_axes, &col_axes}) {
        STD_TORCH_CHECK(list->size() == count, "axes and sizes must have one entry per parameter");
    }
    const Device device(row_sums[0]);
    FactoredArgs args{};
    set_decays(decays, kFactored, args.keep, args.add);
    Copies copies;
    Pieces pieces;
    std::vector<FactoredEntry> entries;
    std::vector<size_t> tensors;
    std::vector<int64_t> places;
    const auto set = [&](FactoredEntry& e, FactoredSlot slot, const Tensor& x) {
        STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "factored accumulators must be float32");
        char* data = static_cast<char*>(copies.readable(x).data_ptr());
        if (!data) return;
        if (!args.base[slot]) args.base[slot] = data;
        e.at[slot] = data - args.base[slot];
    };
    for (size_t t = 0; t < count; t++) {
        if (row_axes[t] < 0) continue;
        const Tensor& sums = row_sums[t];
        STD_TORCH_CHECK(
            rows[t].numel() == kFactored * sums.numel() && cols[t].numel() == kFactored * col_sums[t].numel(),
            "a factored accumulator has another shape than the sums for it");
        FactoredEntry e{};
        e.outer = e.b = e.inner = 1;
        // Axis B in the row accumulator, which has lost axis A.
        const int64_t axis = col_axes[t] - (col_axes[t] > row_axes[t]);
        STD_TORCH_CHECK(axis >= 0 && axis < sums.dim(), "the row sums do not have the axis of the columns");
        for (int64_t i = 0; i < sums.dim(); i++) (i < axis ? e.outer : i == axis ? e.b : e.inner) *= sums.size(i);
        e.cols = col_sums[t].numel();
        e.row_size = (float)row_sizes[t];
        e.col_size = (float)col_sizes[t];
        e.means = row_means[t].numel() > 0;
        STD_TORCH_CHECK(!e.means || row_means[t].numel() == kFactored * e.outer * e.inner,
                        "the means of a row accumulator have the wrong shape");
        set(e, fRows, rows[t]);
        set(e, fCols, cols[t]);
        set(e, fRowSums, sums);
        set(e, fColSums, col_sums[t]);
        if (e.means) set(e, fMeans, row_means[t]);
        for (const Tensor* x : {&rows[t], &cols[t], &rows[t], &cols[t]}) places.push_back(pieces.add(x->numel()));
        for (int i = 0; i < 4; i++) e.at[fNewRows + i] = places[places.size() - 4 + i] * (int64_t)sizeof(float);
        entries.push_back(e);
        tensors.push_back(t);
    }
    const int64_t empty = pieces.add(0);
    pieces.allocate(row_sums[0], false);
    for (int slot = fNewRows; slot <= fColFactors; slot++) args.base[slot] = reinterpret_cast<char*>(pieces.data());
    std::tuple<Tensors, Tensors, Tensors, Tensors> out;
    Tensors* lists[] = {&std::get<0>(out), &std::get<1>(out), &std::get<2>(out), &std::get<3>(out)};
    for (size_t t = 0, i = 0; t < count; t++) {
        const bool factored = row_axes[t] >= 0;
        for (int j = 0; j < 4; j++) {
            const Tensor& like = j % 2 ? cols[t] : rows[t];
            lists[j]->push_back(factored ? pieces.piece(places[4 * i + j], shape_without(like, -1))
                                         : pieces.piece(empty, {0}));
        }
        i += factored;
    }
    if (!entries.empty()) {
        std::vector<char> content;
        append(content, entries.data(), entries.size());
        args.entries = reinterpret_cast<const FactoredEntry*>(device_copy(row_sums[0], content, device.stream()));
        launch_update_factored(args, (int)entries.size(), device.stream());
    }
    return out;
}

namespace {

Constants constants_of(const Common& x) {
    Constants c{};
    set_decays(x.momentum_decays, kMomenta, c.keep_m, c.add_m);
    set_decays(x.second_decays, 1, &c.keep_v, &c.add_v);
    set_decays(x.factored_decays, kFactored, c.keep_d, c.add_d);
    c.clip = (float)x.clip;
    c.second_eps = (float)x.second_eps;
    c.diagonal_eps = (float)x.diagonal_eps;
    return c;
}

// The two axes of a slice of tensor `t`; null where tensors are not sliced.
const int64_t* slice_of(const Ints& slice_axes, size_t t, size_t count) {
    if (slice_axes.empty()) return nullptr;
    STD_TORCH_CHECK(slice_axes.size() == 2 * count, "slice axes must have two entries per parameter");
    return &slice_axes[2 * t];
}

// Entries for both later passes; `change`: params and accumulators are written.
void add_entries(const Common& x, TableBuilder& builder, Copies& copies, bool change) {
    const size_t count = checked_count(x);
    for (size_t t = 0; t < count; t++) {
        const auto take = [&](const Tensor& y) { return change ? copies.writable(y) : copies.readable(y); };
        builder.add(x.params[t], x.row_axes[t], x.col_axes[t], slice_of(x.slice_axes, t, count));
        const TableBuilder::Whole& e = builder.whole(t);
        STD_TORCH_CHECK(x.grads[t].numel() == e.numel && x.momenta[t].numel() == kMomenta * e.numel &&
                            x.second_moments[t].numel() == e.numel,
                        "a gradient or an accumulator has another shape than its parameter");
        builder.set_any(sP, t, take(x.params[t]));
        builder.set_any(sG, t, copies.readable(x.grads[t]));
        builder.set_float(sM, t, take(x.momenta[t]), "momenta");
        builder.set_float(sV, t, take(x.second_moments[t]), "second moments");
        if (!e.factored) {
            STD_TORCH_CHECK(x.diagonals[t].numel() == kFactored * e.numel,
                            "a diagonal accumulator has another shape than its parameter");
            builder.set_float(sD, t, take(x.diagonals[t]), "diagonal accumulators");
            continue;
        }
        const bool row = e.row_is_line;
        const std::pair<Slot, const Tensor&> parts[] = {{sLine, row ? x.rows[t] : x.cols[t]},
                                                        {sLineFactor, row ? x.row_factors[t] : x.col_factors[t]},
                                                        {sVector, row ? x.cols[t] : x.rows[t]},
                                                        {sVectorFactor, row ? x.col_factors[t] : x.row_factors[t]}};
        for (const auto& [slot, y] : parts) {
            const int64_t length = slot == sLine || slot == sLineFactor ? e.lines : e.vectors;
            STD_TORCH_CHECK(y.numel() == kFactored * length && y.scalar_type() == ScalarType::Float,
                            "a factored accumulator or its factors have the wrong shape");
            builder.set(slot, t, copies.readable(y).data_ptr());
        }
    }
}

}  // namespace

Tensor feature_sums(const Common& common) {
    STD_TORCH_CHECK(!common.params.empty(), "there must be at least one parameter");
    const Device device(common.params[0]);
    FeatureSumsArgs args{};
    args.constants = constants_of(common);
    args.columns = columns_of(common.features);
    TableBuilder builder;
    Copies copies;
    add_entries(common, builder, copies, false);
    args.table = builder.build(common.params[0], device.stream(), true);
    const Tensor sums = doubles(common.params[0], {builder.entries(), args.columns.count}, builder.any_empty());
    if (builder.tiles() > 0) {
        const Tensor partial = doubles(common.params[0], {builder.tiles(), kSums});
        args.partial = double_data(partial);
        args.sums = double_data(sums);
        launch_feature_sums(args, builder.tiles(), device.stream());
    }
    return sums;
}

std::tuple<Tensor, Tensor> apply_network(const Common& common, const Weights& w) {
    STD_TORCH_CHECK(!common.params.empty(), "there must be at least one parameter");
    const Tensor& like = common.params[0];
    const Device device(like);
    STD_TORCH_CHECK(w.weights.size() == 3 && w.biases.size() == 3 && w.weights[2].size(2) == 2,
                    "the fused kernels are for networks of two hidden layers and two outputs");
    const int64_t units = w.weights[0].size(2);
    STD_TORCH_CHECK(w.weights[1].size(1) == units && w.weights[1].size(2) == units && w.weights[2].size(1) == units,
                    "the hidden layers must be of the same width");
    STD_TORCH_CHECK(units == 4 || units == 8 || units == 32, "no fused kernel for hidden layers of ", units, " units");
    ApplyArgs args{};
    args.constants = constants_of(common);
    args.columns = columns_of(common.features);
    STD_TORCH_CHECK(w.weights[0].size(1) == args.columns.count, "the first layer has ", w.weights[0].size(1),
                    " inputs, the features have ", args.columns.count, " columns");
    args.skip = flag(w.skip);
    args.exp_mult = (float)w.exp_mult;
    args.into_out = !w.out.empty();
    TableBuilder builder;
    Copies copies;
    add_entries(common, builder, copies, true);
    const int64_t count = builder.entries();
    for (int i = 0; i < 3; i++) {
        args.weights[i] = strided(w.weights[i], count, "the network");
        args.biases[i] = strided(w.biases[i], count, "the network");
    }
    args.scale = strided(w.scale, count, "the scale of the network");
    args.decay = strided(w.decay, count, "the decay");
    STD_TORCH_CHECK(w.out.empty() || w.out.size() == common.params.size(),
                    "out must be empty or have one tensor per parameter");
    for (size_t t = 0; t < w.out.size(); t++) {
        STD_TORCH_CHECK(w.out[t].numel() == builder.whole(t).numel, "out has another shape than its parameter");
        builder.set_float(sOut, t, copies.writable(w.out[t]), "out");
    }
    args.table = builder.build(like, device.stream(), true);
    const Tensor sums = doubles(like, {count, 1}, builder.any_empty());
    const Tensor stats = doubles(like, {count, kUpdateStats + 1}, builder.any_empty());
    if (builder.tiles() > 0) {
        const Tensor partial = doubles(like, {builder.tiles(), kUpdateStats});
        args.partial = double_data(partial);
        args.sums = double_data(sums);
        args.stats = double_data(stats);
        (units == 4   ? launch_apply_4
         : units == 8 ? launch_apply_8
                      : launch_apply_32)(args, builder.tiles(), device.stream());
    }
    copies.store();
    return {sums, stats};
}

Tensor adam_step(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensors& second_moments,
                 const AdamStep& step) {
    const size_t count = params.size();
    STD_TORCH_CHECK(count > 0 && grads.size() == count && momenta.size() == count && second_moments.size() == count,
                    "all lists must have one tensor per parameter");
    const Device device(params[0]);
    AdamArgs args{};
    args.keep_m = (float)step.momentum_decay;
    args.add_m = 1.0f - args.keep_m;
    args.keep_v = (float)step.second_decay;
    args.add_v = 1.0f - args.keep_v;
    args.clip = (float)step.clip;
    args.inner_eps = (float)step.inner_eps;
    args.outer_eps = (float)step.outer_eps;
    STD_TORCH_CHECK(step.scale.numel() == 1 || step.scale.numel() % (int64_t)count == 0, "there are ",
                    step.scale.numel(), " scales for ", count, " tensors");
    args.slices = (int32_t)std::max<int64_t>(step.scale.numel() / (int64_t)count, 1);
    args.scale = strided(step.scale, (int64_t)count * args.slices, "the scale");
    args.decay = strided(step.decay, (int64_t)count * args.slices, "the decay");
    args.momentum_correction = strided(step.momentum_correction, 1, "the correction of the momentum").data;
    args.second_correction = strided(step.second_correction, 1, "the correction of the second moment").data;
    args.skip = flag(step.skip);
    TableBuilder builder;
    Copies copies;
    for (size_t t = 0; t < count; t++) {
        builder.add_flat(params[t], args.slices);
        const int64_t n = params[t].numel();
        STD_TORCH_CHECK(momenta[t].numel() == n && second_moments[t].numel() == n,
                        "a gradient or an accumulator has another shape than its parameter");
        builder.set_any(sP, t, copies.writable(params[t]));
        builder.set_any(sG, t, copies.readable(grads[t]));
        builder.set_float(sM, t, copies.writable(momenta[t]), "momenta");
        builder.set_float(sV, t, copies.writable(second_moments[t]), "second moments");
    }
    args.table = builder.build(params[0], device.stream(), true);
    const Tensor sums = doubles(params[0], {(int64_t)count}, builder.any_empty());
    if (builder.tiles() > 0) {
        const Tensor partial = doubles(params[0], {builder.tiles()});
        args.partial = double_data(partial);
        args.sums = double_data(sums);
        launch_adam(args, builder.tiles(), device.stream());
    }
    copies.store();
    return sums;
}

namespace {

// A table of pairs: what is written and what is read.
Table pairs(const Tensors& targets, const Tensors& values, const Ints& slice_axes, const Device& device,
            TableBuilder& builder, Copies& copies) {
    STD_TORCH_CHECK(!targets.empty() && values.size() == targets.size(),
                    "both lists must have one tensor per parameter");
    for (size_t t = 0; t < targets.size(); t++) {
        builder.add(targets[t], -1, -1, slice_of(slice_axes, t, targets.size()));
        builder.set_any(sP, t, copies.writable(targets[t]));
        builder.set_any(sG, t, copies.readable(values[t]));
    }
    return builder.build(targets[0], device.stream(), false);
}

}  // namespace

void descend(Tensors params, Tensors steps, Tensor lr, Tensor weight_decay, std::optional<Tensor> squares,
             std::optional<Tensor> numel, double norm_eps, Ints slice_axes, Tensor skip) {
    STD_TORCH_CHECK(!params.empty(), "there must be at least one parameter");
    const Device device(params[0]);
    DescendArgs args{};
    TableBuilder builder;
    Copies copies;
    args.table = pairs(params, steps, slice_axes, device, builder, copies);
    const int64_t count = (int64_t)params.size(), slices = builder.entries();
    const auto numbers = [&](const Tensor& x, const char* what, bool& of_slice) {
        of_slice = x.numel() == slices;
        return strided(x, of_slice ? slices : count, what);
    };
    args.rate = numbers(lr, "lr", args.rate_of_slice);
    args.weight_decay = numbers(weight_decay, "the weight decay", args.weight_decay_of_slice);
    args.skip = flag(skip);
    args.norm_eps = norm_eps;
    Tensors kept;
    if (squares) {
        STD_TORCH_CHECK(numel && squares->numel() == slices && numel->numel() == slices,
                        "there must be a sum of squares and a size for each slice");
        for (const auto& [x, data] : {std::pair{&*squares, &args.squares}, std::pair{&*numel, &args.numel}}) {
            STD_TORCH_CHECK(x->scalar_type() == ScalarType::Double, "sums of squares and sizes must be float64");
            kept.push_back(x->is_contiguous() ? *x : torch::stable::contiguous(*x));
            *data = double_data(kept.back());
        }
    }
    if (builder.tiles() > 0) launch_descend(args, builder.tiles(), device.stream());
    copies.store();
}

void assign(Tensors targets, Tensors values, Tensor skip) {
    if (targets.empty()) return;
    const Device device(targets[0]);
    AssignArgs args{};
    args.skip = flag(skip);
    TableBuilder builder;
    Copies copies;
    args.table = pairs(targets, values, {}, device, builder, copies);
    if (builder.tiles() > 0) launch_assign(args, builder.tiles(), device.stream());
    copies.store();
}

void zero_nan(Tensors tensors) {
    if (tensors.empty()) return;
    const Device device(tensors[0]);
    AssignArgs args{};
    TableBuilder builder;
    Copies copies;
    args.table = pairs(tensors, tensors, {}, device, builder, copies);
    if (builder.tiles() > 0) launch_zero_nan(args, builder.tiles(), device.stream());
    copies.store();
}

}  // namespace hf_lopt
