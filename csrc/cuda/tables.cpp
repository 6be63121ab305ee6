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

struct Kept {
    int device;
    void* stream;
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
constexpr size_t kKept = 64;

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

char* device_copy(const Tensor& like, const std::vector<char>& content, size_t zeros, void* stream) {
    const int device = like.get_device_index();
    const uint64_t capture = capture_id(stream), hash = hash_of(content);
    const size_t size = content.size() + zeros;
    const std::lock_guard<std::mutex> lock(guard);
    std::list<Kept>& tables = kept();
    const auto found = std::find_if(tables.begin(), tables.end(), [&](const Kept& k) {
        // The tables of a graph are copied when it is replayed: nobody else finds them filled.
        return k.hash == hash && k.size == size && k.device == device && k.stream == stream &&
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
        Kept k{device, stream, capture, hash, {}, size, doubles(like, {words}), new_staging(size), nullptr, false};
        tables.push_front(std::move(k));
    } else {
        tables.splice(tables.begin(), tables, old);
    }
    Kept& k = tables.front();
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

Entry& TableBuilder::add(const Tensor& shape, int64_t row_axis, int64_t col_axis) {
    Entry e{};
    e.numel = shape.numel();
    e.rows = (e.numel + kStrip - 1) / kStrip;
    e.columns = kStrip;
    e.mid = e.groups = e.inner = 1;
    e.factored = row_axis >= 0;
    if (e.factored) {
        const int64_t first = std::min(row_axis, col_axis), last = std::max(row_axis, col_axis);
        STD_TORCH_CHECK(first >= 0 && first < last && last < shape.dim(),
                        "the factored axes must be two axes of the tensor");
        e.rows = shape.size(first);
        e.columns = shape.size(last);
        for (int64_t i = 0; i < shape.dim(); i++) {
            if (i > first && i < last) e.mid *= shape.size(i);
            if (i < first || (i > first && i < last)) e.groups *= shape.size(i);
            if (i > last) e.inner *= shape.size(i);
        }
        e.columns *= e.inner;
        e.row_is_line = row_axis == last;  // the row accumulator averages over its axis
    }
    e.lanes = 1;
    while (e.lanes < kWarpSize && e.lanes * kLane < e.columns) e.lanes *= 2;
    const int64_t tile_rows = (int64_t)kTurns * kWarps * (kWarpSize / e.lanes);
    e.strips = (int32_t)((e.columns + kStrip - 1) / kStrip);
    e.row_tiles = e.numel ? (int32_t)((e.rows + tile_rows - 1) / tile_rows) : 0;
    e.wide = e.columns % kLane == 0 && e.numel % kLane == 0;
    any_empty_ |= e.numel == 0;
    entries_.push_back(e);
    return entries_.back();
}

void TableBuilder::set(Slot slot, size_t t, const void* data) {
    const char* address = static_cast<const char*>(data);
    if (!address) return;
    if (!base_[slot]) base_[slot] = address;
    entries_[t].at[slot] = address - base_[slot];
}

void TableBuilder::set_any(Slot slot, size_t t, const Tensor& x) {
    Entry& e = entries_[t];
    STD_TORCH_CHECK(x.numel() == e.numel, "a gradient or an output has another shape than its parameter");
    const int32_t type = type_of(x);
    (slot == sP ? e.p_type : e.g_type) = type;
    const void* data = x.data_ptr();
    e.wide &= reinterpret_cast<uintptr_t>(data) % (kLane * (type == kFloat32 ? 4 : 2)) == 0;
    set(slot, t, data);
}

void TableBuilder::set_float(Slot slot, size_t t, const Tensor& x, const char* what) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, what, " must be float32 for the fused kernels");
    const void* data = x.data_ptr();
    entries_[t].wide &= reinterpret_cast<uintptr_t>(data) % (kLane * sizeof(float)) == 0;
    set(slot, t, data);
}

Table TableBuilder::build(const Tensor& like, void* stream, bool sums) {
    int32_t tile = 0, ticket = 0;
    first_tile_.clear();
    for (Entry& e : entries_) {
        first_tile_.push_back(tile);
        const int64_t tiles = e.groups * e.strips * e.row_tiles;
        STD_TORCH_CHECK(tiles < INT32_MAX - tile, "the parameters have too many elements for one step");
        tile += (int32_t)tiles;
        e.first_ticket = ticket++;
        if (!sums || !e.factored) continue;
        ticket += (int32_t)(e.groups * (e.strips + e.row_tiles));
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
    char* data = device_copy(like, content, ticket * sizeof(uint32_t), stream);
    Table table{};
    table.entries = reinterpret_cast<const Entry*>(data);
    table.first_tile = reinterpret_cast<const int32_t*>(data + entries_.size() * sizeof(Entry));
    table.count = (int32_t)entries_.size();
    table.tickets = reinterpret_cast<uint32_t*>(data + content.size());
    for (int slot = 0; slot < kSlots; slot++) table.base[slot] = const_cast<char*>(base_[slot]);
    return table;
}

}  // namespace hf_lopt
