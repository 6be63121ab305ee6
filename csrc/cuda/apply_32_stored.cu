// Pass 2 for networks of 32 hidden units, over accumulators in any format; with products in TF32, too: the loops for
// other tiles than those of the matrix units, which are the larger part of a kernel, are then there once.
#include "stored.cuh"
#include "tensor_core.cuh"

namespace hf_lopt {
namespace {

struct TensorCoreArgs : ApplyArgs {
    bool tf32;
};

union EitherFragments {
    Fragments<kSplitBFloat16> split;
    Fragments<kTf32> tf32;
};

static_assert(sizeof(ForFullTiles<InAnyFormat>) + sizeof(Shared<kUnits>) + sizeof(EitherFragments) < 96 * 1024,
              "a block has 99 KiB of shared memory on compute capability 8.6, some of which sums take");

template <Precision precision>
HF_LOPT_DEVICE void apply_wide_tile(const Stored<TensorCoreArgs>& a, const Place& at, Shared<kUnits>& s,
                                    Fragments<precision>& f, ForFullTiles<InAnyFormat>& shared, double* partial) {
    load_fragments(s, f);
    if (a.into_out || !with_types_of_full_tile(is_full(at), InAnyFormat(a, at), at, [&](auto p, auto g) {
            apply_full_on_tensor_cores<precision, decltype(p), decltype(g)>(a, at, s, f, shared, partial);
        })) {
        apply_other_on_tensor_cores(a, s, f, partial);
    }
}

HF_LOPT_KERNEL(kThreads, 2) apply_32_stored_kernel(HF_LOPT_ARGUMENT Stored<TensorCoreArgs> a) {
    HF_LOPT_SHARED Shared<kUnits> shared;
    HF_LOPT_SHARED EitherFragments fragments;
    HF_LOPT_LARGE_SHARED(ForFullTiles<InAnyFormat>, of_full);
    apply_tile<kUnits>(a, shared, [&](const Place& at, double* partial) {
        if (at.entry->inner > 1 || at.entry->lanes < kWarpSize) {
            apply_elements<kUnits, kInner>(a, shared, partial);
        } else if (a.tf32) {
            apply_wide_tile(a, at, shared, fragments.tf32, of_full, partial);
        } else {
            apply_wide_tile(a, at, shared, fragments.split, of_full, partial);
        }
    });
}

void launch(const Stored<ApplyArgs>& args, bool tf32, int tiles, void* stream) {
    const Stored<TensorCoreArgs> both{{args, tf32}, args.formats};
    HF_LOPT_LAUNCH_LARGE(apply_32_stored_kernel, tiles, kThreads, sizeof(ForFullTiles<InAnyFormat>), stream, both);
}

}  // namespace

void launch_apply_32_stored(const Stored<ApplyArgs>& args, int tiles, void* stream) {
    launch(args, false, tiles, stream);
}
void launch_apply_32_tf32_stored(const Stored<ApplyArgs>& args, int tiles, void* stream) {
    launch(args, true, tiles, stream);
}

}  // namespace hf_lopt
