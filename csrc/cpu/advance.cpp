// The decision about a step, the counters of the run, and the inputs of the scheduler. What a float32 result shows of
// an elementary function is left to PyTorch's own, so that the numbers are those of the plain kernel.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../scheduler_inputs.h"
#include "aten.h"
#include "operands.h"

namespace hf_lopt {

namespace {

constexpr float kFractions[kTimes] = {0.03f, 0.1f, 0.2f, 0.4f, 0.6f, 0.8f, 0.9f, 1.0f, 1.1f};
constexpr float kScales[kSteps] = {1.0f,    3.0f,    10.0f,    30.0f,    100.0f,   300.0f,
                                   1000.0f, 3000.0f, 10000.0f, 30000.0f, 100000.0f};

const double* double_data(const Tensor& x) { return static_cast<const double*>(x.data_ptr()); }

// NaN stays NaN, as in PyTorch.
double smaller(double a, double b) { return a != a || a < b ? a : b; }
double larger(double a, double b) { return a != a || a > b ? a : b; }

Tensor tanh_of(const Tensor& like, const float* numbers, int64_t count) {
    return aten("aten::tanh", "", tensor_of(like, ScalarType::Float, numbers, count));
}

bool anything_bad(ContiguousCopies& copies, const Tensors& stats, const Tensors& sums,
                  const std::optional<Tensor>& bad, const std::optional<Tensor>& loss) {
    bool found = false;
    for (const Tensor& of : stats) {
        const double* x = double_data(copies.readable(of));
        const int64_t rows = of.size(0), width = of.size(1);
        for (int64_t t = 0; t < rows && width > 0; t++) found |= x[t * width] > 0.0;
    }
    for (const Tensor& of : sums) {
        const double* x = double_data(copies.readable(of));
        const int64_t count = of.numel();
        for (int64_t j = 0; j < count; j++) found |= !std::isfinite(x[j]);
    }
    if (bad) found |= *static_cast<const bool*>(bad->data_ptr());
    if (loss) found |= !std::isfinite(*float_data(*loss));
    return found;
}

// The decays of the means of the loss, whose horizons are spaced evenly in log from 10 steps to the whole run.
Tensor loss_decays(const Tensor& like, double horizon) {
    const double end = std::log10(horizon), step = (end - 1.0) / (kLossDecays - 1);
    double rates[kLossDecays];
    for (int i = 0; i < kLossDecays; i++) {
        const double exponent = i < kLossDecays / 2 ? 1.0 + step * i : end - step * (kLossDecays - 1 - i);
        rates[i] = -1.0 / std::pow(10.0, exponent);
    }
    return aten("aten::exp", "", tensor_of(like, ScalarType::Double, rates, kLossDecays));
}

// The loss buffer and the loss features; see `next_loss_buffer` in Python.
void update_loss_buffer(const Tensor& counters, float* means, float* minima, double loss, double horizon, int64_t step,
                        bool skip, float* features) {
    const Tensor decays = loss_decays(counters, horizon);
    const Tensor count = torch::stable::new_empty(counters, torch::headeronly::IntHeaderOnlyArrayRef());
    *static_cast<int64_t*>(count.data_ptr()) = step + 1;
    const Tensor powers = aten("aten::pow", "Tensor_Tensor", decays, count);
    const double *decay = double_data(decays), *power = double_data(powers);
    double correction[kLossDecays], corrected[kLossDecays], minimum[kLossDecays], largest = loss;
    for (int i = 0; i < kLossDecays; i++) {
        correction[i] = 1.0 - power[i];
        const double mean = means[i] / correction[i];
        if (step > 0) largest = i == 0 ? mean : larger(largest, mean);
    }
    if (largest != 0.0) loss = smaller(loss, 2.0 * std::fabs(largest));
    for (int i = 0; i < kLossDecays; i++) {
        const double next = decay[i] * means[i] + (1.0 - decay[i]) * loss;
        const double mean = step > 0 && minima[i] >= kLossMinStart ? correction[i] * loss : next;
        corrected[i] = mean / correction[i];
        minimum[i] = smaller(minima[i], corrected[i]);
        if (skip) continue;
        means[i] = (float)mean;
        minima[i] = (float)minimum[i];
    }
    for (int i = 0; i < kLossFeatures; i++) {
        const double slower = corrected[i + 1] - minimum[i];
        const double slope = (corrected[i] - minimum[i]) / larger(slower, 1e-8) - 1.0;
        features[i] = step + 1 > 2 ? (float)smaller(larger(slope, -1.0), 1.0) : 0.0f;
    }
}

float log_magnitude(double x) {
    return (float)(0.5 * smaller(larger(std::log(1e-8 + std::fabs(10.0 * x)), -5.0), 5.0));
}

// What VeLO's features of each tensor are formed from: statistics (rows, 11), sums of squares (rows, F), numbers of
// elements (rows,) and the one-hot ranks (rows, 5).
class TensorInputs {
  public:
    TensorInputs(ContiguousCopies& copies, const Tensors& given, int64_t column)
        : there_(!given.empty()), column_(column) {
        if (!there_) return;
        moments_ = double_data(copies.readable(given[0]));
        moments_width_ = given[0].size(1);
        totals_ = double_data(copies.readable(given[1]));
        totals_width_ = given[1].size(1);
        numel_ = double_data(copies.readable(given[2]));
        ranks_ = float_data(copies.readable(given[3]));
    }

