// What the code of each instruction set offers: functions over one row of a tensor.
//
// A row is a range of neighbouring elements along which one of the two factored accumulators is a number and the other
// one a vector. The operators divide tensors into rows, the functions here do the arithmetic.
#pragma once

#include <stdint.h>

#include "../network.h"
#include "../random_rounding.h"
#include "../statistics.h"

namespace hf_lopt {

// How momenta and second moments are stored.
enum Format { kFloat32, kBFloat16, kCodes, kFormats };
constexpr int kPlanes = kMomenta + 1;  // momenta, then the second moment

// Tensors of one row; float32, `n` elements. Of accumulators in another format `m` and `v` are buffers for codes.
struct RowData {
    int64_t n;
    const float* g;
    const float* p;
    float* m[kMomenta];
    float* v;
    float* d[kFactored];             // diagonal accumulators, rank < 2 only
    const float* factor[kFactored];  // the factors that vary along the row
    float rho[kFactored];            // the factors that are constant along it
    const float* bias;               // (units, bias_stride): what the vector features add to the first layer
    int64_t bias_stride;
    const float* row_bias;  // (units,): the same for the features that are constant along the row
    float* p_out;
    float* step_out;         // null: update the parameter
    void* stored[kPlanes];   // accumulators in another format
    float* scales[kPlanes];  // of codes
    RandomRow random;
};

// p <- p - decay p - step,  step = step_scale m / (sqrt(second_scale v + inner_eps) + outer_eps).
struct AdamConstants {
    float keep_m, add_m, keep_v, add_v, clip;
    float step_scale, second_scale, inner_eps, outer_eps, decay;
};

struct GradientSums {
    double squares;          // of the unclipped gradient
    double clipped_squares;  // of the clipped one
    int64_t nonfinite;
};

// Matrices that are worked on together have rows of a multiple of this many numbers.
constexpr int64_t kMatrixPad = 16;

// y <- y (c0 + c1 y'y + c2 (y'y)²), after a division by |y| + eps; at the end a mean square of 1, if norm_eps >= 0.
struct NewtonSchulz {
    float c0, c1, c2;
    int steps;
    double eps, norm_eps;
};

struct Kernels {
    const char* name;
    // Conversions of 16-bit numbers, to nearest even.
    void (*from_half)(const uint16_t* x, int64_t n, float* out);
    void (*to_half)(const float* x, int64_t n, uint16_t* out);
    void (*from_bfloat16)(const uint16_t* x, int64_t n, float* out);
    void (*to_bfloat16)(const float* x, int64_t n, uint16_t* out);
    // Rounds one or two rows at random, in place too; `slot` is the place of the first one's random numbers.
    void (*round_bfloat16)(float* const* x, int count, int64_t n, const RandomRow& row, int slot,
                           uint16_t* const* out);
    // Stores the buffers of rows as codes, and adds what is stored to stats[kUpdateStats].
    void (*store_codes)(const RowData* rows, int count, double* stats);
    // Stores a momentum and a second moment as codes. A row begins with a block.
    void (*encode_codes)(float* const* x, int64_t n, const RandomRow& row, int8_t* const* codes, float* const* scales);
    void (*decode_codes)(const int8_t* codes, const float* scales, bool is_signed, int64_t n, float* out);
    // Adds Σx and Σx² of several rows, as the update does: bit by bit what it would have left.
    void (*moments)(const float* const* rows, int count, int64_t n, double* sum, double* squares);
    void (*moments_diagonal)(const float* const* rows, int count, int64_t n, double* sum, double* squares);
    // Adds the squares of the clipped gradient to `columns`, and returns the sums over the row.
    GradientSums (*gradient_sums)(const float* g, int64_t n, float clip, float* columns);
    // Add to sums[kInputs]; rows of one length.
    void (*feature_sums[kFormats])(const RowData* rows, int count, const FeatureConstants& c, double* sums);
    void (*feature_sums_diagonal)(const RowData* rows, int count, const FeatureConstants& c, double* sums);
    // bias[j][i] = Σ_k w[k][j] x_k[i] + u[k][j] / sqrt(x_k[i] + eps), for the vector features of a row.
    void (*vector_bias)(const float* const* x, const float* w, const float* u, int units, int64_t n, float* bias,
                        int64_t bias_stride);
    // Evaluate the network, update the accumulators and write the result; add to stats[kUpdateStats].
    // With codes the new accumulators are in the buffers then, and not among the statistics.
    void (*apply_4[kFormats])(const RowData*, int, const FeatureConstants&, const Network<4>&, double* stats);
    void (*apply_8[kFormats])(const RowData*, int, const FeatureConstants&, const Network<8>&, double* stats);
    void (*apply_32[kFormats])(const RowData*, int, const FeatureConstants&, const Network<32>&, double* stats);
    void (*apply_diagonal_4)(const RowData*, int, const FeatureConstants&, const Network<4>&, double* stats);
    void (*apply_diagonal_8)(const RowData*, int, const FeatureConstants&, const Network<8>&, double* stats);
    void (*apply_diagonal_32)(const RowData*, int, const FeatureConstants&, const Network<32>&, double* stats);
    // Update of p_out, m[0] and v; returns Σ step².
    double (*adam)(const RowData&, const AdamConstants&);
    // p <- p - decay p - scale step.
    void (*descend)(float* p, const float* step, int64_t n, float scale, float decay);
    // out = keep old + add (sums / size + eps), a factored accumulator; returns Σ out.
    double (*ema_of_means)(const float* old, const float* sums, int64_t n, float size, float keep, float add,
                           float* out);
    // out = 1 / sqrt(max(x / divisor, 1e-9)).
    void (*factors)(const float* x, int64_t n, float divisor, float* out);
    // In place or in `work`, (rows + 2 columns) * stride numbers; returns where. rows >= columns.
    // The mean square is the one before the last division.
    float* (*newton_schulz)(float* y, float* work, int64_t rows, int64_t columns, int64_t stride,
                            const NewtonSchulz& constants, float* mean_square);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__) && !defined(HF_LOPT_PORTABLE_ONLY)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

}  // namespace hf_lopt
