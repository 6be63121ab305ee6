#include "device_memory.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <map>
#include <mutex>

#include "runtime.h"

namespace hf_lopt {

Device::Device(const Tensor& x) : Device(x.get_device_index()) {}

Device::Device(int index) {
    if (index >= 0) guard_ = std::make_unique<torch::stable::accelerator::DeviceGuard>(index);
    stream_ = current_stream(index);
}

// ---- copies that are kept -----------------------------------------------------------------------------------------

namespace {

// Memory in large pieces that are never given back: a step asks the driver for memory, which may wait for the device,
// only when a piece is used up. It is not torch's either, whose memory belongs to a graph while one is captured, and
// while torch.compile warms one up: a table there would be overwritten by other graphs of the pool.
class Arena {
  public:
    explicit Arena(char* (*allocate)(size_t)) : allocate_(allocate) {}

    char* take(size_t bytes) {
        bytes = (bytes + kAlign - 1) / kAlign * kAlign;
        if (bytes > left_) {
            const size_t size = std::max(bytes, kPiece);
            next_ = allocate_(size);
            left_ = size;
        }
        char* found = next_;
        next_ += bytes;
        left_ -= bytes;
        return found;
    }

  private:
    static constexpr size_t kAlign = 256, kPiece = 4 << 20;
    char* (*allocate_)(size_t);
    char* next_ = nullptr;
    size_t left_ = 0;
};

// Never freed: the process may end before the device is done with them.
Arena& staging_arena() {
    static auto* arena = new Arena(new_host_memory);
    return *arena;
}
Arena& device_arena(int device) {
    static auto* arenas = new std::map<int, Arena>;
    return arenas->emplace(device, Arena(new_device_memory)).first->second;
}

// A copy on the device, with the memory of the host that it was made from. One that has not been made, or failed, has
// no content, which none asks for.
struct KeptCopy {
    int device;
    void* stream;
    size_t room;
    char *memory, *staging;
    void* copied = nullptr;  // a mark behind the copy
    bool forever = true;     // a graph uses it, or it is not known whether the device is done with it
    const void* owner = nullptr;
    uint64_t capture = 0;  // the graph that copies it, 0 for none
    uint64_t hash = 0;
    std::vector<char> content;
    size_t size = 0;  // with the zeros
};

// A table that was in use a few calls ago is met again in the next step; those of models that are gone are few.
constexpr size_t kMostCopies = 256;

std::mutex guard;
// Most recently used first.
std::list<KeptCopy>& kept_copies() {
    static auto* copies = new std::list<KeptCopy>;
    return *copies;
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
    std::list<KeptCopy>& copies = kept_copies();
    const auto found = std::find_if(copies.begin(), copies.end(), [&](const KeptCopy& k) {
        // The tables of a graph are copied when it is replayed: nobody else finds them filled.
        return k.hash == hash && k.size == size && k.device == device && k.stream == stream && k.owner == owner &&
               (k.capture == 0 || k.capture == capture) && k.content == content;
    });
    if (found != copies.end()) {
        found->forever |= capture != 0;
        copies.splice(copies.begin(), copies, found);
        return found->memory;
    }
    // The place of the table that was used longest ago, if it is large enough and no copy from it is under way.
    auto old = copies.end();
    if (!capture && copies.size() >= kMostCopies) {
        for (auto k = copies.rbegin(); k != copies.rend(); k++) {
            if (k->forever || k->device != device || k->stream != stream || k->room < size) continue;
            // Those that were used after one that is under way are hardly done with, and each question has its price.
            if (passed(k->copied)) old = std::prev(k.base());
            break;
        }
    }
    if (old == copies.end()) {
        KeptCopy k{device, stream, size, device_arena(device).take(size), staging_arena().take(size)};
        copies.push_front(std::move(k));
    } else {
        copies.splice(copies.begin(), copies, old);
    }
    KeptCopy& k = copies.front();
    // Until all is done nobody finds it, and its place is not given to another.
    k.content.clear();
    k.size = 0;
    k.forever = true;
    std::memcpy(k.staging, content.data(), content.size());
    std::memset(k.staging + content.size(), 0, zeros);
    copy_to_device(k.memory, k.staging, size, stream);
    if (!capture) k.copied = mark(k.copied, stream);
    k.owner = owner;
    k.capture = capture;
    k.forever = capture != 0;
    k.hash = hash;
    k.content = content;
    k.size = size;
    return k.memory;
}

// ---- tensors -------------------------------------------------------------------------------------------------------

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

}  // namespace hf_lopt
