// What lies between the decision about a step and pass 2: the scales of the features and the size of the step go into
// the networks. Small arrays, a tensor to a task.
#include <algorithm>
#include <cmath>

#include "operands.h"

namespace hf_lopt {

std::tuple<Tensor, Tensor, Tensor> specialize_networks(const SpecializeArguments& x) {
    const NetworkSizes sizes = check_specialize_networks(x);
    const int64_t count = sizes.count;
    const Ints& widths = sizes.widths;
    ContiguousCopies copies;
    const float *networks = nullptr, *constants = nullptr;
    // From the numbers of one tensor to those of the next; 0 where there is one network, or one set of constants, for
    // all.
    int64_t network_stride = 0, constants_stride = 0;
    if (!x.sizes.empty()) {
        networks = float_data(copies.readable(x.networks));
        network_stride = x.networks.dim() == 2 && x.networks.size(0) > 1 ? x.networks.size(1) : 0;
        if (x.constants) {
            constants = float_data(copies.readable(*x.constants));
            constants_stride = x.constants->dim() == 2 && x.constants->size(0) > 1 ? sizes.constants : 0;
        }
    }
    const StridedView<double> squares = view_of<double>(x.sums), elements = view_of<double>(x.numel);
    const StridedView<float> rate = view_of(x.lr), shrink = view_of(x.weight_decay);
    StridedView<float> smallest{};
    if (x.floor) smallest = view_of(*x.floor);
    std::vector<StridedView<float>> factors;
    for (const Tensor& factor : x.factors) factors.push_back(view_of(factor));

    const int64_t shape[] = {x.numel.size(0), sizes.numbers}, one[] = {count};
    const auto make = [&](const int64_t* s, size_t n) {
        return torch::stable::new_empty(x.lr, {s, n}, ScalarType::Float);
    };
    Tensor flat = make(shape, 2), scale = make(one, 1), decay = make(one, 1);
    float *out = float_data(flat), *scales = float_data(scale), *decays = float_data(decay);

    torch::stable::parallel_for(0, count, 32, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            scales[t] = rate(t);
            for (const StridedView<float>& factor : factors) scales[t] *= factor(t);
            if (x.floor) {
                const double mean = squares(t, x.p_column) / elements(t);
                scales[t] *= std::max((float)std::sqrt(mean + 1e-9), smallest(t));
            }
            scales[t] *= (float)x.step_mult;
            decays[t] = rate(t) * shrink(t);
            const float* in = networks + t * network_stride;
            float* y = out + t * sizes.numbers;
            for (size_t i = 0; i + 1 < x.sizes.size(); i++) {
                const int64_t n_in = widths[i], n_out = x.sizes[i + 1], kept = widths[i + 1];
                for (int64_t f = 0; f < n_in; f++, in += n_out, y += kept) {
                    const double mean = i ? 0.0 : squares(t, f) / elements(t);
                    const float root = i ? 1.0f : (float)(1.0 / std::sqrt(mean + x.norm_eps));
                    for (int64_t j = 0; j < kept; j++) y[j] = in[j] * root;
                }
                const int64_t extra = i ? 0 : sizes.constants;  // inputs that are part of the bias
                const float* bias = in + extra * n_out;
                for (int64_t j = 0; j < kept; j++) {
                    float total = 0.0f;
                    for (int64_t f = 0; f < extra; f++)
                        total += constants[t * constants_stride + f] * in[f * n_out + j];
                    y[j] = bias[j] + total;
                }
                in = bias + n_out;
                y += kept;
            }
        }
    });
    return {flat, scale, decay};
}

}  // namespace hf_lopt
