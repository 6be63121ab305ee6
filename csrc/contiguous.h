// Contiguous data of tensors of any strides.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <deque>
#include <utility>
#include <vector>

namespace hf_lopt {

using torch::stable::Tensor;

// Keeps copies of the tensors that are not contiguous while an operator works on them. The references that it returns
// are valid as long as it and the argument are.
class ContiguousCopies {
  public:
    const Tensor& readable(const Tensor& x) {
        if (x.is_contiguous()) return x;
        kept_.push_back(torch::stable::contiguous(x));
        return kept_.back();
    }
    const Tensor& writable(const Tensor& x) {
        const Tensor& y = readable(x);
        if (&y != &x) written_.emplace_back(x, &y);
        return y;
    }
    // Writes the copies of `writable` back.
    void store() {
        for (auto& [original, copy] : written_) torch::stable::copy_(original, *copy);
    }

  private:
    std::deque<Tensor> kept_;
    std::vector<std::pair<Tensor, const Tensor*>> written_;
};

}  // namespace hf_lopt
