// The statistics of accumulators in any format: for the first step of a run, and after a resume. The sums over the
// gradient are those of sums.cu.
#include "moments.cuh"
#include "stored.cuh"

namespace hf_lopt {
namespace {

HF_LOPT_KERNEL(kThreads, 2) moments_stored_kernel(HF_LOPT_ARGUMENT Stored<SumsArgs> a) {
    const Place at = place(a.table);
    const TensorEntry& t = *at.entry;
    double* stats = a.partial + (int64_t)block() * a.width;
    if (t.factored) {
        moments<float>(a, stats);
    } else {
        moments<double>(a, stats);
    }
    if (!last_to_arrive(a.table.tickets + t.first_ticket, t.tiles())) return;
    const double* first = a.partial + (int64_t)a.table.first_tile[at.tensor] * a.width + kGradientStats;
    double* out = a.stats + (int64_t)at.tensor * a.width + kGradientStats;
    total_of_tiles(first, t.tiles(), a.width - kGradientStats, a.width, [&](int j, double total) { out[j] = total; });
}

}  // namespace

void launch_moments_stored(const Stored<SumsArgs>& args, int tiles, void* stream) {
    HF_LOPT_LAUNCH(moments_stored_kernel, tiles, kThreads, stream, args);
}

}  // namespace hf_lopt
