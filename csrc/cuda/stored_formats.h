// How the accumulators of a list of tensors are stored, and where the tensors are for what is rounded at random: what
// goes into the tables of the kernels with `Stored` arguments.
#pragma once

#include <vector>

#include "table_builder.h"

namespace hf_lopt {

class StoredFormats {
  public:
    // Arguments that have passed the checks; momenta may be none. `rounding`: null for what only reads.
    StoredFormats(const Tensors& params, const Tensors& momenta, const Tensors& second_moments,
                  const Tensors& momentum_scales, const Tensors& second_scales, const Rounding* rounding,
                  ContiguousCopies& copies);

    // Whether there is anything but float32 among accumulators, or a parameter to be rounded at random: otherwise
    // kernels without formats do.
    bool needed() const { return needed_; }
    bool any_codes() const { return any_codes_; }
    bool has_codes(size_t t) const { return entries_[t].type == kCodes; }
    // Numbers of a row of a tensor, 0 where no rows are needed.
    int64_t row_length(size_t t) const { return needed_ ? entries_[t].row : 0; }
    const Tensors& scales(bool second) const { return second ? second_scales_ : momentum_scales_; }

    // Sets the entries of all tensors of a builder.
    void set(TensorTableBuilder& builder) const;
    // After `build`. The codes' scales are read from the tensors.
    FormatTable table(const TensorTableBuilder& builder) const;
    // The scales in the tensors become those that `args` says, and `table` then reads the old ones from elsewhere:
    // before what writes codes.
    void form_scales(const Tensors& params, const Tensors& grads, const Tensors& momenta,
                     const Tensors& second_moments, ScalesArgs args, const Device& device, ContiguousCopies& copies);

  private:
    std::vector<FormatEntry> entries_;  // one for each tensor
    Tensors momentum_scales_, second_scales_;
    Tensor kept_;  // old scales
    float *bases_[2] = {}, *kept_data_ = nullptr;
    const int64_t* step_ = nullptr;
    int64_t kept_size_ = 0;
    bool needed_ = false, any_codes_ = false, formed_ = false, round_params_ = false;
};

}  // namespace hf_lopt
