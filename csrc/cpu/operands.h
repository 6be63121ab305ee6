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
    // Room for so many tensors of about three axes.
    explicit ResultPieces(size_t pieces);
    // A tensor of the shape of another one, or of that without an axis; an empty one.
    void add_like(const Tensor& x, int64_t without = -1);
    void add_empty();
    // Once all have been added: where each begins, and how many numbers it has.
    void allocate(const Tensor& like);
    float* data(size_t i) const { return data_[i]; }
    int64_t numel(size_t i) const;
    // In the end every `step`-th tensor from the one at `first` on.
    Tensors take(size_t first, size_t step);

  private:
    // Those of an earlier call that nobody needs any more, if they fit: to make so many views anew takes longer than
    // to fill them.
    bool take_earlier();

    // The shapes, one after the other, and where each ends.
    std::vector<int64_t> sizes_;
    std::vector<size_t> ends_;
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

// The values of an accumulator without L (kFactored, line_length) at every column of a row, when it has inner axes.
void expand(const float* accumulator, const Shape& shape, const Tile& tile, int64_t line, float* out, int64_t stride);

// The part of line `line` in a tile: pointers into the tensors, or into the buffers where numbers had to be converted
// or a factor varies with the inner axes. `slot` is its number among the rows that are in the buffers together.
inline void make_row(const Operands& x, const Tile& tile, int64_t line, int slot, Buffers& buffers, RowData& row) {
    const Shape& shape = x.shape;
    row.step_out = nullptr;
    row.n = tile.n;
    row.g = x.g.read(line, tile.start, tile.n, shape.columns, buffers.g + slot * tile.n);
    row.p = row.p_out = x.p.read(line, tile.start, tile.n, shape.columns, buffers.p + slot * tile.n);
    for (int k = 0; k <= kMomenta; k++) {
        // What is not float32 is read by the kernels; codes are made from buffers.
        float* const buffer = buffers.state + k * kRowElements + slot * tile.n;
        float*& plane = k < kMomenta ? row.m[k] : row.v;
        plane = x.state.in_place() ? x.state.read(k, line, tile.start, tile.n, shape.columns, nullptr) : buffer;
    }
    if (!x.state.in_place()) x.state.locate(row, line, tile.start, shape.columns, x.place);
    if (!shape.factored) {
        const int64_t offset = line * shape.columns + tile.start;
        for (int k = 0; k < kFactored; k++) row.d[k] = x.d + k * shape.numel + offset;
        return;
    }
    const bool inner = shape.inner > 1;
    if (inner) expand(x.line_factor, shape, tile, line, buffers.factor, buffers.stride);
    for (int k = 0; k < kFactored; k++) {
        const float* along = x.vector_factor + k * shape.vector_length() + tile.vector;
        row.rho[k] = inner ? 1.0f : x.line_factor[k * shape.line_length() + line];
        row.factor[k] = along;
        if (inner) {
            float* product = buffers.factor + k * buffers.stride;
            for (int64_t i = 0; i < tile.n; i++) product[i] *= along[i];
            row.factor[k] = product;
        }
    }
}

}  // namespace hf_lopt
