#include "table_builder.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace hf_lopt {

namespace {

constexpr const char* kTooMany = "the parameters have too many elements for one step";

int32_t type_of(const Tensor& x) {
    const ScalarType type = x.scalar_type();
    return type == ScalarType::Float ? kFloat32 : type == ScalarType::Half ? kFloat16 : kBFloat16;
}

// The product of the sizes of all axes but one or two.
int64_t numel_without(const Tensor& x, int64_t a, int64_t b = -1) {
    int64_t numel = 1;
    for (int64_t i = 0; i < x.dim(); i++) numel *= i == a || i == b ? 1 : x.size(i);
    return numel;
}

// Large ones have several strips, as wide matrices do: so was the Adam step measured on an H200. Sums take as long
// either way.
void make_flat(TensorEntry& e, int64_t numel) {
    constexpr int64_t kStrips = 8;
    e.numel = numel;
    e.columns = numel < kStrips * kTileElements ? kStrip : kStrips * kStrip;
    e.rows = (numel + e.columns - 1) / e.columns;
    e.mid = e.groups = e.inner = 1;
}

void make_matrix(TensorEntry& e, int64_t rows, int64_t columns) {
    e.numel = rows * columns;
    e.rows = rows;
    e.columns = columns;
    e.mid = e.groups = e.inner = 1;
}

void make_flat_or_rows(TensorEntry& e, int64_t numel, int64_t row_length) {
    if (row_length > 0 && numel > row_length && numel % row_length == 0) {
        make_matrix(e, numel / row_length, row_length);
    } else {
        make_flat(e, numel);
    }
}

// Numbers from one place to the next along each axis, in a contiguous tensor that has lost `axis`: none along that.
Ints strides_without(const Tensor& x, int64_t axis) {
    Ints strides(x.dim(), 0);
    int64_t stride = 1;
    for (int64_t i = x.dim(); i-- > 0;) {
        if (i == axis) continue;
        strides[i] = stride;
        stride *= x.size(i);
    }
    return strides;
}

}  // namespace

void TensorTableBuilder::add(const Tensor& shape, int64_t row_axis, int64_t col_axis, const int64_t* slice,
                             int64_t row_length) {
    const int64_t dim = shape.dim(), numel = shape.numel(), first = std::min(row_axis, col_axis),
                  last = std::max(row_axis, col_axis);
    TensorEntry e{};
    e.tensor = (int32_t)tensors_.size();
    e.decay = numel;
    e.factored = row_axis >= 0;
    if (e.factored) {
        e.line_decay = numel_without(shape, last);
        e.vector_decay = numel_without(shape, first);
        e.row_is_line = row_axis == last;  // the row accumulator averages over its axis
    }
    first_.push_back(entries_.size());
    tensors_.push_back({e.factored, e.row_is_line});
    if (!slice || dim < 2 || (dim == 2 && slice[0] != slice[1])) {
        make_flat_or_rows(e, numel, row_length);
        if (e.factored) {
            make_matrix(e, shape.size(first), shape.size(last));
            e.numel = numel;
            for (int64_t i = 0; i < dim; i++) {
                if (i > first && i < last) e.mid *= shape.size(i);
                if (i < first || (i > first && i < last)) e.groups *= shape.size(i);
                if (i > last) e.inner *= shape.size(i);
            }
            e.columns *= e.inner;
        }
        push(e, {0, 0, 0});
        return;
    }
    const int64_t a = std::min(slice[0], slice[1]), b = std::max(slice[0], slice[1]);
    STD_TORCH_CHECK(a < b || (!e.factored && b == dim - 1),
                    "a slice must be over two axes, or over the last one of a stack of vectors, got axis ", a, " of ",
                    dim);
    const bool together = b == dim - 1 && (a == b || a == b - 1);  // in memory
    if (!together || (e.factored && (first != a || last != b))) {
        add_strided(shape, e, row_axis, col_axis, a, b);
        return;
    }
    const int64_t rows = a < b ? shape.size(a) : 1, columns = shape.size(b), slices = numel_without(shape, a, b);
    if (e.factored) {
        make_matrix(e, rows, columns);
    } else {
        make_flat_or_rows(e, rows * columns, row_length);
    }
    for (int64_t s = 0; s < slices; s++) push(e, {s * rows * columns, s * rows, s * columns});
}

