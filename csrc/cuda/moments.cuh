// The statistics of parameters and accumulators that pass 0 may be asked for. `Args`: SumsArgs, or with formats.
#pragma once

#include "updated.cuh"

namespace hf_lopt {

template <class T, class Args>
HF_LOPT_OUT_OF_LINE void moments(const Args& a, double* stats) {
    const Place at = same_place();
    const TensorEntry& t = *at.entry;
    MomentSums<T> p, others[1 + kMomenta];
    const typename FormatsOf<Args>::Reader reader(a, at);
    for (int turn = 0; turn < at.turns(); turn++) {
        const RowPlace row = at.row(turn);
        bool live[kLane];
        HF_LOPT_EACH(e) live[e] = at.live(row, e);
        p.add(load(pointer<void>(a.table, t, sP), t.p_type, at, row), live);
#pragma unroll
        for (int j = 0; j < 1 + kMomenta; j++) {
            if (j >= a.second_moments + a.momenta) continue;
            others[j].add(reader.load(at, row, j, a.second_moments), live);
        }
    }
    double sums[kMomentStats] = {p.squares};
#pragma unroll
    for (int j = 0; j < 1 + kMomenta; j++) {
        sums[1 + 2 * j] = others[j].sum;
        sums[2 + 2 * j] = others[j].squares;
    }
    block_sums(sums, a.width - kGradientStats, stats + kGradientStats);
}

}  // namespace hf_lopt
