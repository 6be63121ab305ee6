// The device that an operator works on, memory there, and what is copied to it.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <vector>

#include "../arguments.h"
#include "../contiguous.h"

namespace hf_lopt {

// The stream to launch on, with its device made the current one.
class Device {
  public:
    explicit Device(const Tensor& x);
    explicit Device(int index);
    void* stream() const { return stream_; }

  private:
    std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
    void* stream_;
};

// A copy of `content` on the device of `like`, with `zeros` more bytes of 0 behind it, in which kernels count: an
// earlier one if there is one of the same content for this stream and the same `owner`. Kernels of several owners may
// run at the same time, in graphs that were captured on one stream. ContiguousCopies used in a capture are kept for
// good.
char* device_copy(const Tensor& like, const std::vector<char>& content, void* stream, size_t zeros = 0,
                  const void* owner = nullptr);

// Float32 memory that is allocated in one piece and divided into tensors.
class Pieces {
  public:
    // Room for a tensor; its place, in numbers.
    int64_t add(int64_t numel);
    // After all have been added. `clear`: with zeros.
    void allocate(const Tensor& like, bool clear);
    float* data() const { return static_cast<float*>(memory_.data_ptr()); }
    Tensor piece(int64_t place, const std::vector<int64_t>& shape) const;

  private:
    int64_t size_ = 0;
    Tensor memory_;
};

template <class T>
void append(std::vector<char>& bytes, const T* data, size_t count) {
    const char* first = reinterpret_cast<const char*>(data);
    bytes.insert(bytes.end(), first, first + count * sizeof(T));
}

// The sizes of all axes but one.
std::vector<int64_t> shape_without(const Tensor& x, int64_t axis);
// Small float64 or float32 results and work space.
Tensor doubles(const Tensor& like, std::vector<int64_t> size, bool clear = false);
Tensor floats(const Tensor& like, std::vector<int64_t> size);
inline double* double_data(const Tensor& x) { return static_cast<double*>(x.data_ptr()); }
inline float* float_data(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

}  // namespace hf_lopt
