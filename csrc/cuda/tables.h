// Builds the tables of entries.h from lists of tensors and keeps them on the device for the next step.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../passes.h"
#include "entries.h"
#include "runtime.h"

namespace hf_lopt {

using torch::headeronly::ScalarType;

// The stream to launch on, with its device made the current one.
class Device {
  public:
    explicit Device(const Tensor& x);
    void* stream() const { return stream_; }

  private:
    std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
    void* stream_;
};

// A copy of `content` on the device of `like`, with `zeros` more bytes of 0 behind it, in which kernels count: an
// earlier one if there is one of the same content for this stream and the same `owner`. Kernels of several owners may
// run at the same time, in graphs that were captured on one stream. Copies used in a capture are kept for good.
char* device_copy(const Tensor& like, const std::vector<char>& content, void* stream, size_t zeros = 0,
                  const void* owner = nullptr);

// Contiguous data; what is not contiguous is worked on as a copy.
class Copies {
  public:
    const Tensor& readable(const Tensor& x);
    const Tensor& writable(const Tensor& x);
    void store();  // writes the copies of `writable` back

  private:
    const Tensor& keep(const Tensor& x);
    std::vector<std::unique_ptr<Tensor>> kept_;
    std::vector<std::pair<Tensor, const Tensor*>> written_;
};

// Float32 memory that is allocated in one piece and cut into tensors.
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

class TableBuilder {
  public:
    struct Whole {
        int64_t numel, lines, vectors;  // the latter of accumulators
        bool factored, row_is_line;
    };
    // Adds a tensor as rows and columns; axes of -1: flat. `slice`: two axes, and an entry for each slice over them;
    // the same one twice: for each vector along it.
    void add(const Tensor& shape, int64_t row_axis, int64_t col_axis, const int64_t* slice = nullptr);
    // Adds a flat tensor in so many equal slices.
    void add_flat(const Tensor& shape, int64_t slices);
    // Of a tensor that is not sliced.
    const Entry& entry(size_t t) const { return entries_[first_[t]]; }
    const Whole& whole(size_t t) const { return tensors_[t]; }
    int64_t entries() const { return (int64_t)entries_.size(); }
    // Where a tensor's data are, of numbers of `size` bytes.
    void set(Slot slot, size_t t, const void* data, size_t size = sizeof(float));
    // A parameter-shaped tensor of any supported type.
    void set_any(Slot slot, size_t t, const Tensor& x);
    void set_float(Slot slot, size_t t, const Tensor& x, const char* what);

    // After everything has been set. `tickets`: blocks count their arrivals, and `like` is a tensor that stays where
    // it is from step to step. `sums`: rows and columns are added up.
    Table build(const Tensor& like, void* stream, bool tickets, bool sums = false);
    int tiles() const { return first_tile_.back(); }
    int64_t parts() const { return parts_; }
    // Whether there is an entry without elements, whose results no block writes.
    bool any_empty() const { return any_empty_; }

  private:
    // Where a slice begins, in numbers: in the tensor, in the accumulators of lines and of vectors.
    struct Start {
        int64_t element, line, vector;
    };
    size_t end(size_t t) const { return t + 1 < first_.size() ? first_[t + 1] : entries_.size(); }
    void push(Entry e, Start start);
    void add_strided(const Tensor& shape, Entry e, int64_t row_axis, int64_t col_axis, int64_t a, int64_t b);
    void set_elements(Slot slot, size_t t, const void* data, size_t size);

    std::vector<Entry> entries_;
    std::vector<Start> starts_;
    std::vector<size_t> first_;  // the first entry of each tensor
    std::vector<Whole> tensors_;
    std::vector<int32_t> first_tile_;
    const char* base_[kSlots] = {};
    int64_t parts_ = 0;
    bool any_empty_ = false;
};

template <class T>
void append(std::vector<char>& bytes, const T* data, size_t count) {
    const char* first = reinterpret_cast<const char*>(data);
    bytes.insert(bytes.end(), first, first + count * sizeof(T));
}

int32_t type_of(const Tensor& x);
std::vector<int64_t> shape_without(const Tensor& x, int64_t axis);
// Small float64 or float32 results and work space.
Tensor doubles(const Tensor& like, std::vector<int64_t> size, bool clear = false);
Tensor floats(const Tensor& like, std::vector<int64_t> size);
inline double* double_data(const Tensor& x) { return static_cast<double*>(x.data_ptr()); }
inline float* float_data(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }
// A float32 tensor whose first axis has a number per tensor or one for all.
Strided strided(const Tensor& x, int64_t count, const char* what);
const bool* flag(const Tensor& skip);
void set_decays(const Floats& decays, int count, float* keep, float* add);

}  // namespace hf_lopt
