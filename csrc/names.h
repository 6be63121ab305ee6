// The names of a rule's features, as operators take them.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

namespace hf_lopt {

// A type of its own, because it is read from the caller's list without a copy per string.
struct Names : std::vector<std::string> {};

}  // namespace hf_lopt

// The names of features are short-lived and many: read from the list in place, one deletion each.
namespace torch::stable::detail {
template <>
struct __attribute__((visibility("hidden"))) ToImpl<hf_lopt::Names> {
    static hf_lopt::Names call(StableIValue value, uint64_t, bool) {
        StableListHandle list = to<StableListHandle>(value);
        size_t size = 0;
        TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
        hf_lopt::Names names;
        for (size_t i = 0; i < size; i++) {
            StableIValue item;
            TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
            StringHandle string = to<StringHandle>(item);
            size_t length = 0;
            const char* data = nullptr;
            TORCH_ERROR_CODE_CHECK(torch_string_length(string, &length));
            TORCH_ERROR_CODE_CHECK(torch_string_c_str(string, &data));
            names.emplace_back(data, length);
            TORCH_ERROR_CODE_CHECK(torch_delete_string(string));
        }
        TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
        return names;
    }
};
}  // namespace torch::stable::detail
