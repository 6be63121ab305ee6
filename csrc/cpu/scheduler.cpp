// The scheduler around its matrix products, and what is stored after a step. Elementary functions and products are
// PyTorch's own; what these kernels save is a call, or Python's objects, for each of many small states.
#include <algorithm>
#include <cstring>

#include "aten.h"
#include "operands.h"

namespace hf_lopt {

namespace {

constexpr float kCeloMultiplier = 0.1f;  // what Celo multiplies the exponential of its multiplier with

// States of `units` numbers each, side by side from `out` on, `stride` apart.
void gather(const TensorChecks& check, const Tensors& states, int64_t units, const char* name, float* out,
            int64_t stride) {
    ContiguousCopies copies;
    for (size_t t = 0; t < states.size(); t++) {
        check.float32(states[t], units, name, (int64_t)t);
        std::copy_n(float_data(copies.readable(states[t])), units, out + (int64_t)t * stride);
    }
}

void scatter(const Tensors& states, const Tensor& values) {
    ContiguousCopies copies;
    const int64_t units = values.size(1);
    const float* from = float_data(values);
    for (size_t t = 0; t < states.size(); t++) {
        std::copy_n(from + (int64_t)t * units, units, float_data(copies.writable(states[t])));
    }
    copies.store();
}

// One of the four gates (T, H) among (T, 4H).
Tensor gate(const Tensor& gates, int64_t units, int64_t which) {
    const int64_t shape[] = {gates.size(0), units}, strides[] = {4 * units, 1};
    AtenTensorHandle view;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(gates.get(), 2, shape, strides, which * units, &view));
    return Tensor(view);
}

Tensor transposed(const Tensor& x) {
    const int64_t shape[] = {x.size(1), x.size(0)}, strides[] = {1, x.size(1)};
    AtenTensorHandle view;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), 2, shape, strides, 0, &view));
    return Tensor(view);
}

Tensor sigmoid(const Tensor& x) { return aten("aten::sigmoid", "", x); }
Tensor tanh(const Tensor& x) { return aten("aten::tanh", "", x); }
Tensor product(const Tensor& x, const Tensor& y) { return aten("aten::mul", "Tensor", x, y); }

}  // namespace

Tensor pool(Tensor mixed, Tensors hidden) {
    const TensorChecks check(mixed);
    check_pool(mixed, hidden);
    const int64_t rows = mixed.size(0), units = mixed.size(1) / 2;
    ContiguousCopies copies;
    const float* in = float_data(copies.readable(mixed));
    const Tensor result = floats(mixed, {rows, 2 * units});
    float* out = float_data(result);
    std::vector<float> largest(units, 0.0f);
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t u = 0; u < units; u++) {
            const float x = in[t * 2 * units + u];
            if (x > largest[u] || x != x) largest[u] = x;  // NaN stays
        }
    }
    for (int64_t t = 0; t < rows; t++) {
        const float* second = in + (2 * t + 1) * units;
        for (int64_t u = 0; u < units; u++) out[t * 2 * units + u] = second[u] + largest[u];
    }
    gather(check, hidden, units, "hidden", out + units, 2 * units);
    return result;
}

std::tuple<Tensor, Tensor, Tensor> lstm_step(Tensor gates, Tensors hidden, Tensors cell, Tensor heads,
                                             Tensor heads_bias, Tensor bank, bool celo, Tensor skip) {
    const TensorChecks check(gates);
    check_lstm_step(gates, hidden, cell, heads, heads_bias, bank, skip);
    const int64_t rows = gates.size(0), units = gates.size(1) / 4, count = heads.size(1) - 1;
    for (size_t t = 0; t < hidden.size(); t++) check.float32(hidden[t], units, "hidden", (int64_t)t);
    const Tensor old_cell = floats(gates, {rows, units});
    gather(check, cell, units, "cell", float_data(old_cell), units);

    // Input, candidate, forget (with 1 added), output; see `lstm_cell` in Python.
    ContiguousCopies copies;
    const Tensor& whole = copies.readable(gates);
    const Tensor forget = floats(gates, {rows, units});
    // A pointer is a call of PyTorch, which takes longer than an element.
    const float* all_gates = float_data(whole);
    float* moved = float_data(forget);
    for (int64_t t = 0; t < rows; t++) {
        const float* in = all_gates + (4 * t + 2) * units;
        for (int64_t u = 0; u < units; u++) moved[t * units + u] = in[u] + 1.0f;
    }
    const Tensor new_cell = product(sigmoid(forget), old_cell);
    const Tensor added = product(sigmoid(gate(whole, units, 0)), tanh(gate(whole, units, 1)));
    const float* addend = float_data(added);
    float* sum = float_data(new_cell);
    for (int64_t i = 0; i < rows * units; i++) sum[i] += addend[i];
    const Tensor new_hidden = product(sigmoid(gate(whole, units, 3)), tanh(new_cell));
    const Tensor out =
        aten("aten::linear", "", new_hidden, transposed(copies.readable(heads)), std::optional<Tensor>(heads_bias));

    Tensor controls = floats(gates, {rows, count}), multiplier = floats(gates, {rows});
    const float* row = float_data(out);
    float *own_controls = float_data(controls), *factors = float_data(multiplier);
    for (int64_t t = 0; t < rows; t++, row += count + 1) {
        std::copy_n(row, count, own_controls + t * count);
        factors[t] = row[count];
    }
    Tensor mixture = controls;
    if (celo) {
        if (count > 0) mixture = aten("aten::softmax", "int", controls, (int64_t)1, std::nullopt);
        multiplier = aten("aten::exp", "", multiplier);
        factors = float_data(multiplier);
        for (int64_t t = 0; t < rows; t++) factors[t] *= kCeloMultiplier;
    }
    const Tensor networks = aten("aten::mm", "", mixture, bank);
    if (!*static_cast<const bool*>(skip.data_ptr())) {
        scatter(hidden, new_hidden);
        scatter(cell, new_cell);
    }
    return {controls, multiplier, networks};
}

void assign(Tensors targets, Tensors values, Tensor skip) {
    check_pairs(targets, values, "targets", "values");
    const TensorChecks check(skip);
    check.flag(skip, "skip");
    for (size_t i = 0; i < targets.size(); i++) check.device(targets[i], "targets", (int64_t)i);
    if (*static_cast<const bool*>(skip.data_ptr())) return;
    for (size_t i = 0; i < targets.size(); i++) {
        Tensor& to = targets[i];
        const Tensor& from = values[i];
        const bool plain = to.scalar_type() == ScalarType::Float && from.scalar_type() == ScalarType::Float &&
                           to.is_contiguous() && from.is_contiguous();
        if (plain) {
            std::memmove(to.data_ptr(), from.data_ptr(), sizeof(float) * to.numel());
        } else {
            torch::stable::copy_(to, from);
        }
    }
}

}  // namespace hf_lopt