    int width() const { return there_ ? kTensorInputs : 0; }

    // L(mean v), ranks, L(var m), L(var v) of tensor t; see `velo_tensor_features` in Python.
    void write(int64_t t, float* out) const {
        if (!there_) return;
        const double numel = numel_[t], mean_p2 = totals_[t * totals_width_ + column_] / numel;
        const double scale = 1.0 / std::sqrt(larger(mean_p2, 1e-9)), square = scale * scale;
        // After the three statistics of gradient and parameter: (Σv, Σv²), then (Σm, Σm²) for each momentum.
        const double* pairs = moments_ + t * moments_width_ + 3;
        const double v = pairs[0] / numel, v2 = pairs[1] / numel;
        *out++ = log_magnitude(scale * v);
        out = std::copy_n(ranks_ + t * kRanks, kRanks, out);
        for (int k = 0; k < kMomenta; k++) {
            const double m = pairs[2 + 2 * k] / numel, m2 = pairs[3 + 2 * k] / numel;
            out[k] = log_magnitude(square * (m2 - m * m));
            out[kMomenta + k] = log_magnitude(square * (v2 - 2.0 * m * v + m * m));
        }
    }

  private:
    bool there_;
    int64_t column_, moments_width_ = 0, totals_width_ = 0;
    const double *moments_ = nullptr, *totals_ = nullptr, *numel_ = nullptr;
    const float* ranks_ = nullptr;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> advance(Tensors stats, Tensors sums, std::optional<Tensor> bad,
                                           std::optional<Tensor> loss, Tensor counters, Tensors loss_buffer,
                                           double horizon, Floats corrected, Tensors tensor_inputs, int64_t p_column,
                                           int64_t rows) {
    check_advance(stats, sums, bad, loss, counters, loss_buffer, horizon, tensor_inputs, p_column, rows);
    ContiguousCopies copies;
    const TensorInputs of_tensors(copies, tensor_inputs, p_column);
    const bool skip = anything_bad(copies, stats, sums, bad, loss);

    int64_t* counts = static_cast<int64_t*>(counters.data_ptr());
    const int64_t step = counts[0];
    counts[0] += !skip;
    counts[1] += skip;
    counts[2] = skip ? counts[2] + 1 : 0;

    const int64_t corrections = (int64_t)corrected.size();
    const Tensor decision =
        torch::stable::new_empty(counters, torch::headeronly::IntHeaderOnlyArrayRef(), ScalarType::Bool);
    *static_cast<bool*>(decision.data_ptr()) = skip;
    const Tensor run = floats(counters, {kRunFeatures + corrections});
    float* features = float_data(run);
    std::fill_n(features, kShared, 0.0f);
    float inner[kSteps];
    if (horizon > 0.0) {
        const float done = (float)step / (float)horizon;
        for (int i = 0; i < kTimes; i++) inner[i] = 10.0f * (done - kFractions[i]);
        std::copy_n(float_data(tanh_of(counters, inner, kTimes)), kTimes, features);
    }
    if (!loss_buffer.empty()) {
        update_loss_buffer(counters, float_data(loss_buffer[0]), float_data(loss_buffer[1]), *float_data(*loss),
                           horizon, step, skip, features + kTimes);
    }
    for (int i = 0; i < kSteps; i++) inner[i] = (float)step / kScales[i] - 1.0f;
    std::copy_n(float_data(tanh_of(counters, inner, kSteps)), kSteps, features + kShared);
    for (int64_t i = 0; i < corrections; i++) {
        features[kRunFeatures + i] = (float)(1.0 / (1.0 - std::pow(corrected[i], (double)(step + 1))));
    }

    const int64_t width = kShared + of_tensors.width();
    const Tensor inputs = floats(counters, {rows, width});
    float* first = float_data(inputs);
    for (int64_t t = 0; t < rows; t++) {
        float* out = std::copy_n(features, kShared, first + t * width);
        of_tensors.write(t, out);
    }
    return {decision, run, inputs};
}

}  // namespace hf_lopt
