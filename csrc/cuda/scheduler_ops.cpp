#include <cmath>

#include "operators.h"
#include "scheduler.h"

namespace hf_lopt {

namespace {

// The data of float64 numbers that have passed the checks, as statistics and sums are read: in one piece.
const double* statistics(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous for the fused kernels");
    return double_data(x);
}

// The running means and minima of the loss, both updated in place, and the decays of the means.
void set_loss_buffer(const Tensors& loss_buffer, double horizon, AdvanceArgs& args) {
    if (loss_buffer.empty()) return;
    args.loss_means = float_data(loss_buffer[0]);
    args.loss_min = float_data(loss_buffer[1]);
    for (int i = 0; i < kLossDecays; i++) {
        const double exponent = 1.0 + (std::log10(horizon) - 1.0) * i / (kLossDecays - 1);
        args.loss_decay[i] = std::exp(-1.0 / std::pow(10.0, exponent));
    }
}

// What VeLO's features of each tensor are formed from: statistics (rows, 11), sums of squares (rows, F), numbers of
// elements (rows,) and the one-hot ranks (rows, 5).
void set_tensor_inputs(ContiguousCopies& copies, const Tensors& tensor_inputs, int64_t p_column, AdvanceArgs& args) {
    if (tensor_inputs.empty()) return;
    const Tensor &moments = tensor_inputs[0], &totals = tensor_inputs[1];
    args.moments = statistics(moments, "statistics");
    args.totals = statistics(totals, "sums");
    args.moments_width = (int32_t)moments.size(1);
    args.totals_width = (int32_t)totals.size(1);
    args.numel = double_data(copies.readable(tensor_inputs[2]));
    args.ranks = float_data(copies.readable(tensor_inputs[3]));
    args.p_column = (int32_t)p_column;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> advance(Tensors stats, Tensors sums, std::optional<Tensor> bad,
                                           std::optional<Tensor> loss, Tensor counters, Tensors loss_buffer,
                                           double horizon, Floats corrected, Tensors tensor_inputs, int64_t p_column,
                                           int64_t rows) {
    const Device device(counters);
    check_advance(stats, sums, bad, loss, counters, loss_buffer, horizon, tensor_inputs, p_column, rows);
    STD_TORCH_CHECK(stats.size() <= kMaxLists && sums.size() <= kMaxLists && corrected.size() <= kMaxLists,
                    "the fused kernel takes at most ", kMaxLists, " lists, got ", stats.size(), ", ", sums.size(),
                    " and ", corrected.size());
    AdvanceArgs args{};
    ContiguousCopies copies;
    for (const Tensor& x : stats) {
        const int i = args.stat_lists++;
        args.stats[i] = statistics(x, "stats");
        args.stat_rows[i] = x.size(0);
        args.stat_width[i] = (int32_t)x.size(1);
    }
    for (const Tensor& x : sums) {
        const int i = args.sum_lists++;
        args.sums[i] = statistics(x, "sums");
        args.sum_count[i] = x.numel();
    }
    if (bad) args.bad = static_cast<const bool*>(bad->data_ptr());
    if (loss) args.loss = float_data(copies.readable(*loss));
    args.counters = static_cast<int64_t*>(counters.data_ptr());
    set_loss_buffer(loss_buffer, horizon, args);
    args.horizon = (float)horizon;
    args.corrections = (int32_t)corrected.size();
    for (size_t i = 0; i < corrected.size(); i++) args.corrected[i] = corrected[i];
    args.rows = (int32_t)rows;
    set_tensor_inputs(copies, tensor_inputs, p_column, args);
    const Tensor skip =
        torch::stable::new_empty(counters, torch::headeronly::IntHeaderOnlyArrayRef(), ScalarType::Bool);
    const Tensor features = floats(counters, {kRunFeatures + args.corrections});
    const Tensor inputs = floats(counters, {rows, kShared + (tensor_inputs.empty() ? 0 : kTensorInputs)});
    args.skip = static_cast<bool*>(skip.data_ptr());
    args.features = float_data(features);
    args.inputs = float_data(inputs);
    launch_advance(args, device.stream());
    return {skip, features, inputs};
}

namespace {

// A table of the scheduler's states; `bases` are those of hidden and cell.
const StateEntry* states(const Tensor& like, const Tensors& hidden, const Tensors* cell, int64_t units, char** bases,
                         void* stream) {
    const TensorChecks check(like);
    std::vector<StateEntry> entries;
    for (size_t t = 0; t < hidden.size(); t++) {
        int64_t distance[2] = {0, 0};
        for (int i = 0; i < (cell ? 2 : 1); i++) {
            const Tensor& x = i ? (*cell)[t] : hidden[t];
            check.state(x, units, i ? "cell" : "hidden", (int64_t)t);
            char* data = static_cast<char*>(x.data_ptr());
            if (!bases[i]) bases[i] = data;
            distance[i] = data - bases[i];
        }
        entries.push_back({distance[0], distance[1]});
    }
    std::vector<char> content;
    append(content, entries.data(), entries.size());
    return reinterpret_cast<const StateEntry*>(device_copy(like, content, stream));
}

}  // namespace

Tensor pool(Tensor mixed, Tensors hidden) {
    const Device device(mixed);
    check_pool(mixed, hidden);
    PoolArgs args{};
    ContiguousCopies copies;
    args.rows = (int32_t)mixed.size(0);
    args.units = (int32_t)(mixed.size(1) / 2);
    char* bases[2] = {};
    args.entries = states(mixed, hidden, nullptr, args.units, bases, device.stream());
    args.base = bases[0];
    args.mixed = float_data(copies.readable(mixed));
    const Tensor out = floats(mixed, {args.rows, 2 * args.units});
    args.out = float_data(out);
    launch_pool(args, device.stream());
    return out;
}

std::tuple<Tensor, Tensor, Tensor> lstm_step(Tensor gates, Tensors hidden, Tensors cell, Tensor heads,
                                             Tensor heads_bias, Tensor bank, bool celo, Tensor skip) {
    const Device device(gates);
    check_lstm_step(gates, hidden, cell, heads, heads_bias, bank, skip);
    LstmArgs args{};
    ContiguousCopies copies;
    const int64_t rows = gates.size(0);
    args.units = (int32_t)(gates.size(1) / 4);
    args.controls_count = (int32_t)heads.size(1) - 1;
    args.weights = (int32_t)bank.size(1);
    args.celo = celo;
    STD_TORCH_CHECK(args.units <= kMaxHidden && args.controls_count < kMaxHeads, "no fused kernel for gates of ",
                    gates.size(1), " numbers, ", heads.size(0), " hidden units and ", args.controls_count,
                    " networks");
    char* bases[2] = {};
    args.entries = states(gates, hidden, &cell, args.units, bases, device.stream());
    args.hidden_base = bases[0];
    args.cell_base = bases[1];
    args.gates = float_data(copies.readable(gates));
    args.heads = float_data(copies.readable(heads));
    args.heads_bias = float_data(copies.readable(heads_bias));
    args.bank = float_data(copies.readable(bank));
    args.skip = static_cast<const bool*>(skip.data_ptr());
    const Tensor controls = floats(gates, {rows, args.controls_count}), lr_mult = floats(gates, {rows});
    const Tensor networks = floats(gates, {rows, args.weights});
    args.controls = float_data(controls);
    args.lr_mult = float_data(lr_mult);
    args.networks = float_data(networks);
    launch_lstm(args, (int)rows, device.stream());
    return {controls, lr_mult, networks};
}

std::tuple<Tensor, Tensor, Tensor> specialize_networks(const SpecializeArguments& x) {
    const Device device(x.lr);
    const NetworkSizes sizes = check_specialize_networks(x);
    STD_TORCH_CHECK(x.sizes.empty() || x.sizes.size() == 4,
                    "the fused kernel is for networks of two hidden layers, got ", x.sizes.size(), " widths");
    STD_TORCH_CHECK(x.factors.size() <= kMaxFactors, "the fused kernel takes at most ", kMaxFactors, " factors, got ",
                    x.factors.size());
    const int64_t count = sizes.count;
    SpecializeArgs args{};
    ContiguousCopies copies;
    if (!x.sizes.empty()) {
        args.layers = 3;
        args.networks = float_data(copies.readable(x.networks));
        args.row = x.networks.dim() == 2 && x.networks.size(0) > 1 ? x.networks.size(1) : 0;
        for (int i = 0; i < 4; i++) args.sizes[i] = (int32_t)x.sizes[i];
        if (x.constants) {
            args.constants = float_data(copies.readable(*x.constants));
            args.constants_count = (int32_t)sizes.constants;
            args.constants_row = x.constants->dim() == 2 && x.constants->size(0) > 1 ? sizes.constants : 0;
        }
        args.outputs = (int32_t)x.outputs;
    }
    if (!x.sizes.empty() || x.floor) {
        args.sums = double_data(copies.readable(x.sums));
        args.sums_width = (int32_t)x.sums.size(1);
    }
    // Without networks and floor there may be fewer sizes than tensors, and what the kernel reads is not used.
    const Tensor unused = x.numel.size(0) == count ? x.numel : doubles(x.lr, {count});
    args.numel = double_data(copies.readable(unused));
    args.norm_eps = x.norm_eps;
    args.lr = view_of(x.lr);
    args.weight_decay = view_of(x.weight_decay);
    for (const Tensor& factor : x.factors) args.factors[args.factors_count++] = view_of(factor);
    args.has_floor = x.floor.has_value();
    if (x.floor) args.floor = view_of(*x.floor);
    args.p_column = (int32_t)x.p_column;
    args.step_mult = (float)x.step_mult;
    const Tensor out = floats(x.lr, {x.numel.size(0), sizes.numbers});
    const Tensor scale = floats(x.lr, {count}), decay = floats(x.lr, {count});
    args.out = float_data(out);
    args.out_row = sizes.numbers;
    args.scale = float_data(scale);
    args.decay = float_data(decay);
    if (count > 0) launch_specialize(args, (int)count, device.stream());
    return {out, scale, decay};
}

}  // namespace hf_lopt
