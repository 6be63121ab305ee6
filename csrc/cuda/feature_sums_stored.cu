// Pass 1 over accumulators in any format.
#include "feature_sums.cuh"
#include "stored.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 2) feature_sums_stored_kernel(HF_LOPT_ARGUMENT Stored<FeatureSumsArgs> a) {
    HF_LOPT_LARGE_SHARED(ForFullTiles<InAnyFormat>, shared);
    feature_sums_of_tile(a, shared);
}

}  // namespace

void launch_feature_sums_stored(const Stored<FeatureSumsArgs>& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH_LARGE(feature_sums_stored_kernel, tiles, kThreads, sizeof(ForFullTiles<InAnyFormat>), stream, args);
}

}  // namespace hf_lopt
