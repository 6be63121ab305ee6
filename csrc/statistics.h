// The statistics of a tensor, as pass 0 and the update leave them.
#pragma once

#include "features.h"

namespace hf_lopt {

// Of the gradient: the number of entries that are not finite, and Σg². With moments Σp² follows, and (Σx, Σx²) for
// each second moment and each momentum.
constexpr int kGradientStats = 2, kMomentStats = 1 + 2 * (kSecondMoments + kMomenta);
constexpr int statistics_width(int64_t second_moments, int64_t momenta) {
    return kGradientStats + 1 + 2 * (int)(second_moments + momenta);
}

// What an update forms: Σ step², then the statistics of the moments.
constexpr int kUpdateStats = 1 + kMomentStats;

}  // namespace hf_lopt
