// How the kernels see lists of tensors: a table on the device with an entry for each, and bases.
//
// An entry holds distances from a base rather than addresses. There is a base for each list, the first of its tensors:
// what is allocated anew in one piece every step moves as a whole, and the table stays valid.
//
// A parameter of rank >= 2 is read as [pre, rows, mid, columns], where `rows` is the first of its two factored axes in
// memory order and a row of `columns` numbers begins with the second one and has `inner` numbers for each place on it.
// A line is one row of it. The factored accumulator without the second axis has `inner` numbers per line, the one
// without the first axis is a vector along the line, one for each of the pre * mid groups of lines. Everything else is
// flat: lines of some strips of kStrip numbers, the last of which may be shorter.
//
// A tensor may be a stack of slices, each with its own network and results: then every slice has an entry. Slices
// over the last axes are matrices or vectors like others. Those over other axes, of a convolution for example, have
// distances from row to row and from column to column.
#pragma once

#include <stdint.h>

#include "../network.h"
#include "../statistics.h"
#include "../strided_view.h"

namespace hf_lopt {

constexpr int kThreads = 256, kWarpSize = 32, kWarps = kThreads / kWarpSize;
constexpr int kLane = 4;                   // neighbouring columns of a thread
constexpr int kStrip = kWarpSize * kLane;  // columns of a tile
constexpr int kTurns = 32;                 // rows of a tile that a thread works on: iterations of its loop, or turns
constexpr int kTileElements = kThreads * kLane * kTurns;

enum Slot { sP, sG, sM, sV, sD, sLine, sVector, sLineFactor, sVectorFactor, sOut, kSlots };
enum Type : int32_t { kFloat32, kBFloat16, kFloat16, kCodes };

struct TensorEntry {
    int64_t at[kSlots];  // bytes from the base of the slot
    int64_t numel, rows, mid, groups, columns, inner;
    int64_t decay, line_decay, vector_decay;  // numbers from one decay to the next: of elements, of lines, of vectors
    // Of a strided slice: numbers from row to row and from column to column, of the tensor and of its row and column
    // accumulators, which are in the places of line and vector.
    int64_t step[2], line_step[2], vector_step[2];
    int64_t line_part, vector_part;  // where partial sums of the lines and of the vectors begin
    int32_t strips, row_tiles, lanes;
    int32_t first_ticket;  // of the tensor, of its (group, strip)s, of its (group, row tile)s
    int32_t p_type, g_type;
    int32_t tensor;  // of the list that it is a slice of
    bool strided;
    bool factored, row_is_line;  // whether the row accumulator is the one with a number per line
    bool wide;                   // rows begin at multiples of kLane numbers and everything is aligned for them

    HF_LOPT_HOST_DEVICE int64_t line_length() const { return groups * rows * inner; }
    HF_LOPT_HOST_DEVICE int64_t vector_length() const { return groups * columns; }
    HF_LOPT_HOST_DEVICE int32_t tiles() const { return (int32_t)(groups * row_tiles * strips); }
};

struct TensorTable {
    const TensorEntry* entries;
    const int32_t* first_tile;  // (count + 1,)
    int32_t count;
    uint32_t* tickets;  // zero between launches
    char* base[kSlots];
};

// Beside an entry: how its accumulators are stored, and where its elements are among the random numbers and the blocks
// of codes, which lie along the rows of hf_lopt/kernels/reference/formats.py.
struct FormatEntry {
    static constexpr int kAxes = 4;

