// What lies between the decision about a step and pass 2: the scales of the features and the size of the step go into
// the networks. Small arrays, a tensor to a task.
#include <algorithm>
#include <cmath>

#include "orthogonalize.h"
#include "tensors.h"

namespace hf_lopt {

namespace {

using torch::headeronly::ScalarType;

// Numbers (T,) of any stride; one for all where there is one.
class Numbers {
  public:
    Numbers(const Tensor& x, ScalarType type, const char* what) : data_(x.data_ptr()) {
        STD_TORCH_CHECK(x.dim() == 1 && x.scalar_type() == type, what, " must be one number per tensor, of its type");
        stride_ = x.size(0) == 1 ? 0 : x.stride(0);
    }
    float operator[](int64_t t) const { return static_cast<const float*>(data_)[t * stride_]; }
    double wide(int64_t t) const { return static_cast<const double*>(data_)[t * stride_]; }

  private:
    const void* data_;
    int64_t stride_;
};

// Rows of a matrix, or one for all.
template <class T>
class Rows {
  public:
    Rows(const Tensor& x, int64_t count) : x_(torch::stable::contiguous(x)) {
        const int64_t rows = x.dim() == 2 ? x.size(0) : 1;
        STD_TORCH_CHECK(rows == 1 || rows == count, "there are ", rows, " rows for ", count, " tensors");
        width = x.dim() ? x.size(x.dim() - 1) : 0;
        stride_ = rows == 1 ? 0 : width;
    }
    const T* operator[](int64_t t) const { return static_cast<const T*>(x_.data_ptr()) + t * stride_; }
    int64_t width;

  private:
    Tensor x_;
    int64_t stride_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> fold_network(Tensor networks, Ints sizes, int64_t outputs,
                                                std::optional<Tensor> constants, Tensor sums, Tensor numel,
                                                double norm_eps, Tensor lr, Tensor weight_decay, Tensors factors,
                                                std::optional<Tensor> floor, double step_mult, int64_t p_column) {
    const int64_t count = lr.size(0);
    // Without networks and floor nothing is asked of the elements.
    STD_TORCH_CHECK((sizes.empty() && !floor) || numel.size(0) == count, "there are ", numel.size(0), " sizes for ",
                    count, " tensors");
    const Rows<float> network(networks, count);
    const Rows<double> squares(sums, sums.numel() ? count : 1);
    const Numbers elements(numel, ScalarType::Double, "the number of elements");
    const Numbers rate(lr, ScalarType::Float, "lr"), shrink(weight_decay, ScalarType::Float, "weight decay");
    std::vector<Numbers> multipliers;
    for (const Tensor& x : factors) multipliers.emplace_back(x, ScalarType::Float, "a factor");
    std::optional<Rows<float>> constant;
    std::optional<Numbers> smallest;
    if (constants) constant.emplace(*constants, count);
    if (floor) smallest.emplace(*floor, ScalarType::Float, "the floor");

    const int64_t left_out = constant ? constant->width : 0;
    std::vector<int64_t> widths = sizes;  // of the result
    int64_t size = 0, given = 0;
    if (!sizes.empty()) {
        widths.front() -= left_out;
        widths.back() = outputs;
        for (size_t i = 0; i + 1 < sizes.size(); i++) {
            size += (widths[i] + 1) * widths[i + 1];
            given += (sizes[i] + 1) * sizes[i + 1];
        }
        STD_TORCH_CHECK(network.width == given, "networks of ", given, " numbers were given as ", network.width);
        STD_TORCH_CHECK(squares.width == widths[0], "the first layer has ", widths[0], " inputs, there are ",
                        squares.width, " features");
    }
    const int64_t shape[] = {numel.size(0), size}, one[] = {count};
    const auto make = [&](const int64_t* s, size_t n) {
        return torch::stable::new_empty(lr, {s, n}, ScalarType::Float);
    };
    Tensor flat = make(shape, 2), scale = make(one, 1), decay = make(one, 1);
    float* out = static_cast<float*>(flat.data_ptr());
    float *scales = static_cast<float*>(scale.data_ptr()), *decays = static_cast<float*>(decay.data_ptr());

    torch::stable::parallel_for(0, count, 32, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            scales[t] = rate[t];
            for (const Numbers& x : multipliers) scales[t] *= x[t];
            if (smallest) {
                const double mean = squares[t][p_column] / elements.wide(t);
                scales[t] *= std::max((float)std::sqrt(mean + 1e-9), (*smallest)[t]);
            }
            scales[t] *= (float)step_mult;
            decays[t] = rate[t] * shrink[t];
            const float* x = network[t];
            float* y = out + t * size;
            for (size_t i = 0; i + 1 < sizes.size(); i++) {
                const int64_t n_in = widths[i], n_out = sizes[i + 1], kept = widths[i + 1];
                for (int64_t f = 0; f < n_in; f++, x += n_out, y += kept) {
                    const double mean = i ? 0.0 : squares[t][f] / elements.wide(t);
                    const float root = i ? 1.0f : (float)(1.0 / std::sqrt(mean + norm_eps));
                    for (int64_t j = 0; j < kept; j++) y[j] = x[j] * root;
                }
                const int64_t extra = i ? 0 : left_out;  // inputs that are part of the bias
                const float* bias = x + extra * n_out;
                for (int64_t j = 0; j < kept; j++) {
                    float total = 0.0f;
                    for (int64_t f = 0; f < extra; f++) total += (*constant)[t][f] * x[f * n_out + j];
                    y[j] = bias[j] + total;
                }
                x = bias + n_out;
                y += kept;
            }
        }
    });
    return {flat, scale, decay};
}

}  // namespace hf_lopt
