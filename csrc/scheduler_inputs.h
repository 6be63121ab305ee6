// Numbers of a run and of each tensor that VeLO's scheduler sees; see hf_lopt/features.py.
#pragma once

#include "features.h"

namespace hf_lopt {

constexpr float kLossMinStart = 999999999999.0f;  // of a loss buffer that is still empty
constexpr int kTimes = 9, kLossFeatures = 9, kSteps = 11, kShared = kTimes + kLossFeatures, kLossDecays = 10;
constexpr int kRunFeatures = kShared + kSteps, kRanks = 5, kTensorInputs = 1 + kRanks + 2 * kMomenta;

}  // namespace hf_lopt
