// Builds the tables of tensor_table.h from lists of tensors and keeps them on the device for the next step.
#pragma once

#include <vector>

#include "device_memory.h"
#include "tensor_table.h"

namespace hf_lopt {

class TensorTableBuilder {
  public:
    // How a tensor of the list is read; `row_is_line`: its row accumulator is in the place of the line accumulator.
    struct Layout {
        bool factored, row_is_line;
    };
    // Axes and slices have passed the checks of arguments.h.
    //
    // Adds a tensor as rows and columns; axes of -1: flat. `slice`: two axes, and an entry for each slice over them;
    // the same one twice: for each vector along it. `row_length`: what would be flat becomes rows of so many numbers,
    // if it is several of them; 0: it does not.
    void add(const Tensor& shape, int64_t row_axis, int64_t col_axis, const int64_t* slice = nullptr,
             int64_t row_length = 0);
    // Adds a flat tensor in so many equal slices.
    void add_flat(const Tensor& shape, int64_t slices, int64_t row_length = 0);
    // Adds a tensor as rows, even if it is one.
    void add_rows(const Tensor& shape, int64_t row_length);
    // Of a tensor that is not sliced.
    const TensorEntry& entry(size_t t) const { return entries_[first_[t]]; }
    const Layout& layout(size_t t) const { return tensors_[t]; }
    int64_t entries() const { return (int64_t)entries_.size(); }
    // Where a tensor's data are, of numbers of `size` bytes.
    void set(Slot slot, size_t t, const void* data, size_t size = sizeof(float));
    // Tensors of the shape of the parameter: of any supported type, of float32.
    void set_any(Slot slot, size_t t, const Tensor& x);
    void set_float(Slot slot, size_t t, const Tensor& x) { set_elements(slot, t, x.data_ptr(), sizeof(float)); }
    // Accumulators in any format.
    void set_state(Slot slot, size_t t, const Tensor& x);
    // Of the tensor as a whole; the entries of slices are made from it.
    void set_formats(size_t t, FormatEntry whole);

    // After everything has been set. `tickets`: blocks count their arrivals, and `like` is a tensor that stays where
    // it is from step to step. `sums`: rows and columns are added up.
    TensorTable build(const Tensor& like, void* stream, bool tickets, bool sums = false);
    int tiles() const { return first_tile_.back(); }
    const FormatEntry* formats() const { return formats_on_device_; }
    int64_t parts() const { return parts_; }
    // Whether there is an entry without elements, whose results no block writes.
    bool any_empty() const { return any_empty_; }

  private:
    // Where a slice begins, in numbers: in the tensor, in the accumulators of lines and of vectors.
    struct Start {
        int64_t element, line, vector;
    };
    size_t end(size_t t) const { return t + 1 < first_.size() ? first_[t + 1] : entries_.size(); }
    void push(TensorEntry e, Start start);
    void add_strided(const Tensor& shape, TensorEntry e, int64_t row_axis, int64_t col_axis, int64_t a, int64_t b);
    void set_elements(Slot slot, size_t t, const void* data, size_t size);

    std::vector<TensorEntry> entries_;
    std::vector<FormatEntry> formats_;  // none, or one for each entry
    const FormatEntry* formats_on_device_ = nullptr;
    std::vector<Start> starts_;
    std::vector<size_t> first_;  // the first entry of each tensor
    std::vector<Layout> tensors_;
    std::vector<int32_t> first_tile_;
    const char* base_[kSlots] = {};
    int64_t parts_ = 0;
    bool any_empty_ = false;
};

}  // namespace hf_lopt
