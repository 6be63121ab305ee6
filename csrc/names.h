// The names of a rule's features, as operators take them, and the columns that the features have.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "mlp.h"

namespace hf_lopt {

// A type of its own, because it is read from the caller's list without a copy per string.
struct Names : std::vector<std::string> {};

struct Group {
    const char* name;
    int input, vector, width;  // the first element column or the vector feature; -1 where it is not one
};

constexpr Group kGroups[] = {
    {"g", kG, -1, 1},
    {"clip_g", kClipG, -1, 1},
    {"p", kP, -1, 1},
    {"m", kM, -1, kMomenta},
    {"v", kV, -1, 1},
    {"m_rsqrt_v", kMRsqrtV, -1, kMomenta},
    {"rsqrt_v", kRsqrtV, -1, 1},
    {"fac_g", kFacG, -1, kFactored},
    {"g_rsqrt_v", kGRsqrtV, -1, 1},
    {"fac_m", kFacM, -1, kMomenta},
    {"row", -1, kRow, kFactored},
    {"col", -1, kCol, kFactored},
    {"rsqrt_row", -1, kRsqrtRow, kFactored},
    {"rsqrt_col", -1, kRsqrtCol, kFactored},
};

inline Columns columns_of(const Names& names) {
    Columns columns;
    columns.count = 0;
    std::fill(std::begin(columns.element), std::end(columns.element), -1);
    for (auto& vector : columns.vector) std::fill(std::begin(vector), std::end(vector), -1);
    for (const std::string& name : names) {
        const Group* group = std::find_if(std::begin(kGroups), std::end(kGroups),
                                          [&](const Group& candidate) { return name == candidate.name; });
        STD_TORCH_CHECK(group != std::end(kGroups), "no fused kernel for the feature ", name);
        int32_t* first = group->input >= 0 ? columns.element + group->input : columns.vector[group->vector];
        for (int i = 0; i < group->width; i++) first[i] = columns.count++;
    }
    return columns;
}

}  // namespace hf_lopt

// The names of features are short-lived and many: read from the list in place, one deletion each.
namespace torch::stable::detail {
template <>
struct __attribute__((visibility("hidden"))) ToImpl<hf_lopt::Names> {
    static hf_lopt::Names call(StableIValue value, uint64_t, bool) {
        StableListHandle list = to<StableListHandle>(value);
        size_t size = 0;
        STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
        hf_lopt::Names names;
        for (size_t i = 0; i < size; i++) {
            StableIValue item;
            STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
            StringHandle string = to<StringHandle>(item);
            size_t length = 0;
            const char* data = nullptr;
            STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(string, &length));
            STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(string, &data));
            names.emplace_back(data, length);
            STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(string));
        }
        STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
        return names;
    }
};
}  // namespace torch::stable::detail
