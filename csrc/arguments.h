// The checks of the operators' arguments, the same for all devices.
//
// Kernels read and write through bare pointers, so every operator first compares the lengths of its lists, and of
// every tensor the number of elements, the type and the device. An error names the argument, what it is and what was
// wanted. A check costs a few comparisons of integers.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>

#include "features.h"
#include "passes.h"
#include "random_rounding.h"
#include "strided_view.h"

namespace hf_lopt {

using torch::headeronly::ScalarType;

// ---- a tensor -----------------------------------------------------------------------------------------------------

constexpr int64_t kAlone = -1;  // the index of an argument that is not one of a list

// Checks tensors that have to be on the device of one of them. `name` and `index` are for messages.
class TensorChecks {
  public:
    explicit TensorChecks(const Tensor& like) : device_(like.get_device_index()) {}

    // float32, bfloat16 or float16, as parameters and what is shaped like them may be; `numel` elements.
    void floating(const Tensor& x, int64_t numel, const char* name, int64_t index = kAlone) const;
    void float32(const Tensor& x, int64_t numel, const char* name, int64_t index = kAlone) const;
    void float64(const Tensor& x, int64_t numel, const char* name, int64_t index = kAlone) const;
    // A bool tensor of one element, the decision to skip a step.
    void flag(const Tensor& x, const char* name) const;
    // A float32 tensor of `dims` axes, the first of which has `count` entries or one for all.
    void entries(const Tensor& x, int64_t dims, int64_t count, const char* name, int64_t index = kAlone) const;
    // Momenta or second moments of `depth` decays of a parameter: float32, bfloat16, or codes of the type `codes` with
    // the scales of their blocks, float32.
    void accumulator(const Tensor& x, const Tensors& scales, const Tensor& param, int64_t depth, ScalarType codes,
                     const char* name, int64_t index) const;
    // A contiguous float32 state of `numel` numbers that is written in place.
    void state(const Tensor& x, int64_t numel, const char* name, int64_t index = kAlone) const;

    void type(const Tensor& x, ScalarType wanted, const char* name, int64_t index = kAlone) const;
    void numel(const Tensor& x, int64_t wanted, const char* name, int64_t index = kAlone) const;
    void dims(const Tensor& x, int64_t wanted, const char* name, int64_t index = kAlone) const;
    void device(const Tensor& x, const char* name, int64_t index = kAlone) const;

  private:
    int device_;  // negative: a CPU
};

// An argument that has passed `entries`; 0-d, 1-d: a number for each of the first axis' entries.
template <class T = float>
StridedView<T> view_of(const Tensor& x) {
    StridedView<T> view{static_cast<const T*>(x.data_ptr()), {0, 0, 0}};
    for (int64_t i = 0; i < x.dim() && i < 3; i++) view.stride[i] = x.stride(i);
    if (x.dim() == 0 || x.size(0) == 1) view.stride[0] = 0;
    return view;
}

// ---- operators ----------------------------------------------------------------------------------------------------

// How many elements the tensors of a parameter have, for each decay.
struct ParameterSizes {
    int64_t numel, row, col;  // of the parameter and of its row and column accumulators; 0 where it is not factored
    bool factored;
};
// Of tensor `index`, whose row accumulator has lost `row_axis` and whose column accumulator has lost `col_axis`; a
// negative row axis: not factored.
ParameterSizes sizes_of(const Tensor& x, int64_t row_axis, int64_t col_axis, int64_t index);

void check_sums(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensors& second_moments,
                const Ints& row_axes, const Ints& col_axes, bool moments, const Tensors& momentum_scales,
                const Tensors& second_scales);
// A row accumulator as [outer, B, inner], where B is the axis of the columns.
struct RowAccumulator {
    int64_t outer = 1, b = 1, inner = 1;
};
// `row_accumulators` has an entry for each tensor, of which those that are not factored mean nothing.
void check_update_factored(const Tensors& rows, const Tensors& cols, const Tensors& row_sums, const Tensors& col_sums,
                           const Tensors& row_means, const Ints& row_sizes, const Ints& col_sizes,
                           const Ints& row_axes, const Ints& col_axes, const Floats& decays,
                           std::vector<RowAccumulator>* row_accumulators);

void check_common(const CommonArguments& x);
// The column of each feature, and the constants of the formulas.
FeatureColumns feature_columns(const Names& features);
FeatureConstants feature_constants(const CommonArguments& x);
// That all axes of slices are there.
void check_slice_axes(const Tensors& params, const Ints& slice_axes);
// The two slice axes of tensor `t`, null where tensors are not sliced.
inline const int64_t* slice_of(const Ints& slice_axes, size_t t) {
    return slice_axes.empty() ? nullptr : &slice_axes[2 * t];
}

void set_decays(const Floats& decays, float* keep, float* add);

// `common` has passed `check_common`. Returns the units of the hidden layers.
int64_t check_network(const CommonArguments& common, const FeatureColumns& columns, const NetworkArguments& network);
// That there is a network for each of the `rows` results, which are of tensors or of slices of them, or one for all.
void check_network_rows(const NetworkArguments& network, int64_t rows);

// How many equal slices each tensor has, for which there are step sizes of their own.
int64_t check_adam_step(const Tensors& params, const Tensors& grads, const Tensors& momenta,
                        const Tensors& second_moments, const AdamArguments& step);

// Two lists of as many tensors, of the same sizes: what is written, and what is read.
void check_pairs(const Tensors& targets, const Tensors& values, const char* target_name, const char* value_name);
// lr or weight decay of `descend`; whether it has a number for each slice, rather than for each tensor or for all.
bool check_rate(const TensorChecks& check, const Tensor& x, int64_t tensors, int64_t slices, const char* name);
// Sums of squares of the steps and numbers of elements, (slices,) float64, or neither.
void check_squares(const TensorChecks& check, const std::optional<Tensor>& squares, const std::optional<Tensor>& numel,
                   int64_t slices);

// Where a local tensor is in the whole one, for what is rounded at random: a row is what lies behind one of its axes,
// that one included, joined.
struct TensorPlace {
    uint32_t key = 0, first_column = 0;
    int64_t row_length = 1;                     // of the local tensor
    std::vector<int64_t> sizes, starts, whole;  // of the axes before the rows: local sizes, first indices, whole sizes
};
// One for each tensor; none where nothing is rounded at random.
std::vector<TensorPlace> check_places(const Tensors& params, const Rounding& rounding);

struct NetworkSizes {
    int64_t count = 0;      // of tensors or slices, for which there are step sizes
    int64_t constants = 0;  // how many of the first layer's inputs are constants
    Ints widths;            // of the layers of the result
    int64_t numbers = 0;    // in a network of the result
};
NetworkSizes check_specialize_networks(const SpecializeArguments& x);

// Of the operators around the scheduler; the states of `check_pool` and `check_lstm_step` are looked at where they are
// read.
void check_advance(const Tensors& stats, const Tensors& sums, const std::optional<Tensor>& bad,
                   const std::optional<Tensor>& loss, const Tensor& counters, const Tensors& loss_buffer,
                   double horizon, const Tensors& tensor_inputs, int64_t p_column, int64_t rows);
void check_pool(const Tensor& mixed, const Tensors& hidden);
void check_lstm_step(const Tensor& gates, const Tensors& hidden, const Tensors& cell, const Tensor& heads,
                     const Tensor& heads_bias, const Tensor& bank, const Tensor& skip);

}  // namespace hf_lopt
