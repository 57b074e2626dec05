// The CUDA kernels as functions of plain C++, over addresses of device memory; every call launches one kernel on a stream.
// fastcl/backends/_cuda.py plans what is launched, csrc/cuda/*.cuh is device code.
#pragma once

#include "../kernels.hpp"

namespace fastcl::cuda {

constexpr int kParts = 128;  // blocks that look for bounds; each writes a part
constexpr int kRange = 32;   // rows that share a range of drop keys

// The implicit matrix, as fastcl.backends.Pairs. Null where absent; rows are contiguous, 16-byte aligned, and of a depth
// that is a multiple of 8.
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
  // (column spans, M), (row spans, N); one set: both (spans + 1, N), the same. Hopper's kernel leaves two parts where this
  // says (column) spans.
  float *row_parts, *col_parts;
  int room, row_span, col_span, row_spans, units;
};

// Rows whose results are wanted: those of the matrix, or those of its transpose.
struct FinishSide {
  Pairs pairs;
  const float* parts;  // (count, M)
  float* out;
  int count, blocks;
};

// Upstream gradients, and for the exponential link the results they belong to (+inf for a row with no kept pair).
struct Sides {
  const float *row_lse, *row_grad, *col_lse, *col_grad;
};

// Rows whose gradient is wanted: those of the matrix, or those of its transpose. Null where something is not wanted.
struct GradSide {
  Pairs pairs;
  Sides sides;
  float *out, *sum, *total;  // in parts: (splits, M, D), (splits, M), (splits, M)
  int blocks, splits;
};

struct Target {  // of a launch
  int blocks;
  void* stream;
};

// Rows are bf16 or f16. They throw std::runtime_error with CUDA's words.
void bounds(const Pairs&, Dtype, float* bounds, i64* row_ranges, i64* col_ranges, Target);
void sums(const Pairs&, Dtype, Link, const Sums&, Target);
void finish(const FinishSide& rows, const FinishSide& cols, Dtype, Link, const float* bounds, int room, Target);
void balance(const Pairs&, Dtype, Link, const Sides&, float* balance, Target);
void grad(const GradSide& rows, const GradSide& cols, Dtype, Link, const float* balance, Target);

// The same by wgmma and the copy engine, in libraries built for sm_90a.
void hopper_sums(const Pairs&, Dtype, Link, const Sums&, Target);
void hopper_grad(const GradSide& rows, const GradSide& cols, Dtype, Link, const float* balance, Target);

// Rows and columns of a tile, which the plan must know.
constexpr int kSumsRows = 64, kGradRows = 64;
constexpr int kHopperSumsRows = 64, kHopperSumsCols = 256, kHopperGradRows = 128;
constexpr int kDeepest = 256;
constexpr int sums_cols(int depth) { return depth <= 128 ? 128 : 64; }
constexpr int grad_cols(int depth) { return depth <= 128 ? 64 : 32; }
constexpr int hopper_grad_cols(int depth) { return depth <= 128 ? 128 : 64; }
template <int D>
constexpr int kSumsCols = sums_cols(D);
template <int D>
constexpr int kGradCols = grad_cols(D);

}  // namespace fastcl::cuda
