#include "held_lists.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace hf_lopt {

namespace {

struct List {
    explicit List(Tensors&& given) : tensors(std::move(given)) {}
    Tensors tensors;
    Ints kinds;  // what `same_kinds` compares with; empty before its first call
};

struct Lists {
    std::mutex mutex;
    std::unordered_map<int64_t, std::shared_ptr<List>> by_number;
};

thread_local std::vector<Tensors> spare;

// Never destroyed: at the end of the process the library of the tensors may be gone before this one.
Lists& lists() {
    static Lists* const all = new Lists;
    return *all;
}

// Also lets go of a list outside of the lock, since tensors may run anything when they go.
std::shared_ptr<List> replace(int64_t number, std::shared_ptr<List> list) {
    Lists& all = lists();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.by_number.find(number);
    if (found == all.by_number.end()) {
        if (list) all.by_number.emplace(number, std::move(list));
        return nullptr;
    }
    std::swap(found->second, list);
    if (!found->second) all.by_number.erase(found);
    return list;
}

std::shared_ptr<List> held(int64_t number) {
    Lists& all = lists();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.by_number.find(number);
    STD_TORCH_CHECK(found != all.by_number.end(), "no list of tensors is held under the number ", number);
    return found->second;
}

}  // namespace

void hold(Tensors tensors, int64_t number) {
    STD_TORCH_CHECK(number > 0, "lists are held under numbers above 0, got ", number);
    replace(number, std::make_shared<List>(std::move(tensors)));
}

void release(Tensor, int64_t number) { replace(number, nullptr); }

Tensors fetch(Tensor, int64_t number) { return held(number)->tensors; }

bool same_kinds(Tensor, int64_t number) {
    const std::shared_ptr<List> list = held(number);
    Ints& kinds = list->kinds;
    const bool first = kinds.empty();
    size_t at = 0;
    const auto same = [&](int64_t value) {
        if (first) kinds.push_back(value);
        return first || (at < kinds.size() && kinds[at++] == value);
    };
    for (const Tensor& x : list->tensors) {
        int32_t type, device;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
        const auto shape = x.sizes();
        bool all = same(type) && same(device) && same(x.get_device_index()) && same((int64_t)shape.size());
        for (size_t i = 0; all && i < shape.size(); i++) all = same(shape[i]);
        if (!all) return false;
    }
    return true;
}

std::vector<Tensors> take_spare() { return std::exchange(spare, {}); }

void Held::offer_spare() const {
    for (const int64_t* number = at_; number != end_; number++) {
        const std::shared_ptr<List> list = replace(*number, nullptr);
        if (list) spare.push_back(list.use_count() == 1 ? std::move(list->tensors) : list->tensors);
    }
}

int64_t Held::next() {
    STD_TORCH_CHECK(at_ != end_, "held has too few numbers for the lists of this operator");
    return *at_++;
}

void Held::take_one(Tensors& list) {
    const int64_t count = next();
    if (count == 0) return;
    Tensors joined;
    for (int64_t i = 0; i < count; i++) {
        const std::shared_ptr<List> part = held(next());
        joined.insert(joined.end(), part->tensors.begin(), part->tensors.end());
    }
    joined.insert(joined.end(), std::make_move_iterator(list.begin()), std::make_move_iterator(list.end()));
    list = std::move(joined);
}

void Held::give_one(Tensors& list) {
    const int64_t number = next();
    if (number == 0) return;
    hold(std::move(list), number);
    list = Tensors();
}

}  // namespace hf_lopt
