// The small kernels around sums and gradients: bounds on the logits before, and results after.
#pragma once

#include "pairs.cuh"

namespace fastcl::cuda {

// Of a matrix of rows.
template <Dtype T>
__device__ __forceinline__ float number(const void* rows, i64 at) {
  if constexpr (T == Dtype::f32)
    return static_cast<const float*>(rows)[at];
  else
    return ptx::widen<T>(static_cast<const uint16_t*>(rows)[at]);
}

// The largest squared length among this block's share of rows; +inf where one is NaN. A warp reads a row.
template <Dtype T>
__device__ __forceinline__ float longest(const void* rows, int count, int depth) {
  const int lane = threadIdx.x % 32;
  float most = 0.0f;
  for (int r = blockIdx.x * kWarps + threadIdx.x / 32; r < count; r += gridDim.x * kWarps) {
    float total = 0.0f;
    for (int c = lane; c < depth; c += 32) {
      const float v = number<T>(rows, i64(r) * depth + c);
      total += v * v;
    }
    most = fmaxf(most, nan_to_inf(warp_sum(total)));
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
__global__ void __launch_bounds__(kThreads)
    bounds_kernel(const Pairs p, float* bounds, i64* row_ranges, i64* col_ranges) {
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
  float peak = -INFINITY, total = 0.0f;
  for (int j = threadIdx.x % 32; j < p.n; j += 32) {
    float s = 0.0f;
    for (int c = 0; c < p.depth; c++) s += number<T>(p.x, i64(i) * p.depth + c) * number<T>(p.y, i64(j) * p.depth + c);
    s = s * scale + (p.row_bias ? p.row_bias[i] : 0.0f) + (p.col_bias ? p.col_bias[j] : 0.0f);
    if (!under_ceilings(p, i, j, s)) continue;
    if (p.drop_x && !not_dropped(p.drop_x[i], p.drop_y[j])) continue;
    if (p.only_x && !only_one(p.only_x[i], p.only_y[j])) continue;
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
__device__ __forceinline__ void finish_rows(const FinishSide& side, const float* bounds, int i, int room) {
  const Pairs& p = side.pairs;
  float total = 0.0f;
  constexpr int kAtOnce = 16;  // parts, which wait for memory together
  for (int part = 0; ptx::bound(i < p.m) && part < side.count; part += kAtOnce) {
    float sums[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; k++)
      sums[k] = ptx::bound(part + k < side.count) ? side.parts[i64(part + k) * p.m + i] : 0.0f;
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) total += sums[k];
  }
  if constexpr (L == Link::exp) {
    const float scale = *p.scale, shift = constant_shift(bounds, scale, room);
    // Terms below the smallest number were lost: together up to 2^-126 n, to be below 2^-24 of the sum.
    // Outside it is 0.
    const bool suspect = total != 0.0f && !(total >= ptx::exp2(24.0f - room) && total < INFINITY);
    total = total == 0.0f ? -INFINITY : (shift + log2f(total)) * kLn2;
    unsigned left = __ballot_sync(kAll, suspect);
    for (int lane = 0; left; lane++, left >>= 1) {
      if (!(left & 1)) continue;
      const float exact = online<T>(p, scale, i - int(threadIdx.x % 32) + lane);
      if (int(threadIdx.x % 32) == lane) total = exact;
    }
  }
  if (!ptx::guard(i < p.m)) return;
  side.out[i] = total;
  if (side.positive) side.loss[i] = softplus(total - side.positive[i]);  // 0 where there are no negatives
}

// Blocks take the rows, and after them the columns.
template <Dtype T, Link L>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ FinishSide rows, const __grid_constant__ FinishSide cols, const float* bounds,
                  int room) {
  const bool of_rows = int(blockIdx.x) < rows.blocks;
  const int block = blockIdx.x - (of_rows ? 0 : rows.blocks);
  finish_rows<T, L>(of_rows ? rows : cols, bounds, block * kThreads + threadIdx.x, room);
}

}  // namespace fastcl::cuda
