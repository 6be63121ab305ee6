#include "tensors.h"

#include <algorithm>
#include <cstring>

namespace hf_lopt {

namespace {

bool supported(const Kernels& k) {
    if (&k == &kPortableKernels) return true;
#if defined(__x86_64__) && !defined(HF_LOPT_PORTABLE_ONLY)
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (&k == &kAvx2Kernels) return avx2;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

// Best first.
const Kernels* const kAll[] = {
#if defined(__x86_64__) && !defined(HF_LOPT_PORTABLE_ONLY)
    &kAvx512Kernels, &kAvx2Kernels,
#endif
    &kPortableKernels};

const Kernels* best() {
    for (const Kernels* k : kAll) {
        if (supported(*k)) return k;
    }
    return &kPortableKernels;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* k = chosen.load();
    if (!k) chosen.store(k = best());
    return *k;
}

bool use_kernels(const std::string& name) {
    for (const Kernels* k : kAll) {
        if (name == k->name && supported(*k)) {
            chosen.store(k);
            return true;
        }
    }
    return false;
}

Array::Array(const Tensor& x) : data_(static_cast<char*>(x.data_ptr())), dense_(x.is_contiguous()) {
    using torch::headeronly::ScalarType;
    const ScalarType type = x.scalar_type();
    type_ = type == ScalarType::Float ? Type::kFloat : type == ScalarType::Half ? Type::kHalf : Type::kBFloat16;
    if (!dense_) {
        for (int64_t i = 0; i < x.dim(); i++) {
            sizes_.push_back(x.size(i));
            strides_.push_back(x.stride(i));
        }
    }
}

// Calls f(address, i) for the elements first + i in the order of the shape.
template <class T, class F>
void Array::walk(int64_t first, int64_t n, F f) const {
    const int dims = (int)sizes_.size();
    T* data = reinterpret_cast<T*>(data_);
    std::vector<int64_t> index(dims);
    int64_t offset = 0;
    for (int d = dims - 1; d >= 0; d--) {
        index[d] = first % sizes_[d];
        first /= sizes_[d];
        offset += index[d] * strides_[d];
    }
    for (int64_t i = 0; i < n;) {
        const int last = dims - 1;
        const int64_t run = std::min(n - i, sizes_[last] - index[last]), stride = strides_[last];
        for (int64_t j = 0; j < run; j++) f(data + offset + j * stride, i + j);
        i += run;
        index[last] += run;
        offset += run * stride;
        for (int d = last; d > 0 && index[d] == sizes_[d]; d--) {
            offset += strides_[d - 1] - index[d] * strides_[d];
            index[d] = 0;
            index[d - 1]++;
        }
    }
}

float* Array::converted(int64_t first, int64_t n, float* buffer) const {
    if (type_ == Type::kFloat) {
        walk<float>(first, n, [&](const float* x, int64_t i) { buffer[i] = *x; });
        return buffer;
    }
    uint16_t raw[kRowElements];
    const uint16_t* source = reinterpret_cast<const uint16_t*>(data_) + first;
    if (!dense_) {
        walk<uint16_t>(first, n, [&](const uint16_t* x, int64_t i) { raw[i] = *x; });
        source = raw;
    }
    (type_ == Type::kHalf ? kernels().from_half : kernels().from_bfloat16)(source, n, buffer);
    return buffer;
}

void Array::write(float* values, int64_t line, int64_t start, int64_t n, int64_t columns) const {
    if (in_place()) return;
    const int64_t first = line * columns + start;
    if (type_ == Type::kFloat) {
        walk<float>(first, n, [&](float* x, int64_t i) { *x = values[i]; });
        return;
    }
    uint16_t raw[kRowElements];
    uint16_t* target = dense_ ? reinterpret_cast<uint16_t*>(data_) + first : raw;
    (type_ == Type::kHalf ? kernels().to_half : kernels().to_bfloat16)(values, n, target);
    if (!dense_) walk<uint16_t>(first, n, [&](uint16_t* x, int64_t i) { *x = raw[i]; });
    (type_ == Type::kHalf ? kernels().from_half : kernels().from_bfloat16)(target, n, values);
}

void Array::write(float* values, int64_t line, int64_t start, int64_t n, int64_t columns, const RandomRow& row) const {
    if (type_ != Type::kBFloat16) return write(values, line, start, n, columns);
    const int64_t first = line * columns + start;
    uint16_t raw[kRowElements];
    uint16_t* target = dense_ ? reinterpret_cast<uint16_t*>(data_) + first : raw;
    kernels().round_bfloat16(&values, 1, n, row, kParameterSlot, &target);
    if (!dense_) walk<uint16_t>(first, n, [&](uint16_t* x, int64_t i) { *x = raw[i]; });
}

Shape::Shape(const Tensor& p, int64_t row_axis, int64_t col_axis, int64_t slices_)
    : numel(p.numel()), slices(slices_) {
    factored = row_axis >= 0;
    columns = factored ? numel : numel / slices;
    if (!factored) {
        pre = lines = slices;
        return;
    }
    const int64_t first = std::min(row_axis, col_axis), last = std::max(row_axis, col_axis);
    const auto shape = p.sizes();
    for (int64_t i = 0; i < (int64_t)shape.size(); i++) {
        int64_t& part = i < first ? pre : i == first ? k : i < last ? mid : i == last ? columns : inner;
        part = i == last ? shape[i] : part * shape[i];
    }
    columns *= inner;
    lines = pre * k * mid;
    STD_TORCH_CHECK(slices == 1 || (pre == slices && mid == 1 && inner == 1),
                    "the fused kernels take slices over the last two axes");
    row_is_line = row_axis == last;  // the row accumulator averages over its axis
}

std::vector<Tile> make_tiles(const std::vector<Shape>& shapes, int64_t row_elements) {
    std::vector<Tile> tiles;
    int64_t first_slice = 0, next_slice = 0;
    for (size_t t = 0; t < shapes.size(); t++) {
        const Shape& s = shapes[t];
        first_slice = next_slice;
        next_slice += s.slices;
        if (s.numel == 0) continue;
        const int64_t chunks = (s.columns + row_elements - 1) / row_elements;
        const int64_t n = ((s.columns + chunks - 1) / chunks + s.unit - 1) / s.unit * s.unit;
        const int64_t rows = std::max<int64_t>(1, kTileElements / std::min(n, s.columns));
        for (int64_t group = 0; group < s.pre * s.mid; group++) {
            const int64_t line = group / s.mid * s.k * s.mid + group % s.mid;
            for (int64_t row = 0; row < s.k; row += rows) {
                for (int64_t start = 0, chunk = 0; start < s.columns; start += n, chunk++) {
                    Tile tile;
                    tile.tensor = (int32_t)t;
                    tile.slice = (int32_t)(first_slice + (s.slices > 1 ? group : 0));
                    tile.chunk = (int32_t)chunk;
                    tile.chunks = (int32_t)((s.columns + n - 1) / n);
                    tile.line = line + row * s.mid;
                    tile.line_step = s.mid;
                    tile.rows = std::min(rows, s.k - row);
                    tile.start = start;
                    tile.n = std::min(n, s.columns - start);
                    tile.vector = group * s.columns + start;
                    tile.first_rows = row == 0;
                    tile.last_rows = row + rows >= s.k;
                    tiles.push_back(tile);
                }
            }
        }
    }
    return tiles;
}

int64_t slice_count(const std::vector<Shape>& shapes) {
    int64_t count = 0;
    for (const Shape& shape : shapes) count += shape.slices;
    return count;
}

int group_rows(const Shape& shape, const Tile& tile) {
    if (shape.inner > 1 || tile.n * 2 > kRowElements) return 1;
    return (int)std::min<int64_t>(kGroupRows, kRowElements / tile.n);
}

int64_t worker_count(const std::vector<Tile>& tiles) {
    const int64_t threads = torch::stable::get_num_threads();
    return std::max<int64_t>(1, std::min<int64_t>(threads, (int64_t)tiles.size()));
}

std::vector<int64_t> shares(const std::vector<Tile>& tiles) {
    const int64_t workers = worker_count(tiles);
    int64_t total = 0;
    for (const Tile& tile : tiles) total += tile.rows * tile.n;
    std::vector<int64_t> bounds{0};
    int64_t done = 0;
    for (int64_t i = 0; i < (int64_t)tiles.size(); i++) {
        while ((int64_t)bounds.size() < workers && done >= total / workers * (int64_t)bounds.size())
            bounds.push_back(i);
        done += tiles[i].rows * tiles[i].n;
    }
    bounds.resize(workers, (int64_t)tiles.size());
    bounds.push_back((int64_t)tiles.size());
    return bounds;
}

}  // namespace hf_lopt
