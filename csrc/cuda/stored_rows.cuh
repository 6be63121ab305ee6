// Accumulators in any format, where a thread's four numbers are neighbours in one row that formats are cut along:
// nothing is found out for a number alone, and what is read needs no call, so that several reads are under way at
// once.
#pragma once

#include "stored.cuh"

namespace hf_lopt {

class InWholeRows : public InAnyFormat {
  public:
    template <class Args>
    HF_LOPT_MEMBER InWholeRows(const Stored<Args>& a, const Place& at)
        : InAnyFormat(a, at),
          type_(entry().type),
          turn_(turn_of_step(table())),
          first_(entry().first),
          blocks_(entry().blocks),
          scale_decay_(entry().scale_decay) {
#pragma unroll
        for (int of_v = 0; of_v < 2; of_v++) {
            scales_[of_v] = table().scales[of_v] + entry().scales[of_v];
            other_scales_[of_v] = table().other_scales[of_v] + entry().other_scales[of_v];
        }
    }

    // Whether the rows of the tile are such rows.
    HF_LOPT_MEMBER bool has(const Place& at) const { return at.entry->wide && entry().lines_are_rows; }

    template <bool strided>
    HF_LOPT_MEMBER Lane load(const TensorTable& tensors, const Place& at, const RowPlace& row, Slot slot,
                             int k) const {
        const char* data = plane(tensors, at, slot, k);
        if (type_ != kCodes) return hf_lopt::load(data, type_ == kFloat32 ? kFloat32 : kBFloat16, at, row);
        Lane y = splat(0.0f);
        if (!at.live(row, 0)) return y;
        const float scale = scales_[slot == sV][place_of_scale(at, row, k)];
        const uint32_t codes = *reinterpret_cast<const uint32_t*>(data + row.offset + at.first_column);
        HF_LOPT_EACH(e) {
            const uint8_t code = (uint8_t)(codes >> 8 * e);
            y.x[e] = slot == sV ? decode_number<false>(code, scale) : decode_number<true>(code, scale);
        }
        return y;
    }

    template <bool strided>
    HF_LOPT_MEMBER Draws draws(const Place& at, const RowPlace& row) const {
        Draws d;
        d.turn = turn_;
        const uint32_t start = random_start(entry(), first_ + row.line) + (uint32_t)at.start();
        HF_LOPT_EACH(e) d.first[e] = hash_of_column(start + (uint32_t)at.column(e));
        return d;
    }

    template <bool strided>
    HF_LOPT_MEMBER void store(const TensorTable& tensors, const Place& at, const RowPlace& row, Slot slot, int k,
                              const Draws& draws, int random_slot, Lane& y) const {
        char* data = plane(tensors, at, slot, k);
        if (type_ == kFloat32) {
            hf_lopt::store(data, kFloat32, at, row, y);
        } else if (type_ == kBFloat16) {
            round_at_random(y, draws, random_slot);
            hf_lopt::store(data, kBFloat16, at, row, y);
        } else if (at.live(row, 0)) {
            const float scale = other_scales_[slot == sV][place_of_scale(at, row, k)], inverse = inverse_of(scale);
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
        if (rounds(t.p_type)) round_at_random(y, draws<strided>(at, row), kParameterSlot);
        hf_lopt::store(pointer<void>(tensors, t, sP), t.p_type, at, row, y);
    }

    // Of the block of codes that the strip is in, of decay `k`: number from the beginning of the scales.
    HF_LOPT_MEMBER int64_t place_of_scale(const Place& at, const RowPlace& row, int k) const {
        return (first_ + row.line) * blocks_ + at.start() / kCodeBlock + k * scale_decay_;
    }

  private:
    // In registers: what is stored in between could have changed the entry, for all that the compiler knows.
    int32_t type_;
    uint32_t turn_;
    int64_t first_, blocks_, scale_decay_;
    float *scales_[2], *other_scales_[2];
};

}  // namespace hf_lopt
