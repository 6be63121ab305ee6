// How accumulators are stored, and where the rows of a tensor lie in the whole one.
#pragma once

#include "../arguments.h"
#include "../contiguous.h"
#include "tensors.h"

namespace hf_lopt {

// Where the lines of a local tensor lie in the whole one, for what is rounded at random. Not there: nothing is.
class RandomPlace {
  public:
    RandomPlace() = default;
    RandomPlace(TensorPlace&& place, uint32_t turn) : there_(true), turn_(turn), place_(std::move(place)) {}
    bool there() const { return there_; }
    int64_t row_length() const { return there_ ? place_.row_length : 0; }
    // Of line `line` of the local rows, from column `start` on.
    RandomRow row(int64_t line, int64_t start) const;

  private:
    bool there_ = false;
    uint32_t turn_ = 0;
    TensorPlace place_;
};

// One for each tensor.
std::vector<RandomPlace> random_places(const Tensors& params, const Rounding& rounding);

// The momenta and the second moments of a tensor, in any format: what is not float32 goes through a buffer of rows.
class StoredState {
  public:
    static constexpr int kMost = kPlanes;

    StoredState() = default;
    StoredState(const Tensor& momenta, const Tensor& second, const Tensor* momentum_scales,
                const Tensor* second_scales, bool written, ContiguousCopies& copies);
    Format format() const { return format_; }
    bool in_place() const { return format_ == kFloat32; }
    int planes() const { return planes_; }
    // `n` numbers of a plane, the last of which is the second moment; in `buffer` unless they can be read in place.
    float* read(int plane, int64_t line, int64_t start, int64_t n, int64_t columns, float* buffer) const {
        if (!in_place()) return converted(plane, line, start, n, columns, buffer);
        return reinterpret_cast<float*>(data_[plane]) + line * columns + start;
    }
    // Writes what `read` returned for the two planes of Adam.
    void write(float* const* values, int64_t line, int64_t start, int64_t n, int64_t columns,
               const RandomPlace& place) const;
    // Fills in where a row of all planes is.
    void locate(RowData& row, int64_t line, int64_t start, int64_t columns, const RandomPlace& place) const;

  private:
    float* converted(int plane, int64_t line, int64_t start, int64_t n, int64_t columns, float* buffer) const;

    Format format_ = kFloat32;
    int planes_ = 0;
    char* data_[kMost] = {};
    float* scales_[kMost] = {};
};

// That a shape has the rows of a tensor as its lines, in tiles that blocks of codes fit into.
void align(Shape& shape, const StoredState* state, const RandomPlace& place);

}  // namespace hf_lopt