    int32_t type;         // of momenta and second moments
    bool lines_are_rows;  // of the entry's tensor; otherwise an element's place in the tensor tells its row
    int64_t first;        // row of the entry's first line; otherwise place of the entry's first element
    int64_t row, blocks;  // numbers and blocks of a row
    int64_t scale_decay;  // scales from one decay to the next
    int64_t scales[2], other_scales[2];  // numbers from the bases: of momenta, of second moments
    // Of the random numbers: a hash for the tensor, the first column, and the axes before the rows, the first of which
    // need not be the whole tensor's first one. The index of a row in the whole tensor is sum (index + start) stride.
    uint32_t key, first_column;
    int32_t axes;
    int64_t size[kAxes], start[kAxes];
    uint32_t stride[kAxes];
};

struct FormatTable {
    const FormatEntry* entries;
    // Of codes as they are read; and those with which they are written, or, where these are formed, a place for those
    // that were there. Blocks have parts in several tiles: what is read must not change while tiles are written.
    float *scales[2], *other_scales[2];
    const int64_t* step;  // the number of the step; null where nothing is rounded at random
    bool round_params;
};

// The arguments of a kernel that takes any format, and rounds at random.
template <class Args>
struct Stored : Args {
    FormatTable formats;
};

struct SumsArgs {
    TensorTable table;
    float* parts;
    double* partial;  // (tiles, width)
    double* stats;    // (count, width)
    float clip;
    int32_t moments, second_moments, momenta;  // whether, and how many
    int32_t width;
};

struct FeatureSumsArgs {
    TensorTable table;
    FeatureConstants constants;
    FeatureColumns columns;
    double* partial;  // (tiles, kSums)
    double* sums;     // (count, columns.count)
};

struct ApplyArgs {
    TensorTable table;
    FeatureConstants constants;
    FeatureColumns columns;
    StridedView<float> weights[3], biases[3], scale, decay;
    const bool* skip;
    float exp_mult;
    int32_t into_out;
    double* partial;  // (tiles, kUpdateStats)
    double* sums;     // (count,): Σ step²
    double* stats;    // (count, kUpdateStats + 1): those that pass 0 would find
};

// p <- p - decay p - step,  step = scale m / (sqrt(second_correction v + inner_eps) + outer_eps).
struct AdamArgs {
    TensorTable table;
    int32_t slices;  // of each tensor
    float keep_m, add_m, keep_v, add_v, clip, inner_eps, outer_eps;
    StridedView<float> scale, decay;
    const float *momentum_correction, *second_correction;
    const bool* skip;
    double* partial;  // (tiles,)
    double* sums;     // (count,)
};

// p <- p - rate (g / sqrt(squares / numel + norm_eps) + weight_decay p); no squares: rate (g + weight_decay p)
struct DescendArgs {
    TensorTable table;
    StridedView<float> rate, weight_decay;
    bool rate_of_slice, weight_decay_of_slice;  // rather than of the tensor
    const double *squares, *numel;
    double norm_eps;
    const bool* skip;
};

// p <- g, or p <- p with 0 for NaN, which needs no `skip`
struct AssignArgs {
    TensorTable table;
    const bool* skip;
};

// The new scales of all blocks of codes, before the codes are written: what an update will make of the accumulators.
struct ScalesArgs {
    TensorTable table;
    int32_t momenta;  // how many, beside one second moment
    float keep_m[kMomenta], add_m[kMomenta], keep_v, add_v, clip;
    const bool* skip;
};

struct ProbeArgs {};

// The factored accumulators of a tensor: rows (kFactored, outer, b, inner) where b is axis B, cols (kFactored, size).
enum FactoredSlot {
    fRows,
    fCols,
    fRowSums,
    fColSums,
    fMeans,
    fNewRows,
    fNewCols,
    fRowFactors,
    fColFactors,
    kFactoredSlots
};
// Rows and columns of a tensor are divided among blocks, kFactoredChunk numbers or groups of rows each.
struct FactoredEntry {
    int64_t at[kFactoredSlots];
    int64_t outer, b, inner, cols;
    float row_size, col_size;  // how many numbers a row sum and a column sum have
    int32_t first_block;       // of the tensor, which has kFactored of them for each chunk
    int32_t chunks;
    bool means;  // given, (kFactored, outer, 1, inner)

    // One mean for all rows, which are divided among blocks: their sum is known when all blocks have added their part.
    HF_LOPT_HOST_DEVICE bool one_mean() const { return outer * inner == 1; }
};
struct FactoredArgs {
    const FactoredEntry* entries;
    int32_t count, blocks;  // blocks of the first half of the launch; there is a second one
    uint32_t* started;      // zero between launches: blocks that have begun; that are done;
    uint32_t* done;
    uint32_t* arrived;  // (count, kFactored), those of a tensor and decay that have added their part
    double* partial;    // (blocks,), sums of new row accumulators
    char* base[kFactoredSlots];
    float keep[kFactored], add[kFactored];
};
constexpr int kFactoredThreads = 256, kFactoredChunk = 2048;

void launch_sums(const SumsArgs& args, int tiles, void* stream);
void launch_feature_sums(const FeatureSumsArgs& args, int tiles, void* stream);
void launch_apply_4(const ApplyArgs& args, int tiles, void* stream);
void launch_apply_8(const ApplyArgs& args, int tiles, void* stream);
void launch_apply_32(const ApplyArgs& args, int tiles, void* stream);
void launch_apply_32_tf32(const ApplyArgs& args, int tiles, void* stream);
void launch_adam(const AdamArgs& args, int tiles, void* stream);
void launch_descend(const DescendArgs& args, int tiles, void* stream);
void launch_assign(const AssignArgs& args, int tiles, void* stream);
void launch_zero_nan(const AssignArgs& args, int tiles, void* stream);
void launch_moments_stored(const Stored<SumsArgs>& args, int tiles, void* stream);
void launch_feature_sums_stored(const Stored<FeatureSumsArgs>& args, int tiles, void* stream);
void launch_apply_4_stored(const Stored<ApplyArgs>& args, int tiles, void* stream);
void launch_apply_8_stored(const Stored<ApplyArgs>& args, int tiles, void* stream);
void launch_apply_32_stored(const Stored<ApplyArgs>& args, int tiles, void* stream);
void launch_apply_32_tf32_stored(const Stored<ApplyArgs>& args, int tiles, void* stream);
void launch_adam_stored(const Stored<AdamArgs>& args, int tiles, void* stream);
void launch_descend_stored(const Stored<DescendArgs>& args, int tiles, void* stream);
void launch_scales(const Stored<ScalesArgs>& args, int tiles, void* stream);
void launch_probe(const ProbeArgs& args, void* stream);
void launch_update_factored(const FactoredArgs& args, void* stream);

}  // namespace hf_lopt
