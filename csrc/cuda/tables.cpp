#include "tables.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>

namespace hf_lopt {

Device::Device(const Tensor& x) {
    const int index = x.get_device_index();
    if (index >= 0) guard_ = std::make_unique<torch::stable::accelerator::DeviceGuard>(index);
    stream_ = current_stream(index);
}

// ---- tables that are kept -----------------------------------------------------------------------------------------

namespace {

constexpr const char* kTooMany = "the parameters have too many elements for one step";

struct Kept {
    int device;
    void* stream;
    const void* owner;
    uint64_t capture;  // the graph that copies it, 0 for none
    uint64_t hash;
    std::vector<char> content;
    size_t size;  // with the zeros
    Tensor memory;
    char* staging;
    void* copied;  // a mark behind the copy
    bool forever;  // a graph uses it
};

// A table that was in use a few calls ago is met again in the next step; tables of gone models are few.
constexpr size_t kKept = 256;

std::mutex guard;
// Most recently used first. Never freed: the process may end before the device is done with it.
std::list<Kept>& kept() {
    static auto* tables = new std::list<Kept>;
    return *tables;
}

uint64_t hash_of(const std::vector<char>& bytes) {
    uint64_t hash = 1469598103934665603u;
    size_t i = 0;
    for (; i + 8 <= bytes.size(); i += 8) {
        uint64_t word;
        std::memcpy(&word, &bytes[i], 8);
        hash = (hash ^ word) * 1099511628211u;
        hash ^= hash >> 29;
    }
    for (; i < bytes.size(); i++) hash = (hash ^ (unsigned char)bytes[i]) * 1099511628211u;
    return hash;
}

}  // namespace

char* device_copy(const Tensor& like, const std::vector<char>& content, void* stream, size_t zeros,
                  const void* owner) {
    const int device = like.get_device_index();
    const uint64_t capture = capture_id(stream), hash = hash_of(content);
    const size_t size = content.size() + zeros;
    const std::lock_guard<std::mutex> lock(guard);
    std::list<Kept>& tables = kept();
    const auto found = std::find_if(tables.begin(), tables.end(), [&](const Kept& k) {
        // The tables of a graph are copied when it is replayed: nobody else finds them filled.
        return k.hash == hash && k.size == size && k.device == device && k.stream == stream && k.owner == owner &&
               (k.capture == 0 || k.capture == capture) && k.content == content;
    });
    if (found != tables.end()) {
        found->forever |= capture != 0;
        tables.splice(tables.begin(), tables, found);
        return static_cast<char*>(found->memory.data_ptr());
    }
    // The place of the table that was used longest ago, if it is large enough and no copy from it is under way.
    auto old = tables.end();
    if (!capture && tables.size() >= kKept) {
        for (auto k = tables.begin(); k != tables.end(); k++) {
            if (!k->forever && k->device == device && k->stream == stream &&
                (size_t)k->memory.numel() * sizeof(double) >= size && passed(k->copied))
                old = k;
        }
    }
    if (old == tables.end()) {
        const int64_t words = (int64_t)((size + sizeof(double) - 1) / sizeof(double));
        Kept k{device,  stream, owner, capture, hash, {}, size, doubles(like, {words}), new_staging(size),
               nullptr, false};
        tables.push_front(std::move(k));
    } else {
        tables.splice(tables.begin(), tables, old);
    }
    Kept& k = tables.front();
    k.owner = owner;
    k.capture = capture;
    k.forever = capture != 0;
    k.hash = hash;
    k.content = content;
    k.size = size;
    std::memcpy(k.staging, content.data(), content.size());
    std::memset(k.staging + content.size(), 0, zeros);
    char* data = static_cast<char*>(k.memory.data_ptr());
    copy_to_device(data, k.staging, size, stream);
    if (!capture) k.copied = mark(k.copied, stream);
    return data;
}

// ---- tensors ------------------------------------------------------------------------------------------------------

const Tensor& Copies::keep(const Tensor& x) {
    kept_.push_back(std::make_unique<Tensor>(x.is_contiguous() ? x : torch::stable::contiguous(x)));
    return *kept_.back();
}

const Tensor& Copies::readable(const Tensor& x) { return keep(x); }

const Tensor& Copies::writable(const Tensor& x) {
    const Tensor& y = keep(x);
    if (!x.is_contiguous()) written_.emplace_back(x, &y);
    return y;
}

void Copies::store() {
    for (auto& [original, copy] : written_) torch::stable::copy_(original, *copy);
}

int64_t Pieces::add(int64_t numel) {
    const int64_t place = size_;
    size_ += (numel + 3) / 4 * 4;
    return place;
}

void Pieces::allocate(const Tensor& like, bool clear) {
    const int64_t size[] = {std::max<int64_t>(size_, 1)};
    memory_ = clear ? torch::stable::new_zeros(like, {size, 1}, ScalarType::Float)
                    : torch::stable::new_empty(like, {size, 1}, ScalarType::Float);
}

Tensor Pieces::piece(int64_t place, const std::vector<int64_t>& shape) const {
    std::vector<int64_t> strides(shape.size());
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) strides[i] = stride;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory_.get(), (int64_t)shape.size(), shape.data(),
                                                          strides.data(), place, &handle));
    return Tensor(handle);
}

