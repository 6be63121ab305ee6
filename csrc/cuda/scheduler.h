// The small operators between the passes: their arguments on the device, and the operators themselves. See
// hf_lopt/kernels/reference for what they compute.
#pragma once

#include "../scheduler_inputs.h"
#include "tensor_table.h"

namespace hf_lopt {

constexpr int kManyThreads = 1024;
constexpr int kMaxLists = 8, kMaxFactors = 4;
constexpr int kMaxHidden = 2048, kMaxHeads = 1024;

struct AdvanceArgs {
    const double *stats[kMaxLists], *sums[kMaxLists];
    int64_t stat_rows[kMaxLists], sum_count[kMaxLists];
    int32_t stat_width[kMaxLists], stat_lists, sum_lists;
    const bool* bad;
    const float* loss;
    int64_t* counters;
    float *loss_means, *loss_min;  // null without a loss buffer
    double loss_decay[kLossDecays];
    double corrected[kMaxLists];
    int32_t corrections;
    float horizon;
    // VeLO's features of each tensor; null without.
    const double *moments, *totals, *numel;
    const float* ranks;
    int32_t moments_width, totals_width, p_column;
    int32_t rows;
    bool* skip;
    float *features, *inputs;
};

// The scheduler's state of a tensor, as bytes from a base.
struct StateEntry {
    int64_t hidden, cell;
};

struct PoolArgs {
    const StateEntry* entries;
    const char* base;
    const float* mixed;
    float* out;
    int32_t rows, units;
};
constexpr int kPoolColumns = 32;

struct LstmArgs {
    const StateEntry* entries;
    char *hidden_base, *cell_base;
    const float *gates, *heads, *heads_bias, *bank;
    const bool* skip;
    float *controls, *lr_mult, *networks;
    int32_t units, controls_count, weights;
    bool celo;
};

struct SpecializeArgs {
    const float* networks;
    int64_t row;  // numbers from one network to the next, 0 for one for all
    int32_t sizes[4], outputs, layers;
    const float* constants;
    int64_t constants_row;
    int32_t constants_count;
    const double *sums, *numel;
    int32_t sums_width, p_column;
    double norm_eps;
    StridedView<float> lr, weight_decay, factors[kMaxFactors], floor;
    int32_t factors_count;
    bool has_floor;
    float step_mult;
    float *out, *scale, *decay;
    int64_t out_row;
};

void launch_advance(const AdvanceArgs& args, void* stream);
void launch_pool(const PoolArgs& args, void* stream);
void launch_lstm(const LstmArgs& args, int rows, void* stream);
void launch_specialize(const SpecializeArgs& args, int rows, void* stream);

}  // namespace hf_lopt
