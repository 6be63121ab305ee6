// Pass 1 over accumulators in float32.
#include "feature_sums.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 2) feature_sums_kernel(HF_LOPT_ARGUMENT FeatureSumsArgs a) {
    HF_LOPT_LARGE_SHARED(ForFullTiles<InFloat32>, shared);
    feature_sums_of_tile(a, shared);
}

}  // namespace

void launch_feature_sums(const FeatureSumsArgs& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH_LARGE(feature_sums_kernel, tiles, kThreads, sizeof(ForFullTiles<InFloat32>), stream, args);
}

}  // namespace hf_lopt