void TensorTableBuilder::add_strided(const Tensor& shape, TensorEntry e, int64_t row_axis, int64_t col_axis, int64_t a,
                                     int64_t b) {
    const Ints whole = strides_without(shape, -1), rows = strides_without(shape, row_axis),
               cols = strides_without(shape, col_axis);
    make_matrix(e, shape.size(a), shape.size(b));
    // What has no accumulators needs none of the limits of flat tensors either. Row and column accumulators are in the
    // places of line and vector.
    const bool swapped = e.factored && !e.row_is_line;
    if (swapped) std::swap(e.line_decay, e.vector_decay);
    e.strided = e.factored = e.row_is_line = true;
    tensors_.back().row_is_line = true;
    const int64_t axes[] = {a, b};
    for (int i = 0; i < 2; i++) {
        e.step[i] = whole[axes[i]];
        e.line_step[i] = rows[axes[i]];
        e.vector_step[i] = cols[axes[i]];
    }
    // All places along the other axes, the last one first.
    Ints index(shape.dim(), 0);
    for (int64_t s = 0; s < numel_without(shape, a, b); s++) {
        Start start{0, 0, 0};
        for (int64_t i = 0; i < shape.dim(); i++) {
            start.element += index[i] * whole[i];
            start.line += index[i] * rows[i];
            start.vector += index[i] * cols[i];
        }
        push(e, start);
        for (int64_t i = shape.dim(); i-- > 0;) {
            if (i == a || i == b) continue;
            if (++index[i] < shape.size(i)) break;
            index[i] = 0;
        }
    }
}

void TensorTableBuilder::add_flat(const Tensor& shape, int64_t slices, int64_t row_length) {
    const int64_t numel = shape.numel();
    TensorEntry e{};
    e.tensor = (int32_t)tensors_.size();
    e.decay = numel;
    first_.push_back(entries_.size());
    tensors_.push_back({false, false});
    make_flat_or_rows(e, numel / slices, row_length);
    for (int64_t s = 0; s < slices; s++) push(e, {s * (numel / slices), 0, 0});
}

void TensorTableBuilder::add_rows(const Tensor& shape, int64_t row_length) {
    TensorEntry e{};
    e.tensor = (int32_t)tensors_.size();
    e.decay = shape.numel();
    first_.push_back(entries_.size());
    tensors_.push_back({false, false});
    make_matrix(e, shape.numel() / row_length, row_length);
    push(e, {0, 0, 0});
}

void TensorTableBuilder::push(TensorEntry e, Start start) {
    e.lanes = 1;
    while (e.lanes < kWarpSize && e.lanes * kLane < e.columns) e.lanes *= 2;
    const int64_t tile_rows = (int64_t)kTurns * kWarps * (kWarpSize / e.lanes);
    const int64_t strips = (e.columns + kStrip - 1) / kStrip, row_tiles = (e.rows + tile_rows - 1) / tile_rows;
    STD_TORCH_CHECK(strips <= INT32_MAX && row_tiles <= INT32_MAX, kTooMany);
    e.strips = (int32_t)strips;
    e.row_tiles = e.numel ? (int32_t)row_tiles : 0;
    e.wide = !e.strided && e.columns % kLane == 0 && e.numel % kLane == 0;
    any_empty_ |= e.numel == 0;
    entries_.push_back(e);
    starts_.push_back(start);
}

