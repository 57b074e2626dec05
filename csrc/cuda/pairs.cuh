// What every kernel knows of the implicit matrix: how a logit is formed, and which pairs are kept.
#pragma once

#include "launch.hpp"
#include "ptx.cuh"

namespace fastcl::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kTiny = 1.17549435e-38f;  // the smallest normal number: below it exp2 gives 0
constexpr float kLargestShift = 1e30f;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 128, kWarps = kThreads / 32;

// Whether the keys of a row and a column keep their pair.
__device__ __forceinline__ bool not_dropped(i64 row, i64 col) { return ptx::guard(row != col); }
__device__ __forceinline__ bool only_one(i64 row, i64 col) { return ptx::guard(row == col); }

// Whether a logit counts. "Above" a ceiling is asked, not "at most": a NaN reaches the loss.
__device__ __forceinline__ bool under_ceilings(const Pairs& p, int i, int j, float s) {
  if (p.row_ceiling && !ptx::guard(!(s > p.row_ceiling[min(i, p.m - 1)]))) return false;
  return !p.col_ceiling || ptx::guard(!(s > p.col_ceiling[min(j, p.n - 1)]));
}

// The least and the largest drop key of some rows, a multiple of kRange of them, all inside the matrix.
struct KeyRange {
  i64 low, high;
};

template <int ROWS>
__device__ __forceinline__ KeyRange key_range(const i64* ranges, int first) {
  KeyRange r{INT64_MAX, INT64_MIN};
#pragma unroll
  for (int i = 0; i < ROWS / kRange; i++) {
    const i64* at = ranges + 2 * (first / kRange + i);
    r.low = at[0] < r.low ? at[0] : r.low;
    r.high = at[1] > r.high ? at[1] : r.high;
  }
  return r;
}

// Whether a tile may have pairs to forget; all others pay for no mask.
template <int BM, int BN>
__device__ __forceinline__ bool needs_mask(const Pairs& p, int row, int col) {
  if (!ptx::guard(row + BM <= p.m) || !ptx::guard(col + BN <= p.n)) return true;
  if (!ptx::guard(!p.only_x) || !ptx::guard(!p.row_ceiling) || !ptx::guard(!p.col_ceiling)) return true;
  if (!p.drop_x) return false;
  const KeyRange rows = key_range<BM>(p.row_ranges, row), cols = key_range<BN>(p.col_ranges, col);
  return !ptx::guard(rows.low > cols.high || cols.low > rows.high);
}

// log(1 + e^s) to fp32 accuracy for any s; 0 for -inf.
// With e = e^-|s|, log1p(e) = 2 atanh(t), t = e / (2 + e) <= 1/3: the series is short by less than 2e-8.
__device__ __forceinline__ float softplus(float s) {
  const float e = ptx::exp2(-fabsf(s) * kLog2E), t = e * ptx::reciprocal(2.0f + e), u = t * t;
  const float series = 1 + u * (1 / 3.f + u * (1 / 5.f + u * (1 / 7.f + u * (1 / 9.f + u * (1 / 11.f + u / 13.f)))));
  const float result = fmaxf(s, 0.0f) + 2.0f * t * series;
  return s != s ? s : result;  // fmaxf drops a NaN
}

__device__ __forceinline__ float sigmoid(float s) { return ptx::reciprocal(1.0f + ptx::exp2(-s * kLog2E)); }

// ---- tiles ----------------------------------------------------------------------------------------------------------

// Rows in shared memory are 16 bytes longer than they need to be: eight of them lie in eight different groups of banks.
template <int D>
constexpr int kPitch = D + 8;
template <int ROWS, int D>
constexpr int kTileBytes = ROWS * kPitch<D> * 2;

// Begins to copy rows first .. first + ROWS, with zeros outside, and in features past the depth.
template <int ROWS, int D>
__device__ __forceinline__ void copy_rows(uint32_t to, const void* from, int first, int count, int depth) {
  const uint16_t* rows = static_cast<const uint16_t*>(from);
  for (int i = threadIdx.x; i < ROWS * (D / 8); i += kThreads) {
    const int r = i / (D / 8), c = i % (D / 8) * 8;
    const bool inside = ptx::guard(first + r < count) && ptx::guard(c < depth);
    ptx::cp_async_16(to + (r * kPitch<D> + c) * 2, inside ? rows + i64(first + r) * depth + c : rows, inside);
  }
}