int32_t type_of(const Tensor& x) {
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                    "parameters and gradients must be float32, bfloat16 or float16 for the fused kernels");
    return type == ScalarType::Float ? kFloat32 : type == ScalarType::Half ? kFloat16 : kBFloat16;
}

std::vector<int64_t> shape_without(const Tensor& x, int64_t axis) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < x.dim(); i++) {
        if (i != axis) shape.push_back(x.size(i));
    }
    return shape;
}

Tensor doubles(const Tensor& like, std::vector<int64_t> size, bool clear) {
    return clear ? torch::stable::new_zeros(like, {size.data(), size.size()}, ScalarType::Double)
                 : torch::stable::new_empty(like, {size.data(), size.size()}, ScalarType::Double);
}

Tensor floats(const Tensor& like, std::vector<int64_t> size) {
    return torch::stable::new_empty(like, {size.data(), size.size()}, ScalarType::Float);
}

Strided strided(const Tensor& x, int64_t count, const char* what) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, what, " must be float32 for the fused kernels");
    const int64_t size = x.dim() ? x.size(0) : 1;
    STD_TORCH_CHECK(size == 1 || size == count, what, " is for ", size, " tensors, there are ", count);
    Strided s{static_cast<const float*>(x.data_ptr()), {0, 0, 0}};
    for (int64_t i = 0; i < x.dim() && i < 3; i++) s.stride[i] = x.stride(i);
    if (size == 1) s.stride[0] = 0;
    return s;
}

const bool* flag(const Tensor& skip) {
    STD_TORCH_CHECK(skip.scalar_type() == ScalarType::Bool && skip.numel() == 1, "skip must be a bool tensor");
    return static_cast<const bool*>(skip.data_ptr());
}

void set_decays(const Floats& decays, int count, float* keep, float* add) {
    STD_TORCH_CHECK((int)decays.size() == count,
                    "the fused kernels are for 3 momenta, 1 second moment and 3 factored accumulators");
    for (int i = 0; i < count; i++) {
        keep[i] = (float)decays[i];
        add[i] = 1.0f - keep[i];
    }
}

// ---- entries ------------------------------------------------------------------------------------------------------