void TensorTableBuilder::set(Slot slot, size_t t, const void* data, size_t size) {
    const char* address = static_cast<const char*>(data);
    if (!address) return;
    if (!base_[slot]) base_[slot] = address;
    const bool line = slot == sLine || slot == sLineFactor, vector = slot == sVector || slot == sVectorFactor;
    for (size_t i = first_[t]; i < end(t); i++) {
        const Start& start = starts_[i];
        const int64_t place = line ? start.line : vector ? start.vector : start.element;
        entries_[i].at[slot] = address - base_[slot] + place * (int64_t)size;
    }
}

void TensorTableBuilder::set_elements(Slot slot, size_t t, const void* data, size_t size) {
    set(slot, t, data, size);
    for (size_t i = first_[t]; i < end(t); i++) {
        const uintptr_t address = reinterpret_cast<uintptr_t>(data) + starts_[i].element * size;
        entries_[i].wide &= address % (kLane * size) == 0;
    }
}

void TensorTableBuilder::set_any(Slot slot, size_t t, const Tensor& x) {
    const int32_t type = type_of(x);
    for (size_t i = first_[t]; i < end(t); i++) (slot == sP ? entries_[i].p_type : entries_[i].g_type) = type;
    set_elements(slot, t, x.data_ptr(), type == kFloat32 ? sizeof(float) : sizeof(uint16_t));
}

void TensorTableBuilder::set_state(Slot slot, size_t t, const Tensor& x) {
    const ScalarType type = x.scalar_type();
    set_elements(slot, t, x.data_ptr(), type == ScalarType::Float ? 4 : type == ScalarType::BFloat16 ? 2 : 1);
}

void TensorTableBuilder::set_formats(size_t t, FormatEntry f) {
    formats_.resize(entries_.size());
    for (size_t i = first_[t]; i < end(t); i++) {
        const TensorEntry& e = entries_[i];
        const int64_t first = starts_[i].element;
        f.lines_are_rows = !e.strided && e.columns == f.row && first % f.row == 0;
        f.first = f.lines_are_rows ? first / f.row : first;
        formats_[i] = f;
    }
}

TensorTable TensorTableBuilder::build(const Tensor& like, void* stream, bool tickets, bool sums) {
    int32_t tile = 0;
    int64_t ticket = 0;
    first_tile_.clear();
    for (TensorEntry& e : entries_) {
        first_tile_.push_back(tile);
        const int64_t tiles = e.groups * e.strips * e.row_tiles;
        STD_TORCH_CHECK(tiles < INT32_MAX - tile, kTooMany);
        tile += (int32_t)tiles;
        STD_TORCH_CHECK(ticket < INT32_MAX, kTooMany);
        e.first_ticket = (int32_t)ticket++;
        if (!sums || !e.factored) continue;
        ticket += e.groups * (e.strips + e.row_tiles);
        e.line_part = parts_;
        parts_ += e.strips * e.line_length();
        e.vector_part = parts_;
        parts_ += e.row_tiles * e.vector_length();
    }
    first_tile_.push_back(tile);
    if (first_tile_.size() % 2) first_tile_.push_back(tile);  // to a multiple of 8 bytes

    std::vector<char> content;
    append(content, entries_.data(), entries_.size());
    append(content, first_tile_.data(), first_tile_.size());
    const size_t before_formats = content.size();
    append(content, formats_.data(), formats_.size());
    char* data = tickets ? device_copy(like, content, stream, ticket * sizeof(uint32_t), like.data_ptr())
                         : device_copy(like, content, stream);
    formats_on_device_ = reinterpret_cast<const FormatEntry*>(data + before_formats);
    TensorTable table{};
    table.entries = reinterpret_cast<const TensorEntry*>(data);
    table.first_tile = reinterpret_cast<const int32_t*>(data + entries_.size() * sizeof(TensorEntry));
    table.count = (int32_t)entries_.size();
    table.tickets = reinterpret_cast<uint32_t*>(data + content.size());
    for (int slot = 0; slot < kSlots; slot++) table.base[slot] = const_cast<char*>(base_[slot]);
    return table;
}

}  // namespace hf_lopt
