// The small kernels around sums and gradients: bounds on the logits before, results after, and what balances weights.
#pragma once

#include "pairs.cuh"

namespace fastcl::cuda {

__device__ __forceinline__ float nan_to_inf(float v) { return v == v ? v : INFINITY; }

// The largest value of a block of kThreads; for thread 0.
__device__ __forceinline__ float block_max(float v, float* shared) {
  v = warp_max(v);
  __syncthreads();  // whoever read `shared` before is done
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  for (int w = 0; w < kWarps; w++) v = fmaxf(v, shared[w]);
  return v;
}

// The largest squared length among this block's share of rows; +inf where one is NaN. A warp reads a row.
template <Dtype T>
__device__ __forceinline__ float longest(const void* from, int count, int depth) {
  const uint16_t* rows = static_cast<const uint16_t*>(from);
  const int lane = threadIdx.x % 32;
  float most = 0.0f;
  for (int r = blockIdx.x * kWarps + threadIdx.x / 32; r < count; r += gridDim.x * kWarps) {
    float total = 0.0f;
    for (int c = lane; c < depth; c += 32) {
      const float v = ptx::widen<T>(rows[i64(r) * depth + c]);
      total += v * v;
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) total += __shfl_xor_sync(kAll, total, mask);
    most = fmaxf(most, nan_to_inf(total));
  }
  return most;
}

__device__ __forceinline__ float largest(const float* vector, int count) {
  float most = 0.0f;
  for (int i = blockIdx.x * kThreads + threadIdx.x; vector && i < count; i += gridDim.x * kThreads)
    most = fmaxf(most, nan_to_inf(fabsf(vector[i])));
  return most;
}

__device__ __forceinline__ void key_ranges(const i64* keys, i64* ranges, int count) {
  for (int i = blockIdx.x * kThreads + threadIdx.x; i * kRange < count; i += gridDim.x * kThreads) {
    i64 low = keys[i * kRange], high = low;
    for (int r = i * kRange; r < count && r < (i + 1) * kRange; r++) {
      low = keys[r] < low ? keys[r] : low;
      high = keys[r] > high ? keys[r] : high;
    }
    ranges[2 * i] = low;
    ranges[2 * i + 1] = high;
  }
}

// Bounds (4, kParts) on squared lengths and biases, one part per block, and the ranges of the drop keys.
template <Dtype T>
__global__ void __launch_bounds__(kThreads) bounds_kernel(const Pairs p, float* bounds, i64* row_ranges,
                                                          i64* col_ranges) {
  if (bounds) {
    float* shared = reinterpret_cast<float*>(ptx::shared_memory());
    const float x = longest<T>(p.x, p.m, p.depth), y = p.symmetric ? x : longest<T>(p.y, p.n, p.depth);
    const float most[4] = {x, y, largest(p.row_bias, p.m), largest(p.col_bias, p.n)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float v = block_max(most[i], shared);
      if (threadIdx.x == 0) bounds[i * kParts + blockIdx.x] = v;
    }
  }
  if (row_ranges) key_ranges(p.drop_x, row_ranges, p.m);
  if (row_ranges && !p.symmetric) key_ranges(p.drop_y, col_ranges, p.n);
}

// Log-sum-exp of row i with a running maximum, by a warp: right for any logits, and slow.
template <Dtype T>
__device__ float online(const Pairs& p, float scale, int i) {
  const uint16_t *x = static_cast<const uint16_t*>(p.x) + i64(i) * p.depth, *y = static_cast<const uint16_t*>(p.y);
  float peak = -INFINITY, total = 0.0f;
  for (int j = threadIdx.x % 32; j < p.n; j += 32) {
    float s = 0.0f;
    for (int c = 0; c < p.depth; c++) s += ptx::widen<T>(x[c]) * ptx::widen<T>(y[i64(j) * p.depth + c]);
    s = s * scale + (p.row_bias ? p.row_bias[i] : 0.0f) + (p.col_bias ? p.col_bias[j] : 0.0f);
    if (!kept(p, i, j, s)) continue;
    const float higher = s != s ? s : fmaxf(peak, s);
    // equal at first, or both infinite: their difference would be NaN
    total = total * (peak == higher ? 1.0f : ptx::exp2((peak - higher) * kLog2E)) +
            (s == higher ? 1.0f : ptx::exp2((s - higher) * kLog2E));
    peak = higher;
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    const float other = __shfl_xor_sync(kAll, peak, mask), more = __shfl_xor_sync(kAll, total, mask);
    const float higher = peak != peak || other != other ? NAN : fmaxf(peak, other);
    total = (peak == higher ? total : total * ptx::exp2((peak - higher) * kLog2E)) +
            (other == higher ? more : more * ptx::exp2((other - higher) * kLog2E));
    peak = higher;
  }
  return total == 0.0f ? -INFINITY : peak + logf(total);
}

// The result of row i from its parts, added in order; one that the constant shift took too many digits from is computed
// again. For a whole warp, whose rows lie side by side.
template <Dtype T, Link L>
__device__ __forceinline__ void finish_rows(const Pairs& p, const float* bounds, const float* parts, int count,
                                            float* out, int i, int room) {
  float total = 0.0f;
  for (int part = 0; i < p.m && part < count; part++) total += parts[i64(part) * p.m + i];
  if constexpr (L == Link::exp) {
    const float scale = *p.scale, shift = constant_shift(bounds, scale, room);
    // Terms below the smallest number were lost: together up to 2^-126 n, to be below 2^-24 of the sum.
    const bool suspect = i < p.m && total != 0.0f && !(total >= ptx::exp2(24.0f - room) && total < INFINITY);
    total = total == 0.0f ? -INFINITY : (shift + log2f(total)) * kLn2;
    unsigned left = __ballot_sync(kAll, suspect);
    for (int lane = 0; left; lane++, left >>= 1) {
      if (!(left & 1)) continue;
      const float exact = online<T>(p, scale, i - int(threadIdx.x % 32) + lane);
      if (int(threadIdx.x % 32) == lane) total = exact;
    }
  }
  if (i < p.m) out[i] = total;
}

// Blocks take the rows, and after them the columns.
template <Dtype T, Link L>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ FinishSide rows,
                                                          const __grid_constant__ FinishSide cols,
                                                          const float* bounds, int room) {
  const bool of_rows = int(blockIdx.x) < rows.blocks;
  const FinishSide& side = of_rows ? rows : cols;
  const int block = blockIdx.x - (of_rows ? 0 : rows.blocks);
  finish_rows<T, L>(side.pairs, bounds, side.parts, side.count, side.out, block * kThreads + threadIdx.x, room);
}