// What is multiplied: fp32 numbers are split into two of bf16, whose sum is off by 2^-18 of them at most.
template <Dtype T>
constexpr bool kSplit = T == Dtype::f32;
template <Dtype T>
constexpr Dtype kOperand = kSplit<T> ? Dtype::bf16 : T;

// <x_i, y_j> of the 16 rows of this warp and BN columns. acc[j][2 h + e] belongs to row lane / 4 + 8 h and column
// 8 j + 2 (lane % 4) + e. Of split numbers, a step of 16 has eight high parts and eight low ones: multiplied as they
// are, and with those of the columns exchanged.
template <Dtype T, int D, int BN>
__device__ __forceinline__ void products(float (&acc)[BN / 8][4], uint32_t rows, uint32_t cols) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < BN / 8; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.0f;
  const uint32_t a_at = rows + ((warp * 16 + lane % 16) * kPitch<D> + lane / 16 * 8) * 2;
  const uint32_t b_at = cols + ((lane % 8 + lane / 16 * 8) * kPitch<D> + lane / 8 % 2 * 8) * 2;
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t a[4];
    ptx::ldmatrix_x4(a, a_at + k * 2);
#pragma unroll
    for (int j = 0; j < BN; j += 16) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, b_at + (j * kPitch<D> + k) * 2);
      if constexpr (kSplit<T>) {
        ptx::mma_m16n8k16<kOperand<T>>(acc[j / 8], a, b[1], b[0]);
        ptx::mma_m16n8k16<kOperand<T>>(acc[j / 8 + 1], a, b[3], b[2]);
      }
      ptx::mma_m16n8k16<kOperand<T>>(acc[j / 8], a, b[0], b[1]);
      ptx::mma_m16n8k16<kOperand<T>>(acc[j / 8 + 1], a, b[2], b[3]);
    }
  }
}

// ---- what threads know together -------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) v = fmaxf(v, __shfl_xor_sync(kAll, v, mask));
  return v;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) v += __shfl_xor_sync(kAll, v, mask);
  return v;
}

// The largest value of a block. `shared` holds one of each warp.
template <int THREADS = kThreads>
__device__ __forceinline__ float block_max(float v, float* shared) {
  v = warp_max(v);
  __syncthreads();  // whoever read `shared` before is done
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  for (int w = 0; w < THREADS / 32; w++) v = fmaxf(v, shared[w]);
  return v;
}

__device__ __forceinline__ float nan_to_inf(float v) { return v == v ? v : INFINITY; }

// ---- the constant shift ---------------------------------------------------------------------------------------------

// What is subtracted from every exponent of base 2: a whole number, above 0 only where sums would overflow without it.
// No logit is above |scale| max|x| max|y| + max|row bias| + max|column bias| (Cauchy-Schwarz), so no exponential is
// above 2^room and no sum above 2^126. Without bounds rows have length 1, up to the rounding of bf16. For a whole warp.
__device__ __forceinline__ float constant_shift(const float* bounds, float scale, int room) {
  float largest = fabsf(scale) * 1.01f;
  if (bounds) {
    float most[4] = {};
    for (int part = threadIdx.x % 32; part < kParts; part += 32)
#pragma unroll
      for (int i = 0; i < 4; i++) most[i] = fmaxf(most[i], bounds[i * kParts + part]);
#pragma unroll
    for (int i = 0; i < 4; i++) most[i] = warp_max(most[i]);
    largest = fabsf(scale) * sqrtf(most[0]) * sqrtf(most[1]) * 1.00001f + most[2] + most[3];
  }
  // finite, so that a kept pair is never as small as a forgotten one; fminf also takes a NaN (0 times infinity) away
  return fminf(fmaxf(ceilf(largest * kLog2E) - room, 0.0f), kLargestShift);
}

}  // namespace fastcl::cuda
