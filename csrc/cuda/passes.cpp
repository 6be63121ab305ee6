#include <algorithm>

#include "operators.h"
#include "stored_formats.h"

namespace hf_lopt {

std::tuple<Tensors, Tensors, Tensor> sums(Tensors params, Tensors grads, Tensors momenta, Tensors second_moments,
                                          Ints row_axes, Ints col_axes, double clip, bool moments,
                                          Tensors momentum_scales, Tensors second_scales) {
    check_sums(params, grads, momenta, second_moments, row_axes, col_axes, moments, momentum_scales, second_scales);
    const size_t count = params.size();
    const Device device(params[0]);
    SumsArgs args{};
    args.second_moments = (int32_t)second_moments[0].size(0);
    args.momenta = (int32_t)momenta[0].size(0);
    STD_TORCH_CHECK(!moments || args.second_moments + args.momenta <= kSecondMoments + kMomenta,
                    "the fused kernels are for at most 3 momenta and 1 second moment together, got ", args.momenta,
                    " and ", args.second_moments);
    args.width = statistics_width(args.second_moments, args.momenta);
    args.clip = (float)clip;

    TensorTableBuilder builder;
    ContiguousCopies copies;
    const Tensors none;
    const StoredFormats formats(params, moments ? momenta : none, moments ? second_moments : none, momentum_scales,
                                second_scales, nullptr, copies);
    Pieces pieces;
    std::vector<int64_t> places;
    for (size_t t = 0; t < count; t++) {
        builder.add(grads[t], row_axes[t], col_axes[t]);
        const TensorEntry& e = builder.entry(t);
        builder.set_any(sG, t, copies.readable(grads[t]));
        if (moments) {
            builder.set_any(sP, t, copies.readable(params[t]));
            builder.set_state(sM, t, copies.readable(momenta[t]));
            builder.set_state(sV, t, copies.readable(second_moments[t]));
        }
        places.push_back(pieces.add(e.factored ? e.line_length() : 0));
        places.push_back(pieces.add(e.factored ? e.vector_length() : 0));
    }
    pieces.allocate(params[0], builder.any_empty());
    Tensors rows, cols;
    for (size_t t = 0; t < count; t++) {
        const TensorEntry& e = builder.entry(t);
        builder.set(sLine, t, pieces.data() + places[2 * t]);
        builder.set(sVector, t, pieces.data() + places[2 * t + 1]);
        const int line = e.row_is_line ? 0 : 1;
        rows.push_back(
            pieces.piece(places[2 * t + line], e.factored ? shape_without(grads[t], row_axes[t]) : Ints{0}));
        cols.push_back(
            pieces.piece(places[2 * t + 1 - line], e.factored ? shape_without(grads[t], col_axes[t]) : Ints{0}));
    }
    formats.set(builder);
    args.table = builder.build(params[0], device.stream(), true, true);
    args.moments = moments && !formats.needed();
    const Tensor stats = doubles(params[0], {(int64_t)count, args.width}, builder.any_empty());
    if (builder.tiles() > 0) {
        const Tensor parts = floats(params[0], {builder.parts()});
        const Tensor partial = doubles(params[0], {builder.tiles(), args.width});
        args.parts = float_data(parts);
        args.partial = double_data(partial);
        args.stats = double_data(stats);
        launch_sums(args, builder.tiles(), device.stream());
        if (formats.needed()) launch_moments_stored({args, formats.table(builder)}, builder.tiles(), device.stream());
    }
    return {std::move(rows), std::move(cols), stats};
}

std::tuple<Tensors, Tensors, Tensors, Tensors> update_factored(Tensors rows, Tensors cols, Tensors row_sums,
                                                               Tensors col_sums, Tensors row_means, Ints row_sizes,
                                                               Ints col_sizes, Ints row_axes, Ints col_axes,
                                                               Floats decays) {
    std::vector<RowAccumulator> row_accumulators;
    check_update_factored(rows, cols, row_sums, col_sums, row_means, row_sizes, col_sizes, row_axes, col_axes, decays,
                          &row_accumulators);
    STD_TORCH_CHECK(decays.size() == kFactored, "the fused kernel is for 3 factored accumulators, got ",
                    decays.size());
    const size_t count = rows.size();
    const Device device(row_sums[0]);
    FactoredArgs args{};
    set_decays(decays, args.keep, args.add);
    ContiguousCopies copies;
    Pieces pieces;
    std::vector<FactoredEntry> entries;
    std::vector<size_t> tensors;
    std::vector<int64_t> places;
    const auto set = [&](FactoredEntry& e, FactoredSlot slot, const Tensor& x) {
        char* data = static_cast<char*>(copies.readable(x).data_ptr());
        if (!data) return;
        if (!args.base[slot]) args.base[slot] = data;
        e.at[slot] = data - args.base[slot];
    };
    for (size_t t = 0; t < count; t++) {
        if (row_axes[t] < 0) continue;
        FactoredEntry e{};
        e.outer = row_accumulators[t].outer;
        e.b = row_accumulators[t].b;
        e.inner = row_accumulators[t].inner;
        e.cols = col_sums[t].numel();
        e.row_size = (float)row_sizes[t];
        e.col_size = (float)col_sizes[t];
        e.means = row_means[t].numel() > 0;
        const int64_t items = std::max(e.cols, e.one_mean() ? e.b : e.outer * e.inner);
        const int64_t chunks = std::max<int64_t>((items + kFactoredChunk - 1) / kFactoredChunk, 1);
        STD_TORCH_CHECK(args.blocks + chunks * kFactored < INT32_MAX / 2,
                        "the parameters have too many elements for one step");
        e.first_block = args.blocks;
        e.chunks = (int32_t)chunks;
        args.blocks += e.chunks * kFactored;
        set(e, fRows, rows[t]);
        set(e, fCols, cols[t]);
        set(e, fRowSums, row_sums[t]);
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
        // Counters belong to a model: its accumulators stay where they are.
        const size_t counters = 2 + entries.size() * kFactored;
        char* data = device_copy(row_sums[0], content, device.stream(), counters * sizeof(uint32_t),
                                 rows[tensors[0]].data_ptr());
        args.entries = reinterpret_cast<const FactoredEntry*>(data);
        args.count = (int32_t)entries.size();
        args.started = reinterpret_cast<uint32_t*>(data + content.size());
        args.done = args.started + 1;
        args.arrived = args.started + 2;
        const Tensor partial = doubles(row_sums[0], {args.blocks});
        args.partial = double_data(partial);
        launch_update_factored(args, device.stream());
    }
    return out;
}

namespace {

// Entries for both later passes; `change`: params and accumulators are written.
void add_entries(const CommonArguments& x, TensorTableBuilder& builder, ContiguousCopies& copies, bool change,
                 const StoredFormats& formats) {
    for (size_t t = 0; t < x.params.size(); t++) {
        const auto take = [&](const Tensor& y) { return change ? copies.writable(y) : copies.readable(y); };
        builder.add(x.params[t], x.row_axes[t], x.col_axes[t], slice_of(x.slice_axes, t), formats.row_length(t));
        builder.set_any(sP, t, take(x.params[t]));
        builder.set_any(sG, t, copies.readable(x.grads[t]));
        builder.set_state(sM, t, take(x.momenta[t]));
        builder.set_state(sV, t, take(x.second_moments[t]));
        if (!builder.layout(t).factored) {
            builder.set_float(sD, t, take(x.diagonals[t]));
            continue;
        }
        const bool row_is_line = builder.layout(t).row_is_line;
        const auto set = [&](Slot of_line, Slot of_vector, const Tensor& row, const Tensor& col) {
            builder.set(row_is_line ? of_line : of_vector, t, copies.readable(row).data_ptr());
            builder.set(row_is_line ? of_vector : of_line, t, copies.readable(col).data_ptr());
        };
        set(sLine, sVector, x.rows[t], x.cols[t]);
        set(sLineFactor, sVectorFactor, x.row_factors[t], x.col_factors[t]);
    }
    formats.set(builder);
}

ScalesArgs scales_args(const FeatureConstants& c, const bool* skip) {
    ScalesArgs args{};
    args.momenta = kMomenta;
    std::copy(std::begin(c.keep_m), std::end(c.keep_m), args.keep_m);
    std::copy(std::begin(c.add_m), std::end(c.add_m), args.add_m);
    args.keep_v = c.keep_v;
    args.add_v = c.add_v;
    args.clip = c.clip;
    args.skip = skip;
    return args;
}

}  // namespace

Tensor feature_sums(const CommonArguments& common) {
    check_common(common);
    const Device device(common.params[0]);
    FeatureSumsArgs args{};
    args.constants = feature_constants(common);
    args.columns = feature_columns(common.features);
    TensorTableBuilder builder;
    ContiguousCopies copies;
    const StoredFormats formats(common.params, common.momenta, common.second_moments, common.momentum_scales,
                                common.second_scales, nullptr, copies);
    add_entries(common, builder, copies, false, formats);
    args.table = builder.build(common.params[0], device.stream(), true);
    const Tensor sums = doubles(common.params[0], {builder.entries(), args.columns.count}, builder.any_empty());
    if (builder.tiles() > 0) {
        const Tensor partial = doubles(common.params[0], {builder.tiles(), kSums});
        args.partial = double_data(partial);
        args.sums = double_data(sums);
        if (formats.needed()) {
            launch_feature_sums_stored({args, formats.table(builder)}, builder.tiles(), device.stream());
        } else {
            launch_feature_sums(args, builder.tiles(), device.stream());
        }
    }
    return sums;
}

std::tuple<Tensor, Tensor> apply_network(const CommonArguments& common, const NetworkArguments& network) {
    check_common(common);
    const Tensor& like = common.params[0];
    const Device device(like);
    ApplyArgs args{};
    args.constants = feature_constants(common);
    args.columns = feature_columns(common.features);
    const int64_t units = check_network(common, args.columns, network);
    args.skip = static_cast<const bool*>(network.skip.data_ptr());
    TensorTableBuilder builder;
    ContiguousCopies copies;
    StoredFormats formats(common.params, common.momenta, common.second_moments, common.momentum_scales,
                          common.second_scales, &network.rounding, copies);
    formats.form_scales(common.params, common.grads, common.momenta, common.second_moments,
                        scales_args(args.constants, args.skip), device, copies);
    add_entries(common, builder, copies, true, formats);
    const int64_t count = builder.entries();
    check_network_rows(network, count);
    args.exp_mult = (float)network.exp_mult;
    args.into_out = !network.out.empty();
    for (int i = 0; i < 3; i++) {
        args.weights[i] = view_of(network.weights[i]);
        args.biases[i] = view_of(network.biases[i]);
    }
    args.scale = view_of(network.scale);
    args.decay = view_of(network.decay);
    for (size_t t = 0; t < network.out.size(); t++) builder.set_float(sOut, t, copies.writable(network.out[t]));
    args.table = builder.build(like, device.stream(), true);
    const Tensor sums = doubles(like, {count, 1}, builder.any_empty());
    const Tensor stats = doubles(like, {count, kUpdateStats + 1}, builder.any_empty());
    if (builder.tiles() > 0) {
        const Tensor partial = doubles(like, {builder.tiles(), kUpdateStats});
        args.partial = double_data(partial);
        args.sums = double_data(sums);
        args.stats = double_data(stats);
        if (formats.needed()) {
            (units == 4   ? launch_apply_4_stored
             : units == 8 ? launch_apply_8_stored
             : network.tf32
                 ? launch_apply_32_tf32_stored
                 : launch_apply_32_stored)({args, formats.table(builder)}, builder.tiles(), device.stream());
        } else {
            (units == 4     ? launch_apply_4
             : units == 8   ? launch_apply_8
             : network.tf32 ? launch_apply_32_tf32
                            : launch_apply_32)(args, builder.tiles(), device.stream());
        }
    }
    copies.store();
    return {sums, stats};
}

Tensor adam_step(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensors& second_moments,
                 const AdamArguments& step) {
    const int64_t slices = check_adam_step(params, grads, momenta, second_moments, step);
    const size_t count = params.size();
    const Device device(params[0]);
    AdamArgs args{};
    set_decays({step.momentum_decay}, &args.keep_m, &args.add_m);
    set_decays({step.second_decay}, &args.keep_v, &args.add_v);
    args.clip = (float)step.clip;
    args.inner_eps = (float)step.inner_eps;
    args.outer_eps = (float)step.outer_eps;
    args.slices = (int32_t)slices;
    args.scale = view_of(step.scale);
    args.decay = view_of(step.decay);
    args.momentum_correction = float_data(step.momentum_correction);
    args.second_correction = float_data(step.second_correction);
    args.skip = static_cast<const bool*>(step.skip.data_ptr());
    TensorTableBuilder builder;
    ContiguousCopies copies;
    StoredFormats formats(params, momenta, second_moments, step.momentum_scales, step.second_scales, &step.rounding,
                          copies);
    ScalesArgs scales{};
    scales.momenta = 1;
    scales.keep_m[0] = args.keep_m;
    scales.add_m[0] = args.add_m;
    scales.keep_v = args.keep_v;
    scales.add_v = args.add_v;
    scales.clip = args.clip;
    scales.skip = args.skip;
    formats.form_scales(params, grads, momenta, second_moments, scales, device, copies);
    for (size_t t = 0; t < count; t++) {
        builder.add_flat(params[t], args.slices, formats.row_length(t));
        builder.set_any(sP, t, copies.writable(params[t]));
        builder.set_any(sG, t, copies.readable(grads[t]));
        builder.set_state(sM, t, copies.writable(momenta[t]));
        builder.set_state(sV, t, copies.writable(second_moments[t]));
    }
    formats.set(builder);
    args.table = builder.build(params[0], device.stream(), true);
    const Tensor sums = doubles(params[0], {(int64_t)count}, builder.any_empty());
    if (builder.tiles() > 0) {
        const Tensor partial = doubles(params[0], {builder.tiles()});
        args.partial = double_data(partial);
        args.sums = double_data(sums);
        if (formats.needed()) {
            launch_adam_stored({args, formats.table(builder)}, builder.tiles(), device.stream());
        } else {
            launch_adam(args, builder.tiles(), device.stream());
        }
    }
    copies.store();
    return sums;
}

namespace {

// A table of pairs: what is written and what is read.
TensorTable pairs(const Tensors& targets, const Tensors& values, const Ints& slice_axes, const Device& device,
                  TensorTableBuilder& builder, ContiguousCopies& copies, const StoredFormats* formats = nullptr) {
    for (size_t t = 0; t < targets.size(); t++) {
        builder.add(targets[t], -1, -1, slice_of(slice_axes, t), formats ? formats->row_length(t) : 0);
        builder.set_any(sP, t, copies.writable(targets[t]));
        builder.set_any(sG, t, copies.readable(values[t]));
    }
    if (formats) formats->set(builder);
    return builder.build(targets[0], device.stream(), false);
}

}  // namespace

void descend(Tensors params, Tensors steps, Tensor lr, Tensor weight_decay, std::optional<Tensor> squares,
             std::optional<Tensor> numel, double norm_eps, Ints slice_axes, Tensor skip, const Rounding& rounding) {
    check_pairs(params, steps, "params", "steps");
    check_slice_axes(params, slice_axes);
    if (params.empty()) return;
    const TensorChecks check(params[0]);
    check.flag(skip, "skip");
    const Device device(params[0]);
    DescendArgs args{};
    TensorTableBuilder builder;
    ContiguousCopies copies;
    const StoredFormats formats(params, {}, {}, {}, {}, &rounding, copies);
    args.table = pairs(params, steps, slice_axes, device, builder, copies, &formats);
    const int64_t count = (int64_t)params.size(), slices = builder.entries();
    args.rate_of_slice = check_rate(check, lr, count, slices, "lr");
    args.weight_decay_of_slice = check_rate(check, weight_decay, count, slices, "weight_decay");
    check_squares(check, squares, numel, slices);
    args.rate = view_of(lr);
    args.weight_decay = view_of(weight_decay);
    args.skip = static_cast<const bool*>(skip.data_ptr());
    args.norm_eps = norm_eps;
    if (squares) {
        args.squares = double_data(copies.readable(*squares));
        args.numel = double_data(copies.readable(*numel));
    }
    if (builder.tiles() > 0) {
        if (formats.needed()) {
            launch_descend_stored({args, formats.table(builder)}, builder.tiles(), device.stream());
        } else {
            launch_descend(args, builder.tiles(), device.stream());
        }
    }
    copies.store();
}

void assign(Tensors targets, Tensors values, Tensor skip) {
    check_pairs(targets, values, "targets", "values");
    if (targets.empty()) return;
    TensorChecks(targets[0]).flag(skip, "skip");
    const Device device(targets[0]);
    AssignArgs args{};
    args.skip = static_cast<const bool*>(skip.data_ptr());
    TensorTableBuilder builder;
    ContiguousCopies copies;
    args.table = pairs(targets, values, {}, device, builder, copies);
    if (builder.tiles() > 0) launch_assign(args, builder.tiles(), device.stream());
    copies.store();
}

void zero_nan(Tensors tensors) {
    check_pairs(tensors, tensors, "tensors", "tensors");
    if (tensors.empty()) return;
    const Device device(tensors[0]);
    AssignArgs args{};
    TensorTableBuilder builder;
    ContiguousCopies copies;
    args.table = pairs(tensors, tensors, {}, device, builder, copies);
    if (builder.tiles() > 0) launch_zero_nan(args, builder.tiles(), device.stream());
    copies.store();
}

}  // namespace hf_lopt
