// How the kernels see tensors: as lines of numbers, divided into tiles for the threads.
//
// A parameter of rank >= 2 is read as [pre, K, mid, L, inner]: K and L are its two factored axes in memory order, the
// others are joined. A line is everything after `mid`, contiguous in the accumulators: L * inner columns. The factored
// accumulator without L has `inner` numbers per line (one, if L is the last axis), the one without K is a vector along
// the line that all lines with the same `pre` and `mid` share. A tensor of rank < 2 is one line.
//
// A tensor may be a stack of slices, each with its own network and results: then its leading axes number them, K
// and L are its last two axes, and a stack of vectors has a line for each.
//
// Parameters, gradients and outputs may have any strides and may be float32, bfloat16 or float16: what is not
// contiguous float32 goes through a buffer of one row. So do accumulators in fewer bits (stored.h).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../passes.h"
#include "kernels.h"

namespace hf_lopt {

// The kernels for this processor, or those chosen by `use_kernels`.
const Kernels& kernels();
// Chooses by name; an unknown or unsupported one leaves the choice as it is and returns false.
bool use_kernels(const std::string& name);

// A parameter-shaped tensor of any strides; float32, bfloat16 or float16.
class Array {
  public:
    Array() = default;
    explicit Array(const Tensor& x);
    // `n` numbers from column `start` of line `line`; `buffer` is used unless they can be read in place.
    float* read(int64_t line, int64_t start, int64_t n, int64_t columns, float* buffer) const {
        const int64_t first = line * columns + start;
        return in_place() ? reinterpret_cast<float*>(data_) + first : converted(first, n, buffer);
    }
    // Writes back what `read` returned; rounds the numbers in the buffer as they were stored.
    void write(float* values, int64_t line, int64_t start, int64_t n, int64_t columns) const;
    // Likewise, a bfloat16 tensor rounded at random.
    void write(float* values, int64_t line, int64_t start, int64_t n, int64_t columns, const RandomRow& row) const;
    bool in_place() const { return dense_ && type_ == Type::kFloat; }

  private:
    enum class Type { kFloat, kBFloat16, kHalf };
    float* converted(int64_t first, int64_t n, float* buffer) const;
    template <class T, class F>
    void walk(int64_t first, int64_t n, F f) const;

    char* data_ = nullptr;
    Type type_ = Type::kFloat;
    bool dense_ = true;
    std::vector<int64_t> sizes_, strides_;
};

struct Shape {
    int64_t numel = 0, lines = 1, columns = 0, inner = 1, pre = 1, k = 1, mid = 1;
    bool factored = false;
    bool row_is_line = false;  // whether the row accumulator is the one with a number per line
    int64_t slices = 1;
    int64_t unit = 16;  // of the columns of a tile

    Shape() = default;
    // Axes and slices have passed the checks of arguments.h.
    Shape(const Tensor& p, int64_t row_axis, int64_t col_axis, int64_t slices = 1);
    int64_t line_length() const { return lines * inner; }          // of the accumulator without L
    int64_t vector_length() const { return pre * mid * columns; }  // of the accumulator without K
};

struct Tile {
    int32_t tensor;
    int32_t slice;                  // among those of all tensors
    int32_t chunk, chunks;          // which of how many column chunks; tiles with the same columns are `chunks` apart
    int64_t line, line_step, rows;  // its lines
    int64_t start, n;               // its columns
    int64_t vector;                 // position of `start` in the accumulator without K
    bool first_rows, last_rows;     // whether it holds the first, the last of the lines that share that vector
};

constexpr int64_t kTileElements = 1 << 15, kRowElements = 4096;
// Rows of a tile that are worked on together, so that their float32 sums are flushed together: as many as have about
// as many elements as the longest row. A row whose factors are formed in the buffers fills them alone.
constexpr int kGroupRows = 64;
int group_rows(const Shape& shape, const Tile& tile);

// Divides all tensors into tiles of about kTileElements, with rows of at most `row_elements`.
std::vector<Tile> make_tiles(const std::vector<Shape>& shapes, int64_t row_elements = kRowElements);

int64_t slice_count(const std::vector<Shape>& shapes);

// Number of threads that `for_each_tile` may use, each known by a number below it.
int64_t worker_count(const std::vector<Tile>& tiles);
// The first tile of each worker when all get an equal share of the elements, and the end.
std::vector<int64_t> shares(const std::vector<Tile>& tiles);

// Calls f(i, worker) for every tile. Each thread starts with its share and then takes tiles from those of the others.
// What is computed for a tile must not depend on the worker: sums over tiles are formed afterwards, in the order of
// the tiles.
template <class F>
void for_each_tile(const std::vector<Tile>& tiles, const F& f) {
    const std::vector<int64_t> bounds = shares(tiles);
    const int64_t workers = (int64_t)bounds.size() - 1;
    std::unique_ptr<std::atomic<int64_t>[]> next(new std::atomic<int64_t>[workers]);
    for (int64_t w = 0; w < workers; w++) next[w] = bounds[w];
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
        for (int64_t w = begin; w < end; w++) {
            for (int64_t s = 0; s < workers; s++) {
                const int64_t from = (w + s) % workers;
                for (int64_t i; (i = next[from].fetch_add(1, std::memory_order_relaxed)) < bounds[from + 1];) f(i, w);
            }
        }
    });
}

}  // namespace hf_lopt
