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
    Ints kinds;  // under a number of its own, without tensors: what `same_kinds` compares with
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

std::shared_ptr<List> find(int64_t number) {
    Lists& all = lists();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.by_number.find(number);
    return found == all.by_number.end() ? nullptr : found->second;
}

std::shared_ptr<List> held(int64_t number) {
    std::shared_ptr<List> list = find(number);
    STD_TORCH_CHECK(list != nullptr, "no list of tensors is held under the number ", number);
    return list;
}

}  // namespace

void hold(Tensors tensors, int64_t number) {
    STD_TORCH_CHECK(number > 0, "lists are held under numbers above 0, got ", number);
    replace(number, std::make_shared<List>(std::move(tensors)));
}

void release(Tensor, int64_t number) { replace(number, nullptr); }

Tensors fetch(Tensor, int64_t number) { return held(number)->tensors; }

bool same_kinds(Tensor, Ints numbers, Ints strided, int64_t kinds) {
    Ints first;  // of the first call
    const std::shared_ptr<List> before = find(kinds);
    size_t at = 0;
    const auto same = [&](int64_t value) {
        if (!before) first.push_back(value);
        return !before || (at < before->kinds.size() && before->kinds[at++] == value);
    };
    const auto all_same = [&](const int64_t* values, size_t count) {
        for (size_t i = 0; i < count; i++) {
            if (!same(values[i])) return false;
        }
        return true;
    };
    const auto same_list = [&](const Tensors& list, bool with_strides) {
        if (!same((int64_t)list.size())) return false;
        for (const Tensor& x : list) {
            int32_t type, device, layout = aoti_torch_layout_strided();
            TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
            TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
            if (with_strides) TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
            const int64_t kind[] = {type, device, x.get_device_index(), layout};
            const auto shape = x.sizes();
            if (!all_same(kind, 4) || !same((int64_t)shape.size()) || !all_same(shape.data(), shape.size())) {
                return false;
            }
            // Others have none.
            if (!with_strides || layout != aoti_torch_layout_strided()) continue;
            int64_t* strides;
            TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x.get(), &strides));
            if (!all_same(strides, shape.size())) return false;
        }
        return true;
    };
    for (const int64_t number : numbers) {
        if (!same_list(held(number)->tensors, false)) return false;
    }
    for (const int64_t number : strided) {
        if (!same_list(held(number)->tensors, true)) return false;
    }
    if (!before) {
        const auto made = std::make_shared<List>(Tensors());
        made->kinds = std::move(first);
        replace(kinds, made);
    }
    return !before || at == before->kinds.size();
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
