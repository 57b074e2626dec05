// What a weight needs of its row and of its column: their upstream gradients, in balance with each other.
#pragma once

#include "pairs.cuh"

namespace fastcl::cuda {

// Gradient of a row's result. Of a loss -log sigmoid(p - n), that of n.
__device__ __forceinline__ float upstream(const Upstream& u, int i) {
  const float grad = u.grad[i * u.stride];
  return u.positive ? grad * sigmoid(u.lse[i] - u.positive[i]) : grad;
}

// In base 2; +inf where no pair was kept, so that weights are 0 there.
__device__ __forceinline__ float lse_of(const Upstream& u, int i) {
  const float lse = u.lse[i] * kLog2E;
  return lse == -INFINITY ? INFINITY : lse;
}

// Middle of all log-sum-exps (base 2), whether they lie too far apart for it, and the gain of fp16 weights.
struct Balance {
  float middle;
  bool wide;
  float gain;
};

// Where a pair counts for its row and for its column, one exponential serves both: with E = 2^(s - middle),
// w = E (g_i 2^(middle - lse_i) + h_j 2^(middle - lse_j)). No kept logit is above its log-sum-exp. Every block finds
// the same: it reads little beside its tiles, and saves a launch. `shared` holds a number of each warp.
template <Dtype T, Link L, int THREADS = kThreads>
__device__ __forceinline__ Balance balance_of(const Sides& sides, const Pairs& p, float* shared) {
  constexpr float kSpread = 100.0f;  // in base 2, over which those factors stay in range
  // Weights are about 1 / n^2, below what fp16 holds: the largest is made this large.
  constexpr float kFp16Room = 16384.f;
  Balance balance{0.0f, false, 1.0f};
  const int different = p.symmetric ? 1 : 2;
  if (L == Link::exp && sides.row.grad && sides.col.grad) {
    float low = INFINITY, high = -INFINITY;
    for (int side = 0; side < different; side++) {
      const Upstream& u = side ? sides.col : sides.row;
      for (int i = threadIdx.x; i < (side ? p.n : p.m); i += THREADS) {
        const float lse = lse_of(u, i);
        if (lse == INFINITY) continue;  // no pair was kept
        low = fminf(low, lse);
        high = fmaxf(high, lse);
      }
    }
    low = -block_max<THREADS>(-low, shared);
    high = block_max<THREADS>(high, shared);
    balance.middle = low <= high ? 0.5f * (low + high) : 0.0f;
    balance.wide = high - low > kSpread;
  }
  if (T == Dtype::f16) {
    float most = sides.row.grad || sides.col.grad ? 0.0f : 1.0f;
    for (int side = 0; side < different; side++) {
      const Upstream& u = side ? sides.col : sides.row;
      for (int i = threadIdx.x; u.grad && i < (side ? p.n : p.m); i += THREADS)
        most = fmaxf(most, fabsf(upstream(u, i)));
    }
    most = block_max<THREADS>(most, shared);
    balance.gain = most > 0.0f && most < INFINITY ? kFp16Room / most : 1.0f;
  }
  return balance;
}

// Of a row or column: upstream gradient times gain, that times 2^(middle - lse), and lse in base 2.
struct Side {
  float grad, scaled, lse;
};

template <Link L>
__device__ __forceinline__ Side side_of(const Upstream& u, int i, int count, float middle, float gain) {
  Side s{0.0f, 0.0f, 0.0f};
  if (!u.grad || !ptx::bound(i < count)) return s;
  s.grad = upstream(u, i) * gain;
  if constexpr (L == Link::exp) {
    s.lse = lse_of(u, i);
    s.scaled = s.grad * ptx::exp2(middle - s.lse);
  }
  return s;
}

}  // namespace fastcl::cuda
