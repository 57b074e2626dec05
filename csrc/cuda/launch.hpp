// The CUDA kernels as functions of plain C++, over addresses of device memory; every call launches one kernel on a
// stream. fastcl/backends/_cuda.py plans what is launched, csrc/cuda/*.cuh is device code.
#pragma once

#include "../kernels.hpp"

namespace fastcl::cuda {

constexpr int kParts = 128;  // blocks that look for bounds; each writes a part
constexpr int kRange = 32;   // rows that share a range of drop keys

// The implicit matrix, as fastcl.backends.Pairs. Null where absent; rows are contiguous, 16-byte aligned, and of a
// depth that is a multiple of 8. fp32 numbers are multiplied as sums of two of bf16. Rows of f32 are to sm_80's sums
// and gradients the higher numbers of eight features, then the lower ones, and so on, in a depth of both; to bounds and
// results they are floats. Hopper's kernels take rows of bf16 three times as long: (high, high, low) (high, low, high).
struct Pairs {
  const void *x, *y;
  int m, n, depth;
  const float* scale;
  const float *row_bias, *col_bias, *row_ceiling, *col_ceiling;
  const i64 *drop_x, *drop_y, *only_x, *only_y;
  const i64 *row_ranges, *col_ranges;  // least and largest drop key of every kRange rows
  bool symmetric;
};

// One launch of sums: how the matrix is cut into units of row_span x col_span, numbered down the columns.
struct Sums {
  const float* bounds;
  // (column spans, M), (row spans, N); one set: both (spans + 1, N), the same. Hopper's kernels leave two parts where
  // this says (column) spans.
  float *row_parts, *col_parts;
  int room, row_span, col_span, row_spans, units;
};

// Rows whose results are wanted: those of the matrix, or those of its transpose.
struct FinishSide {
  Pairs pairs;
  const float* parts;  // (count, M)
  float* out;
  const float* positive;  // null, or the logits p of partners: then `loss` is -log sigmoid(p - result)
  float* loss;
  int count, blocks;
};

// Upstream gradients of rows, and for the exponential link the results they belong to (infinite where no pair is kept).
struct Upstream {
  const float *lse, *grad;
  const float* positive;  // null, or the logits p of partners: then gradients are those of -log sigmoid(p - lse)
  int stride;             // of the gradients: 0 where one number stands for all rows
};

struct Sides {
  Upstream row, col;
};

// Rows whose gradient is wanted: those of the matrix, or those of its transpose. Null where something is not wanted.
struct GradSide {
  Pairs pairs;
  Sides sides;
  float *out, *sum, *total;  // in parts: (splits, M, D), (splits, M), (splits, M)
  int blocks, splits;
};

// Two views, row i of one the partner of row i of the other, as they came and as they are multiplied.
struct Views {
  const void *x, *y;  // (count, D), 16-byte aligned
  void* z;            // (2 count, D)
  float* length;      // (2 count), null where rows are not divided by it
  float* positive;    // (2 count) logits of partners
  const float* scale;
  int count, depth;
};

// A view whose gradient is wanted; null where it is not.
struct RestoreSide {
  const float* parts;  // (splits, pitch, D), of the negatives
  void* out;           // (count, D), raw
  float* dots;         // (count), <z, dz>
  int splits, pitch;
};

// Weights of a strip of rows, in the dtype of the rows: (M, pitch); and their gain. `low` numbers later, where that is
// not 0, stands what rounding left of them.
struct Strip {
  void* weights;
  i64 pitch, low;
  float* gain;
};

// out (rows, depth) = weights y / gain, summed over `inner`; added to what is there, or not.
struct Product {
  float* out;
  const float* gain;
  int rows, depth, inner;
  bool add;
};

struct Target {  // of a launch
  int blocks;
  void* stream;
};

// Rows are bf16, f16 or f32. They throw std::runtime_error with CUDA's words.
void bounds(const Pairs&, Dtype, float* bounds, i64* row_ranges, i64* col_ranges, Target);
void sums(const Pairs&, Dtype, Link, const Sums&, Target);
void finish(const FinishSide& rows, const FinishSide& cols, Dtype, Link, const float* bounds, int room, Target);
void grad(const GradSide& rows, const GradSide& cols, Dtype, Link, Target);
// Raw rows are f32, bf16 or f16. Bounds where rows are not divided by their lengths, null otherwise.
void prepare(const Views&, Dtype raw, Dtype, float* bounds, i64* keys, i64* ranges, Target);
void restore(const Views&, const Sides&, const RestoreSide& x, const RestoreSide& y, Dtype raw, Dtype, Target);

// The same by wgmma and the copy engine, in libraries built for sm_90a. Rows are bf16 or f16.
void hopper_sums(const Pairs&, Dtype, Link, const Sums&, Target);
void hopper_grad(const GradSide& rows, const GradSide& cols, Dtype, Link, Target);
// For rows of any depth: sums; weights of a strip, with their sums, where the plan has room for them; products
// with those.
void hopper_wide_sums(const Pairs&, Dtype, Link, const Sums&, Target);
void hopper_weights(const GradSide&, Dtype, Link, const Sums&, const Strip&, Target);
void hopper_product(const Product&, const void* weights, i64 pitch, const void* y, bool transposed, Dtype, Target);

// Rows and columns of a tile, which the plan must know.
constexpr int kSumsRows = 64, kGradRows = 64;
constexpr int kHopperSumsRows = 64, kHopperSumsCols = 256, kHopperGradRows = 128;
constexpr int kHopperWideRows = 128, kHopperWideCols = 256;
constexpr int kViewsRows = 4;  // pairs of partners, of a block
constexpr int kDeepest = 256;
constexpr int sums_cols(int depth) { return depth <= 128 ? 128 : 64; }
constexpr int grad_cols(int depth) { return depth <= 128 ? 64 : 32; }
constexpr int hopper_grad_cols(int depth) { return depth <= 128 ? 128 : 64; }
template <int D>
constexpr int kSumsCols = sums_cols(D);
template <int D>
constexpr int kGradCols = grad_cols(D);

}  // namespace fastcl::cuda