namespace {

// The product of the sizes of all axes but one or two.
int64_t numel_without(const Tensor& x, int64_t a, int64_t b = -1) {
    int64_t numel = 1;
    for (int64_t i = 0; i < x.dim(); i++) numel *= i == a || i == b ? 1 : x.size(i);
    return numel;
}

void make_flat(Entry& e, int64_t numel) {
    e.numel = numel;
    e.rows = (numel + kStrip - 1) / kStrip;
    e.columns = kStrip;
    e.mid = e.groups = e.inner = 1;
}

void make_matrix(Entry& e, int64_t rows, int64_t columns) {
    e.numel = rows * columns;
    e.rows = rows;
    e.columns = columns;
    e.mid = e.groups = e.inner = 1;
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

void TableBuilder::add(const Tensor& shape, int64_t row_axis, int64_t col_axis, const int64_t* slice) {
    const int64_t dim = shape.dim(), numel = shape.numel(), first = std::min(row_axis, col_axis),
                  last = std::max(row_axis, col_axis);
    Entry e{};
    e.tensor = (int32_t)tensors_.size();
    e.decay = numel;
    e.factored = row_axis >= 0;
    if (e.factored) {
        STD_TORCH_CHECK(first >= 0 && first < last && last < dim, "the factored axes must be two axes of the tensor");
        e.line_decay = numel_without(shape, last);
        e.vector_decay = numel_without(shape, first);
        e.row_is_line = row_axis == last;  // the row accumulator averages over its axis
    }
    first_.push_back(entries_.size());
    tensors_.push_back({numel, e.line_decay, e.vector_decay, e.factored, e.row_is_line});
    if (!slice || dim < 2 || (dim == 2 && slice[0] != slice[1])) {
        make_flat(e, numel);
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
    STD_TORCH_CHECK(a >= 0 && b < dim && (a < b || (!e.factored && b == dim - 1)),
                    "a slice must be over two axes, or over the last one of a stack of vectors");
    const bool together = b == dim - 1 && (a == b || a == b - 1);  // in memory
    if (!together || (e.factored && (first != a || last != b))) {
        add_strided(shape, e, row_axis, col_axis, a, b);
        return;
    }
    const int64_t rows = a < b ? shape.size(a) : 1, columns = shape.size(b), slices = numel_without(shape, a, b);
    if (e.factored) {
        make_matrix(e, rows, columns);
    } else {
        make_flat(e, rows * columns);
    }
    for (int64_t s = 0; s < slices; s++) push(e, {s * rows * columns, s * rows, s * columns});
}

void TableBuilder::add_strided(const Tensor& shape, Entry e, int64_t row_axis, int64_t col_axis, int64_t a,
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
    if (swapped) std::swap(tensors_.back().lines, tensors_.back().vectors);
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

void TableBuilder::add_flat(const Tensor& shape, int64_t slices) {
    const int64_t numel = shape.numel();
    STD_TORCH_CHECK(slices > 0 && numel % slices == 0, "a tensor of ", numel, " elements has no ", slices, " slices");
    Entry e{};
    e.tensor = (int32_t)tensors_.size();
    e.decay = numel;
    first_.push_back(entries_.size());
    tensors_.push_back({numel, 0, 0, false, false});
    make_flat(e, numel / slices);
    for (int64_t s = 0; s < slices; s++) push(e, {s * (numel / slices), 0, 0});
}

void TableBuilder::push(Entry e, Start start) {
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

void TableBuilder::set(Slot slot, size_t t, const void* data, size_t size) {
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

void TableBuilder::set_elements(Slot slot, size_t t, const void* data, size_t size) {
    set(slot, t, data, size);
    for (size_t i = first_[t]; i < end(t); i++) {
        const uintptr_t address = reinterpret_cast<uintptr_t>(data) + starts_[i].element * size;
        entries_[i].wide &= address % (kLane * size) == 0;
    }
}

void TableBuilder::set_any(Slot slot, size_t t, const Tensor& x) {
    STD_TORCH_CHECK(x.numel() == tensors_[t].numel, "a gradient or an output has another shape than its parameter");
    const int32_t type = type_of(x);
    for (size_t i = first_[t]; i < end(t); i++) (slot == sP ? entries_[i].p_type : entries_[i].g_type) = type;
    set_elements(slot, t, x.data_ptr(), type == kFloat32 ? sizeof(float) : sizeof(uint16_t));
}

void TableBuilder::set_float(Slot slot, size_t t, const Tensor& x, const char* what) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, what, " must be float32 for the fused kernels");
    set_elements(slot, t, x.data_ptr(), sizeof(float));
}

Table TableBuilder::build(const Tensor& like, void* stream, bool tickets, bool sums) {
    int32_t tile = 0;
    int64_t ticket = 0;
    first_tile_.clear();
    for (Entry& e : entries_) {
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
    char* data = tickets ? device_copy(like, content, stream, ticket * sizeof(uint32_t), like.data_ptr())
                         : device_copy(like, content, stream);
    Table table{};
    table.entries = reinterpret_cast<const Entry*>(data);
    table.first_tile = reinterpret_cast<const int32_t*>(data + entries_.size() * sizeof(Entry));
    table.count = (int32_t)entries_.size();
    table.tickets = reinterpret_cast<uint32_t*>(data + content.size());
    for (int slot = 0; slot < kSlots; slot++) table.base[slot] = const_cast<char*>(base_[slot]);
    return table;
}

}  // namespace hf_lopt
