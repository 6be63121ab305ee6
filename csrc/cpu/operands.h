// What the second and the third pass share: the column of each feature, and the data of each tensor.
#pragma once

#include "../arguments.h"
#include "../contiguous.h"
#include "../held_lists.h"
#include "stored.h"
#include "tensors.h"

namespace hf_lopt {

struct Operands {
    Shape shape;
    Array p, g;
    StoredState state;
    RandomPlace place;
    float* d;
    // The accumulators without L (a number per line) and without K (a vector along the line), and their factors.
    const float *line, *line_factor, *vector, *vector_factor;
};

// How many slices tensor `t` has, over two axes each; no axes: one.
int64_t slices_of(const Tensors& params, const Ints& slice_axes, size_t t);

inline float* float_data(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// The arguments of a pass as the kernels take them.
class PassOperands {
  public:
    FeatureColumns columns;
    FeatureConstants constants;
    std::vector<Operands> tensors;
    std::vector<Shape> shapes;
    bool stored = false;  // whether there are accumulators that are codes

    // Checks the arguments.
    explicit PassOperands(const CommonArguments& common, const Rounding* rounding = nullptr);
    // After the accumulators have been written.
    void store_copies() { copies_.store(); }

  private:
    ContiguousCopies copies_;
};

// Contiguous float32 results of many shapes in one piece of memory, as views that the dispatcher has no part in.
class ResultPieces {
  public:
    // Room for a tensor of that shape.
    void add(std::vector<int64_t> shape);
    // Once all have been added: the tensors in that order, and where each begins.
    void allocate(const Tensor& like);
    const Tensor& tensor(size_t i) const { return tensors_[i]; }
    float* data(size_t i) const { return data_[i]; }

  private:
    // Those of an earlier call that nobody needs any more, if they fit: to make so many views anew takes longer than
    // to fill them.
    bool take_earlier();

    std::vector<std::vector<int64_t>> shapes_;
    Tensors tensors_;
    std::vector<float*> data_;
};

// Memory of one thread for one row at a time.
class Buffers {
  public:
    Buffers() = default;
    // `stored`: whether there are accumulators that go through buffers.
    Buffers(int units, int64_t row_elements, bool stored);
    float *g, *p, *step;      // (kRowElements,): as many rows as are worked on together
    float* state;             // (StoredState::kMost, kRowElements), likewise
    float* factor;            // (kFactored, stride)
    float* expanded;          // (kFactored, stride)
    float *bias, *line_bias;  // (units, stride)
    int64_t stride;

  private:
    std::unique_ptr<float[]> memory_;
};

// The scales of tensor `t`, null where no tensor has codes.
inline const Tensor* scales_of(const Tensors& scales, size_t t) { return scales.empty() ? nullptr : &scales[t]; }

// The part of line `line` in a tile: pointers into the tensors, or into the buffers where numbers had to be converted
// or a factor varies with the inner axes. `slot` is its number among the rows that are in the buffers together.
void make_row(const Operands& x, const Tile& tile, int64_t line, int slot, Buffers& buffers, RowData& row);

// The values of an accumulator without L (kFactored, line_length) at every column of a row, when it has inner axes.
void expand(const float* accumulator, const Shape& shape, const Tile& tile, int64_t line, float* out, int64_t stride);

}  // namespace hf_lopt
