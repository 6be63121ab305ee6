// The checks of the operators around the scheduler.
#include "arguments.h"
#include "scheduler_inputs.h"
#include "statistics.h"

namespace hf_lopt {

namespace {

void check_statistics(const TensorChecks& check, const Tensor& x, const char* name, int64_t index = kAlone) {
    check.type(x, ScalarType::Double, name, index);
    check.dims(x, 2, name, index);
}

void check_tensor_inputs(const TensorChecks& check, const Tensors& inputs, int64_t rows, int64_t p_column) {
    if (inputs.empty()) return;
    STD_TORCH_CHECK(inputs.size() == 4, "the inputs of each tensor must be statistics, sums, sizes and ranks, got ",
                    inputs.size());
    const Tensor &moments = inputs[0], &totals = inputs[1];
    check_statistics(check, moments, "statistics");
    check_statistics(check, totals, "sums");
    constexpr int kWidth = statistics_width(kSecondMoments, kMomenta);
    STD_TORCH_CHECK(moments.size(0) == rows && moments.size(1) == kWidth, "statistics must be of shape (", rows, ", ",
                    kWidth, "), got (", moments.size(0), ", ", moments.size(1), ")");
    STD_TORCH_CHECK(totals.size(0) == rows && p_column >= 0 && p_column < totals.size(1), "sums must have ", rows,
                    " rows and the column ", p_column, ", got shape (", totals.size(0), ", ", totals.size(1), ")");
    check.float64(inputs[2], rows, "sizes");
    check.float32(inputs[3], rows * kRanks, "ranks");
}

}  // namespace

void check_advance(const Tensors& stats, const Tensors& sums, const std::optional<Tensor>& bad,
                   const std::optional<Tensor>& loss, const Tensor& counters, const Tensors& loss_buffer,
                   double horizon, const Tensors& tensor_inputs, int64_t p_column, int64_t rows) {
    const TensorChecks check(counters);
    STD_TORCH_CHECK(counters.scalar_type() == ScalarType::Long && counters.numel() == 3 && counters.is_contiguous(),
                    "counters must be three contiguous integers, got ", counters.numel());
    STD_TORCH_CHECK(rows >= 0 && rows <= INT32_MAX, "there cannot be ", rows, " rows");
    for (size_t i = 0; i < stats.size(); i++) check_statistics(check, stats[i], "stats", (int64_t)i);
    for (size_t i = 0; i < sums.size(); i++) check.type(sums[i], ScalarType::Double, "sums", (int64_t)i);
    if (bad) check.flag(*bad, "bad");
    if (loss) check.float32(*loss, 1, "the loss");
    STD_TORCH_CHECK(loss_buffer.empty() || (loss && horizon > 0 && loss_buffer.size() == 2),
                    "a loss buffer of means and minima needs a loss and a horizon, got ", loss_buffer.size(),
                    " tensors and horizon ", horizon);
    for (size_t i = 0; i < loss_buffer.size(); i++) {
        check.state(loss_buffer[i], kLossDecays, "loss_buffer", (int64_t)i);
    }
    check_tensor_inputs(check, tensor_inputs, rows, p_column);
}

void check_pool(const Tensor& mixed, const Tensors& hidden) {
    const TensorChecks check(mixed);
    check.dims(mixed, 2, "mixed");
    check.type(mixed, ScalarType::Float, "mixed");
    STD_TORCH_CHECK((int64_t)hidden.size() == mixed.size(0) && mixed.size(1) % 2 == 0,
                    "there must be a hidden state for each row, half as wide, got ", hidden.size(), " for shape (",
                    mixed.size(0), ", ", mixed.size(1), ")");
}

void check_lstm_step(const Tensor& gates, const Tensors& hidden, const Tensors& cell, const Tensor& heads,
                     const Tensor& heads_bias, const Tensor& bank, const Tensor& skip) {
    const TensorChecks check(gates);
    check.dims(gates, 2, "gates");
    check.type(gates, ScalarType::Float, "gates");
    check.dims(heads, 2, "heads");
    check.dims(bank, 2, "bank");
    const int64_t rows = gates.size(0), units = gates.size(1) / 4, count = heads.size(1) - 1;
    STD_TORCH_CHECK(gates.size(1) % 4 == 0 && count >= 0 && heads.size(0) == units, "gates of ", gates.size(1),
                    " numbers do not fit heads of ", heads.size(0), " by ", count + 1);
    STD_TORCH_CHECK((int64_t)hidden.size() == rows && (int64_t)cell.size() == rows && bank.size(0) == count,
                    "there must be a state for each row and a control for each network of the bank, got ", rows,
                    " rows, ", hidden.size(), " and ", cell.size(), " states, ", count, " controls and ", bank.size(0),
                    " networks");
    check.float32(heads, units * (count + 1), "heads");
    check.float32(heads_bias, count + 1, "heads_bias");
    check.float32(bank, bank.numel(), "bank");
    check.flag(skip, "skip");
}

}  // namespace hf_lopt
