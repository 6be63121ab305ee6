#include "stored.h"

#include <algorithm>

namespace hf_lopt {

RandomRow RandomPlace::row(int64_t line, int64_t start) const {
    int64_t global = 0, stride = 1;
    for (size_t i = place_.sizes.size(); i-- > 0;) {
        global += (line % place_.sizes[i] + place_.starts[i]) * stride;
        line /= place_.sizes[i];
        stride *= place_.whole[i];
    }
    return {row_hash(place_.key, (uint32_t)global) + place_.first_column + (uint32_t)start, turn_};
}

std::vector<RandomPlace> random_places(const Tensors& params, const Rounding& rounding) {
    std::vector<RandomPlace> places;
    for (TensorPlace& place : check_places(params, rounding)) {
        places.emplace_back(std::move(place), turn_of(*static_cast<const int64_t*>(rounding.step->data_ptr())));
    }
    places.resize(params.size());
    return places;
}

StoredState::StoredState(const Tensor& momenta, const Tensor& second, const Tensor* momentum_scales,
                         const Tensor* second_scales, bool written, ContiguousCopies& copies) {
    const ScalarType type = momenta.scalar_type();
    format_ = type == ScalarType::Float ? kFloat32 : type == ScalarType::BFloat16 ? kBFloat16 : kCodes;
    const int64_t size = type == ScalarType::Float ? 4 : type == ScalarType::BFloat16 ? 2 : 1;
    const auto plane = [&](const Tensor& x) -> const Tensor& {
        return written ? copies.writable(x) : copies.readable(x);
    };
    for (const auto& [x, scale] : {std::pair(&momenta, momentum_scales), std::pair(&second, second_scales)}) {
        const int64_t count = x->size(0), numel = count ? x->numel() / count : 0;
        char* data = static_cast<char*>(plane(*x).data_ptr());
        float* scales = format_ == kCodes ? static_cast<float*>(plane(*scale).data_ptr()) : nullptr;
        const int64_t blocks = scales && count ? scale->numel() / count : 0;
        STD_TORCH_CHECK(planes_ + count <= kMost, "the fused kernels are for at most ", kMost, " accumulators");
        for (int64_t d = 0; d < count; d++, planes_++) {
            data_[planes_] = data + d * numel * size;
            scales_[planes_] = scales ? scales + d * blocks : nullptr;
        }
    }
}

namespace {

int64_t block_at(int64_t line, int64_t start, int64_t columns) {
    return line * ((columns + kCodeBlock - 1) / kCodeBlock) + start / kCodeBlock;
}

}  // namespace

float* StoredState::converted(int plane, int64_t line, int64_t start, int64_t n, int64_t columns,
                              float* buffer) const {
    const int64_t first = line * columns + start;
    char* data = data_[plane];
    if (format_ == kBFloat16) {
        kernels().from_bfloat16(reinterpret_cast<const uint16_t*>(data) + first, n, buffer);
    } else {
        const float* scales = scales_[plane] + block_at(line, start, columns);
        kernels().decode_codes(reinterpret_cast<const int8_t*>(data) + first, scales, plane < planes_ - 1, n, buffer);
    }
    return buffer;
}

void StoredState::write(float* const* values, int64_t line, int64_t start, int64_t n, int64_t columns,
                        const RandomPlace& place) const {
    if (in_place()) return;
    RowData row;
    locate(row, line, start, columns, place);
    if (format_ == kBFloat16) {
        uint16_t* out[] = {static_cast<uint16_t*>(row.stored[0]), static_cast<uint16_t*>(row.stored[1])};
        kernels().round_bfloat16(values, 2, n, row.random, 0, out);
        return;
    }
    int8_t* codes[] = {static_cast<int8_t*>(row.stored[0]), static_cast<int8_t*>(row.stored[1])};
    kernels().encode_codes(values, n, row.random, codes, row.scales);
}

void StoredState::locate(RowData& row, int64_t line, int64_t start, int64_t columns, const RandomPlace& place) const {
    const int64_t first = line * columns + start, size = format_ == kBFloat16 ? 2 : 1;
    for (int a = 0; a < planes_; a++) {
        row.stored[a] = data_[a] + first * size;
        row.scales[a] = format_ == kCodes ? scales_[a] + block_at(line, start, columns) : nullptr;
    }
    if (place.there()) row.random = place.row(line, start);
}

void align(Shape& shape, const StoredState* state, const RandomPlace& place) {
    if (state && state->format() == kCodes) shape.unit = kCodeBlock;
    const int64_t length = place.row_length();
    if (shape.factored || !place.there() || length == 0 || shape.columns == length) return;
    STD_TORCH_CHECK(shape.columns % length == 0, "the fused kernels round whole rows at random: a slice of ",
                    shape.columns, " elements has no rows of ", length);
    shape.k = shape.columns / length;
    shape.lines = shape.pre * shape.k;
    shape.columns = length;
}

}  // namespace hf_lopt
