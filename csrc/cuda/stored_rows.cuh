// Accumulators in any format, where a thread's four numbers are neighbours in one row that formats are cut along:
// nothing is found out for a number alone, and what is read needs no call, so that several reads are under way at
// once.
#pragma once

#include "stored.cuh"

namespace hf_lopt {

class InWholeRows : public InAnyFormat {
  public:
    template <class Args>
    HF_LOPT_MEMBER InWholeRows(const Stored<Args>& a, const Place& at) : InAnyFormat(a, at) {}

    // Whether the rows of the tile are such rows.
    HF_LOPT_MEMBER bool has(const Place& at) const { return at.entry->wide && entry().lines_are_rows; }

    template <bool strided>
    HF_LOPT_MEMBER Lane load(const TensorTable& tensors, const Place& at, const RowPlace& row, Slot slot,
                             int k) const {
        const char* data = plane(tensors, at, slot, k);
        if (entry().type != kCodes) {
            return hf_lopt::load(data, entry().type == kFloat32 ? kFloat32 : kBFloat16, at, row);
        }
        Lane y = splat(0.0f);
        if (!at.live(row, 0)) return y;
        const float scale = table().scales[slot == sV][entry().scales[slot == sV] + place_of_scale(at, row, k)];
        const uint32_t codes = *reinterpret_cast<const uint32_t*>(data + row.offset + at.first_column);
        HF_LOPT_EACH(e) {
            const uint8_t code = (uint8_t)(codes >> 8 * e);
            y.x[e] = slot == sV ? decode_number<false>(code, scale) : decode_number<true>(code, scale);
        }
        return y;
    }

    template <bool strided>
    HF_LOPT_MEMBER Draws draws(const Place& at, const RowPlace& row) const {
        Draws d = {};
        if (entry().type == kFloat32 && !rounds(at.entry->p_type)) return d;
        return draws_of_line(at, row);
    }

    template <bool strided>
    HF_LOPT_MEMBER void store(const TensorTable& tensors, const Place& at, const RowPlace& row, Slot slot, int k,
                              const Draws& draws, int random_slot, Lane& y) const {
        char* data = plane(tensors, at, slot, k);
        if (entry().type == kFloat32) {
            hf_lopt::store(data, kFloat32, at, row, y);
        } else if (entry().type == kBFloat16) {
            round_at_random(y, draws, random_slot);
            hf_lopt::store(data, kBFloat16, at, row, y);
        } else if (at.live(row, 0)) {
            const int64_t place = entry().other_scales[slot == sV] + place_of_scale(at, row, k);
            const float scale = table().other_scales[slot == sV][place], inverse = inverse_of(scale);
            uint32_t codes = 0;
            HF_LOPT_EACH(e) {
                const uint32_t random = draws(e, random_slot);
                const uint32_t code = slot == sV ? encode_number<false>(y.x[e], scale, inverse, random)
                                                 : encode_number<true>(y.x[e], scale, inverse, random);
                codes |= code << 8 * e;
            }
            *reinterpret_cast<uint32_t*>(data + row.offset + at.first_column) = codes;
        }
    }

    template <bool strided>
    HF_LOPT_MEMBER void store_parameter(const TensorTable& tensors, const Place& at, const RowPlace& row,
                                        Lane& y) const {
        const TensorEntry& t = *at.entry;
        if (rounds(t.p_type)) round_at_random(y, draws_of_line(at, row), kParameterSlot);
        hf_lopt::store(pointer<void>(tensors, t, sP), t.p_type, at, row, y);
    }

  private:
    HF_LOPT_MEMBER int64_t place_of_scale(const Place& at, const RowPlace& row, int k) const {
        return (entry().first + row.line) * entry().blocks + at.start() / kCodeBlock + k * entry().scale_decay;
    }
};

}  // namespace hf_lopt
