#include <cmath>

#include "operators.h"
#include "scheduler.h"

namespace hf_lopt {

namespace {

const double* numbers(const Tensor& x, const char* what) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double && x.is_contiguous(), what,
                    " must be contiguous and float64 for the fused kernels");
    return double_data(x);
}

// Contiguous float32; `kept` holds a copy where one is needed.
const float* values(const Tensor& x, const char* what, Tensors& kept) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, what, " must be float32 for the fused kernels");
    kept.push_back(x.is_contiguous() ? x : torch::stable::contiguous(x));
    return float_data(kept.back());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> advance(Tensors stats, Tensors sums, std::optional<Tensor> bad,
                                           std::optional<Tensor> loss, Tensor counters, Tensors loss_buffer,
                                           double horizon, Floats corrected, Tensors own, int64_t p_column,
                                           int64_t rows) {
    const Device device(counters);
    STD_TORCH_CHECK(stats.size() <= kMaxLists && sums.size() <= kMaxLists && corrected.size() <= kMaxLists,
                    "the fused kernel takes at most 8 lists");
    STD_TORCH_CHECK(counters.scalar_type() == ScalarType::Long && counters.numel() == 3 && counters.is_contiguous(),
                    "counters must be three integers");
    AdvanceArgs args{};
    Tensors kept;
    for (const Tensor& x : stats) {
        const int i = args.stat_lists++;
        args.stats[i] = numbers(x, "statistics");
        args.stat_rows[i] = x.size(0);
        args.stat_width[i] = (int32_t)x.size(1);
    }
    for (const Tensor& x : sums) {
        const int i = args.sum_lists++;
        args.sums[i] = numbers(x, "sums");
        args.sum_count[i] = x.numel();
    }
    if (bad) args.bad = flag(*bad);
    if (loss) args.loss = values(*loss, "the loss", kept);
    args.counters = static_cast<int64_t*>(counters.data_ptr());
    if (!loss_buffer.empty()) {
        STD_TORCH_CHECK(loss && horizon > 0 && loss_buffer.size() == 2, "a loss buffer needs a loss and a horizon");
        for (const Tensor& x : loss_buffer) {
            STD_TORCH_CHECK(x.numel() == kLossDecays && x.is_contiguous() && x.scalar_type() == ScalarType::Float,
                            "the loss buffer must be contiguous, float32 and of 10 numbers");
        }
        args.loss_means = float_data(loss_buffer[0]);
        args.loss_min = float_data(loss_buffer[1]);
        for (int i = 0; i < kLossDecays; i++) {
            const double exponent = 1.0 + (std::log10(horizon) - 1.0) * i / (kLossDecays - 1);
            args.loss_decay[i] = std::exp(-1.0 / std::pow(10.0, exponent));
        }
    }
    args.horizon = (float)horizon;
    args.corrections = (int32_t)corrected.size();
    for (size_t i = 0; i < corrected.size(); i++) args.corrected[i] = corrected[i];
    args.rows = (int32_t)rows;
    if (!own.empty()) {
        STD_TORCH_CHECK(own.size() == 4 && own[0].size(0) == rows && own[0].size(1) == 3 + 2 * (1 + kMomenta) &&
                            own[3].numel() == rows * kRanks,
                        "the inputs of each tensor must be statistics, sums, sizes and ranks");
        args.moments = numbers(own[0], "statistics");
        args.moments_width = (int32_t)own[0].size(1);
        args.totals = numbers(own[1], "sums");
        args.totals_width = (int32_t)own[1].size(1);
        args.numel = numbers(own[2], "sizes");
        args.ranks = values(own[3], "ranks", kept);
        args.p_column = (int32_t)p_column;
    }
    const Tensor skip =
        torch::stable::new_empty(counters, torch::headeronly::IntHeaderOnlyArrayRef(), ScalarType::Bool);
    const Tensor features = floats(counters, {kRunFeatures + args.corrections});
    const Tensor inputs = floats(counters, {rows, kShared + (own.empty() ? 0 : kOwn)});
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
    std::vector<StateEntry> entries;
    for (size_t t = 0; t < hidden.size(); t++) {
        int64_t distance[2] = {0, 0};
        for (int i = 0; i < (cell ? 2 : 1); i++) {
            const Tensor& x = i ? (*cell)[t] : hidden[t];
            STD_TORCH_CHECK(x.numel() == units && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                            "the state of the LSTM must be contiguous, float32 and as wide as the gates");
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
    PoolArgs args{};
    Tensors kept;
    args.rows = (int32_t)mixed.size(0);
    args.units = (int32_t)(mixed.size(1) / 2);
    STD_TORCH_CHECK((int64_t)hidden.size() == args.rows, "there must be a hidden state for each row");
    char* bases[2] = {};
    args.entries = states(mixed, hidden, nullptr, args.units, bases, device.stream());
    args.base = bases[0];
    args.mixed = values(mixed, "the mixing layer", kept);
    const Tensor out = floats(mixed, {args.rows, 2 * args.units});
    args.out = float_data(out);
    launch_pool(args, device.stream());
    return out;
}

std::tuple<Tensor, Tensor, Tensor> lstm_step(Tensor gates, Tensors hidden, Tensors cell, Tensor heads,
                                             Tensor heads_bias, Tensor bank, bool celo, Tensor skip) {
    const Device device(gates);
    LstmArgs args{};
    Tensors kept;
    const int64_t rows = gates.size(0);
    args.units = (int32_t)(gates.size(1) / 4);
    args.controls_count = (int32_t)heads.size(1) - 1;
    args.weights = (int32_t)bank.size(1);
    args.celo = celo;
    STD_TORCH_CHECK(args.units <= kMaxHidden && args.controls_count < kMaxHeads && heads.size(0) == args.units,
                    "no fused kernel for ", args.units, " hidden units and ", args.controls_count, " networks");
    STD_TORCH_CHECK(
        (int64_t)hidden.size() == rows && (int64_t)cell.size() == rows && bank.size(0) == args.controls_count,
        "there must be a state for each row and a control for each network of the bank");
    char* bases[2] = {};
    args.entries = states(gates, hidden, &cell, args.units, bases, device.stream());
    args.hidden_base = bases[0];
    args.cell_base = bases[1];
    args.gates = values(gates, "gates", kept);
    args.heads = values(heads, "heads", kept);
    args.heads_bias = values(heads_bias, "heads", kept);
    args.bank = values(bank, "the bank", kept);
    args.skip = flag(skip);
    const Tensor controls = floats(gates, {rows, args.controls_count}), lr_mult = floats(gates, {rows});
    const Tensor networks = floats(gates, {rows, args.weights});
    args.controls = float_data(controls);
    args.lr_mult = float_data(lr_mult);
    args.networks = float_data(networks);
    launch_lstm(args, (int)rows, device.stream());
    return {controls, lr_mult, networks};
}

std::tuple<Tensor, Tensor, Tensor> fold_network(Tensor networks, Ints sizes, int64_t outputs,
                                                std::optional<Tensor> constants, Tensor sums, Tensor numel,
                                                double norm_eps, Tensor lr, Tensor weight_decay, Tensors factors,
                                                std::optional<Tensor> floor, double step_mult, int64_t p_column) {
    const Device device(numel);
    const int64_t rows = numel.size(0);
    FoldArgs args{};
    Tensors kept;
    int64_t size = 0;
    if (!sizes.empty()) {
        STD_TORCH_CHECK(sizes.size() == 4, "the fused kernel is for networks of two hidden layers");
        args.layers = 3;
        args.networks = values(networks, "networks", kept);
        args.row = networks.size(0) == 1 ? 0 : networks.size(1);
        int64_t count = 0;
        for (int i = 0; i < 4; i++) args.sizes[i] = (int32_t)sizes[i];
        for (int i = 0; i < 3; i++) count += (sizes[i] + 1) * sizes[i + 1];
        STD_TORCH_CHECK(networks.size(1) == count && (networks.size(0) == 1 || networks.size(0) == rows),
                        "the networks have ", networks.size(1), " numbers, their layers ", count);
        if (constants) {
            args.constants = values(*constants, "constants", kept);
            args.constants_count = (int32_t)constants->size(constants->dim() - 1);
            args.constants_row = constants->dim() > 1 && constants->size(0) > 1 ? args.constants_count : 0;
        }
        args.outputs = (int32_t)outputs;
        const int64_t widths[] = {sizes[0] - args.constants_count, sizes[1], sizes[2], outputs};
        for (int i = 0; i < 3; i++) size += (widths[i] + 1) * widths[i + 1];
        STD_TORCH_CHECK(sums.size(1) == widths[0], "the first layer has ", widths[0], " inputs, the features have ",
                        sums.size(1), " columns");
    }
    if (sums.numel()) {
        args.sums = numbers(sums, "sums");
        args.sums_width = (int32_t)sums.size(1);
    }
    args.numel = numbers(numel, "sizes");
    args.norm_eps = norm_eps;
    args.lr = strided(lr, rows, "lr");
    args.weight_decay = strided(weight_decay, rows, "the weight decay");
    STD_TORCH_CHECK(factors.size() <= kMaxFactors, "the fused kernel takes at most 4 factors");
    for (const Tensor& x : factors) args.factors[args.factors_count++] = strided(x, rows, "a factor");
    args.has_floor = floor.has_value();
    if (floor) {
        STD_TORCH_CHECK(args.sums && p_column >= 0, "the scale of a parameter needs its sum of squares");
        args.floor = strided(*floor, rows, "the least scale");
    }
    args.p_column = (int32_t)p_column;
    args.step_mult = (float)step_mult;
    const Tensor out = floats(numel, {rows, size}), scale = floats(numel, {rows}), decay = floats(numel, {rows});
    args.out = float_data(out);
    args.out_row = size;
    args.scale = float_data(scale);
    args.decay = float_data(decay);
    if (rows > 0) launch_fold(args, (int)rows, device.stream());
    return {out, scale, decay};
}

}  // namespace hf_lopt