// Middle of all log-sum-exps (base 2), whether they lie too far apart for it, and the gain of fp16 weights.
// Where a pair counts for its row and for its column, one exponential serves both: with E = 2^(s - middle),
// w = E (g_i 2^(middle - lse_i) + h_j 2^(middle - lse_j)). No kept logit is above its log-sum-exp. One block.
template <Dtype T, Link L>
__global__ void __launch_bounds__(kThreads) balance_kernel(int m, int n, const Sides sides, float* balance) {
  constexpr float kSpread = 100.0f;    // in base 2, over which those factors stay in range
  constexpr float kFp16Room = 16384.f;  // weights are about 1 / n^2, below what fp16 holds: the largest is made this large
  float* shared = reinterpret_cast<float*>(ptx::shared_memory());
  float middle = 0.0f, wide = 0.0f, gain = 1.0f;
  const struct {
    const float *lse, *grad;
    int count;
  } both[2] = {{sides.row_lse, sides.row_grad, m}, {sides.col_lse, sides.col_grad, n}};
  if (L == Link::exp && sides.row_grad && sides.col_grad) {
    float low = INFINITY, high = -INFINITY;
    for (const auto& side : both)
      for (int i = threadIdx.x; i < side.count; i += kThreads) {
        const float v = side.lse[i] * kLog2E;
        if (v == INFINITY) continue;  // no pair was kept
        low = fminf(low, v);
        high = fmaxf(high, v);
      }
    low = -block_max(-low, shared);
    high = block_max(high, shared);
    middle = low <= high ? 0.5f * (low + high) : 0.0f;
    wide = high - low > kSpread ? 1.0f : 0.0f;
  }
  if (T == Dtype::f16) {
    float most = sides.row_grad || sides.col_grad ? 0.0f : 1.0f;
    for (const auto& side : both)
      for (int i = threadIdx.x; side.grad && i < side.count; i += kThreads) most = fmaxf(most, fabsf(side.grad[i]));
    most = block_max(most, shared);
    gain = most > 0.0f && most < INFINITY ? kFp16Room / most : 1.0f;
  }
  if (threadIdx.x == 0) balance[0] = middle, balance[1] = wide, balance[2] = gain;
}

}  // namespace fastcl::cuda
