// Calls of PyTorch's own operators, for what has to be rounded as it rounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

namespace hf_lopt {

using torch::stable::Tensor;

template <class... Arguments>
Tensor aten(const char* name, const char* overload, const Arguments&... arguments) {
    std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor floats(const Tensor& like, std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(like, {shape.begin(), shape.size()}, torch::headeronly::ScalarType::Float);
}

// `numbers` as a tensor of one axis.
template <class T>
Tensor tensor_of(const Tensor& like, torch::headeronly::ScalarType type, const T* numbers, int64_t count) {
    Tensor x = torch::stable::new_empty(like, {&count, 1}, type);
    std::copy_n(numbers, count, static_cast<T*>(x.data_ptr()));
    return x;
}

}  // namespace hf_lopt
