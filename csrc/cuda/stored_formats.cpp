#include "stored_formats.h"

#include <algorithm>

namespace hf_lopt {

namespace {

int32_t type_of_state(const Tensor& x) {
    const ScalarType type = x.scalar_type();
    return type == ScalarType::Float ? kFloat32 : type == ScalarType::BFloat16 ? kBFloat16 : kCodes;
}

// The axes before the rows; neighbours are one axis where the second is not cut.
void set_axes(FormatEntry& f, const TensorPlace& place) {
    struct Axis {
        int64_t size, start, whole;
    };
    std::vector<Axis> axes;  // the last one first
    for (size_t i = place.sizes.size(); i-- > 0;) {
        const Axis outer = {place.sizes[i], place.starts[i], place.whole[i]};
        if (!axes.empty() && axes.back().start == 0 && axes.back().size == axes.back().whole) {
            const int64_t inner = axes.back().size;
            axes.back() = {outer.size * inner, outer.start * inner, outer.whole * inner};
        } else {
            axes.push_back(outer);
        }
    }
    if (axes.empty()) axes.push_back({1, 0, 1});
    STD_TORCH_CHECK(axes.size() <= FormatEntry::kAxes, "the fused kernels round tensors at random that are cut along ",
                    FormatEntry::kAxes - 1, " axes before their rows, got more");
    f.axes = (int32_t)axes.size();
    int64_t stride = 1;
    for (int i = f.axes - 1, j = 0; i >= 0; i--, j++) {
        f.size[i] = axes[j].size;
        f.start[i] = axes[j].start;
        f.stride[i] = (uint32_t)stride;
        stride *= axes[j].whole;
    }
}

}  // namespace

StoredFormats::StoredFormats(const Tensors& params, const Tensors& momenta, const Tensors& second_moments,
                             const Tensors& momentum_scales, const Tensors& second_scales, const Rounding* rounding,
                             ContiguousCopies& copies) {
    const bool rounds = rounding && rounding->step;
    for (const Tensor& x : momenta) needed_ = needed_ || x.scalar_type() != ScalarType::Float;
    for (const Tensor& x : second_moments) needed_ = needed_ || x.scalar_type() != ScalarType::Float;
    STD_TORCH_CHECK(!needed_ || !rounding || rounds,
                    "accumulators in fewer bits are rounded at random, got no number of a step");
    if (rounds) {
        step_ = static_cast<const int64_t*>(rounding->step->data_ptr());
        round_params_ = rounding->params;
    }
    needed_ = needed_ || round_params_;
    const std::vector<TensorPlace> places = rounds ? check_places(params, *rounding) : std::vector<TensorPlace>();
    if (!needed_) return;
    for (size_t t = 0; t < params.size(); t++) {
        const int64_t numel = params[t].numel();
        FormatEntry f{};
        f.row = std::max<int64_t>(numel, 1);
        set_axes(f, {});
        if (rounds) {
            f.key = places[t].key;
            f.first_column = places[t].first_column;
            f.row = std::max<int64_t>(places[t].row_length, 1);
            set_axes(f, places[t]);
        }
        if (!momenta.empty()) {
            f.type = type_of_state(momenta[t]);
            STD_TORCH_CHECK(type_of_state(second_moments[t]) == f.type, "momenta and second moments of parameter ", t,
                            " are in different formats");
        }
        if (f.type == kCodes) {
            const Tensor* scales[] = {&momentum_scales[t], &second_scales[t]};
            // Their axes are those of the parameter before its rows, the decays in front and the blocks at the end.
            const int64_t axis = scales[0]->dim() - 2;
            int64_t row = 1;
            for (int64_t i = axis; i < params[t].dim(); i++) row *= params[t].size(i);
            STD_TORCH_CHECK(scales[1]->dim() == axis + 2 && (!rounds || row == f.row || numel == 0),
                            "the scales of parameter ", t, " are for rows of ", row, " numbers, wanted ", f.row);
            f.row = std::max<int64_t>(row, 1);
            f.blocks = (f.row + kCodeBlock - 1) / kCodeBlock;
            f.scale_decay = numel / f.row * f.blocks;
            for (int i = 0; i < 2; i++) {
                const Tensor& x = rounding ? copies.writable(*scales[i]) : copies.readable(*scales[i]);
                (i ? second_scales_ : momentum_scales_).push_back(x);
                float* data = float_data(x);
                if (!data) continue;
                if (!bases_[i]) bases_[i] = data;
                f.scales[i] = data - bases_[i];
                f.other_scales[i] = kept_size_;
                kept_size_ += x.numel();
            }
            any_codes_ = true;
        }
        entries_.push_back(f);
    }
}

void StoredFormats::set(TensorTableBuilder& builder) const {
    for (size_t t = 0; t < entries_.size(); t++) {
        FormatEntry f = entries_[t];
        if (formed_) std::swap(f.scales, f.other_scales);
        builder.set_formats(t, f);
    }
}

FormatTable StoredFormats::table(const TensorTableBuilder& builder) const {
    FormatTable table{};
    table.entries = builder.formats();
    for (int i = 0; i < 2; i++) {
        table.scales[i] = formed_ ? kept_data_ : bases_[i];
        table.other_scales[i] = formed_ ? bases_[i] : kept_data_;
    }
    table.step = step_;
    table.round_params = round_params_;
    return table;
}

void StoredFormats::form_scales(const Tensors& params, const Tensors& grads, const Tensors& momenta,
                                const Tensors& second_moments, ScalesArgs args, const Device& device,
                                ContiguousCopies& copies) {
    if (!any_codes_) return;
    kept_ = floats(params[0], {std::max<int64_t>(kept_size_, 1)});
    kept_data_ = float_data(kept_);
    TensorTableBuilder builder;
    for (size_t t = 0, i = 0; t < params.size(); t++) {
        if (!has_codes(t)) continue;
        builder.add_rows(params[t], row_length(t));
        builder.set_any(sG, i, copies.readable(grads[t]));
        builder.set_state(sM, i, copies.readable(momenta[t]));
        builder.set_state(sV, i, copies.readable(second_moments[t]));
        builder.set_formats(i, entries_[t]);
        i++;
    }
    Stored<ScalesArgs> stored{args, {}};
    stored.table = builder.build(params[0], device.stream(), false);
    stored.formats = table(builder);
    if (builder.tiles() > 0) launch_scales(stored, builder.tiles(), device.stream());
    formed_ = true;
}

}  // namespace hf_lopt
