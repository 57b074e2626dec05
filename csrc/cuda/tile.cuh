// What becomes of a tile of inner products in registers. mma.sync and wgmma leave a warp its 16 rows and BN columns in
// the same places: s[b][2 h + e] belongs to row lane / 4 + 8 h and column 8 b + 2 (lane % 4) + e. So the kernels of
// sm_80 and of Hopper share what follows. `row` and `col` are those of a thread's first number.
#pragma once

#include "sides.cuh"

namespace fastcl::cuda {

// How an inner product becomes a logit. Ceilings and softplus need natural logits; otherwise one multiplication gives
// those of base 2.
struct Logits {
  float factor, unit, to_base2;
  bool plain;  // an exponential of one fused multiply-add, wherever no pair is forgotten
};

template <Link L>
__device__ __forceinline__ Logits logits_of(const Pairs& p) {
  const bool base2 = L == Link::exp && !p.row_ceiling && !p.col_ceiling;
  const float unit = base2 ? kLog2E : 1.0f;
  return {*p.scale * unit, unit, base2 ? 1.0f : kLog2E, base2 && !p.col_bias};
}

__device__ __forceinline__ float row_bias_of(const Pairs& p, const Logits& to, int row) {
  return p.row_bias && ptx::bound(row < p.m) ? p.row_bias[row] * to.unit : 0.0f;
}

__device__ __forceinline__ float col_bias_of(const Pairs& p, const Logits& to, int col) {
  return p.col_bias && ptx::bound(col < p.n) ? p.col_bias[col] * to.unit : 0.0f;
}

// 2^v on the units that multiply, for v of at most 127; as if v were -126 below that. v is split into a whole number,
// which becomes an exponent, and a fraction of at most 1/2, whose minimax polynomial errs by 2.7e-6 of the result.
__device__ __forceinline__ float exp2_by_polynomial(float v) {
  constexpr float kWhole = 12582912.0f + 127.0f;  // 1.5 * 2^23: a sum with it has no fraction; and an exponent's bias
  v = v < -126.0f ? -126.0f : v;                  // a NaN stays
  const float whole = v + kWhole, f = v - (whole - kWhole);
  float power = fmaf(0.00957010221f, f, 0.0559178591f);
  power = fmaf(power, f, 0.240247443f);
  power = fmaf(power, f, 0.693121791f);
  power = fmaf(power, f, 0.999999285f);
  return power * __int_as_float(__float_as_int(whole) << 23);
}

// 2^v for the number at `index` of a tile. Where exponentials would keep the matrix units waiting, one in SHARE is
// taken off the special function units; 0: none.
template <int SHARE>
__device__ __forceinline__ float exponential(float v, int index) {
  if constexpr (SHARE > 0)
    if (index % SHARE == SHARE - 1) return exp2_by_polynomial(v);
  return ptx::exp2(v);
}

// Which pairs of this thread are kept, whatever their logits: a bit for each of its BN / 4 columns, of both of its
// rows. Found before the tile's products are there, while registers are free and others multiply; no pair waits for the
// keys of another.
template <int BN>
struct Kept {
  static_assert(BN / 4 <= 32);
  bool masked;  // else all pairs are kept
  uint32_t bits[2] = {kAll, kAll};

  __device__ __forceinline__ Kept(const Pairs& p, int row, int col, bool may_forget) : masked(may_forget) {
    if (!masked) return;
    uint32_t inside = 0;
#pragma unroll
    for (int i = 0; i < BN / 4; i++) inside |= uint32_t(ptx::guard(column(col, i) < p.n)) << i;
#pragma unroll
    for (int h = 0; h < 2; h++) bits[h] = ptx::guard(row + 8 * h < p.m) ? inside : 0;
    if (p.drop_x) compare(p, p.drop_x, p.drop_y, row, col, not_dropped);
    if (p.only_x) compare(p, p.only_x, p.only_y, row, col, only_one);
  }

 private:
  static __device__ __forceinline__ int column(int first, int i) { return first + i / 2 * 8 + i % 2; }

  template <class Keep>
  __device__ __forceinline__ void compare(const Pairs& p, const i64* of_rows, const i64* of_cols, int row, int col,
                                          Keep keep) {
    const i64 own[2] = {of_rows[min(row, p.m - 1)], of_rows[min(row + 8, p.m - 1)]};
    constexpr int kAtOnce = 8;
#pragma unroll 1
    for (int i = 0; i < BN / 4; i += kAtOnce) {
      i64 keys[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) keys[k] = of_cols[min(column(col, i + k), p.n - 1)];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++)
#pragma unroll
        for (int h = 0; h < 2; h++) bits[h] &= ~(uint32_t(!keep(own[h], keys[k])) << (i + k));
    }
  }
};

// Adds a tile to the sums of its rows, for this thread's columns, and of its columns, for this thread's rows.
template <Link L, int BN, int SHARE>
__device__ __forceinline__ void add_tile(const Pairs& p, const Logits& to, const float (&s)[BN / 8][4], int row,
                                         int col, float shift, const Kept<BN>& kept, bool for_cols,
                                         float (&row_total)[2], float (&col_total)[BN / 8][2]) {
  if (L == Link::exp && to.plain && !kept.masked) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float offset = row_bias_of(p, to, row + 8 * h) - shift;
      row_total[h] = 0.0f;
#pragma unroll
      for (int i = 0; i < BN / 4; i++) {
        const float v = exponential<SHARE>(fmaf(s[i / 2][2 * h + i % 2], to.factor, offset), i);
        row_total[h] += v;
        if (for_cols) col_total[i / 2][i % 2] += v;
      }
    }
    return;
  }
  const bool ceilings = p.row_ceiling || p.col_ceiling;
  float row_bias[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    row_bias[h] = row_bias_of(p, to, row + 8 * h);
    row_total[h] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < BN / 4; i++) {
    const int c = col + i / 2 * 8 + i % 2;
    const float col_bias = col_bias_of(p, to, c);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float v = s[i / 2][2 * h + i % 2] * to.factor + row_bias[h] + col_bias;
      const bool forgotten = !(kept.bits[h] >> i & 1) || (ceilings && !under_ceilings(p, row + 8 * h, c, v));
      if constexpr (L == Link::exp) {
        // A sum of 0 says that no pair was kept: a kept pair gives at least the smallest number.
        v = v * to.to_base2 - shift;
        v = kept.masked ? ptx::exp2(v < -126.0f ? -126.0f : v) : ptx::exp2(v);
      } else {
        v = softplus(v);
      }
      v = forgotten ? 0.0f : v;
      row_total[h] += v;
      if (for_cols) col_total[i / 2][i % 2] += v;
    }
  }
}

// The sums of this thread's two rows over the whole tile; `kept`: whether every pair was.
template <Link L>
__device__ __forceinline__ void across_columns(float (&row_total)[2], bool all_kept) {
#pragma unroll
  for (float& total : row_total) {
    total += __shfl_xor_sync(kAll, total, 1);
    total += __shfl_xor_sync(kAll, total, 2);
    if (L == Link::exp && all_kept && total < kTiny) total = kTiny;
  }
}

// Leaves the sums of a warp's 16 rows over every column at `sums` (BN), or adds them to what is there.
template <int BN>
__device__ __forceinline__ void across_rows(const float (&col_total)[BN / 8][2], float* sums, bool add = false) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < BN / 4; i++) {
    float total = col_total[i / 2][i % 2];
    total += __shfl_xor_sync(kAll, total, 4);
    total += __shfl_xor_sync(kAll, total, 8);
    total += __shfl_xor_sync(kAll, total, 16);
    float& sum = sums[i / 2 * 8 + lane * 2 + i % 2];
    if (lane < 4) sum = add ? sum + total : total;
  }
}

// ---- gradients ------------------------------------------------------------------------------------------------------

// Writes what the weights of a column need: factors[0] its gradient or scaled gradient, factors[BN] its log-sum-exp.
template <Link L, int BN>
__device__ __forceinline__ void column_factors(float* factors, const GradSide& side, int col, const Balance& balance) {
  const Side s = side_of<L>(side.sides.col, col, side.pairs.n, balance.middle, balance.gain);
  factors[0] = L == Link::softplus || balance.wide || !side.sides.row.grad ? s.grad : s.scaled;
  factors[BN] = s.lse;
}

// What the weights of a thread's two rows need.
template <Link L>
struct RowFactors {
  Side own[2];
  float bias[2];

  __device__ __forceinline__ RowFactors(const GradSide& side, const Logits& to, int row, const Balance& balance) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      own[h] = side_of<L>(side.sides.row, row + 8 * h, side.pairs.m, balance.middle, balance.gain);
      bias[h] = row_bias_of(side.pairs, to, row + 8 * h);
    }
  }
};

// Turns inner products into weights, in place. `factors` are those of this thread's first column. Results of rows,
// where they are wanted, are added to `total`.
template <Link L, int BN, int SHARE>
__device__ __forceinline__ void weigh_tile(const GradSide& side, const Logits& to, const Balance& balance,
                                           const RowFactors<L>& rows, const float* factors, float (&w)[BN / 8][4],
                                           int row, int col, const Kept<BN>& kept, float (&total)[2]) {
  const Pairs& p = side.pairs;
  const bool of_rows = side.sides.row.grad, of_cols = side.sides.col.grad, both = of_rows && of_cols;
  const bool ceilings = p.row_ceiling || p.col_ceiling;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const Side& own = rows.own[h];
    if (L == Link::exp && to.plain && !kept.masked && of_rows && !(of_cols && balance.wide)) {
      const float offset = rows.bias[h] - (both ? balance.middle : own.lse), mine = both ? own.scaled : own.grad;
#pragma unroll
      for (int i = 0; i < BN / 4; i++) {
        float& v = w[i / 2][2 * h + i % 2];
        const float factor = both ? mine + factors[i / 2 * 8 + i % 2] : mine;
        v = exponential<SHARE>(fmaf(v, to.factor, offset), i) * factor;
      }
      continue;
    }
#pragma unroll
    for (int i = 0; i < BN / 4; i++) {
      const int at = i / 2 * 8 + i % 2, c = col + at;
      float v = w[i / 2][2 * h + i % 2] * to.factor + rows.bias[h] + col_bias_of(p, to, c);
      const bool forgotten = !(kept.bits[h] >> i & 1) || (ceilings && !under_ceilings(p, row + 8 * h, c, v));
      if constexpr (L == Link::softplus) {
        if (side.total) total[h] += forgotten ? 0.0f : softplus(v);
        const float upstream = (of_rows ? own.grad : 0.0f) + (of_cols ? factors[at] : 0.0f);
        // with no gradients at all: of the sum over all rows
        v = sigmoid(v) * (of_rows || of_cols ? upstream : balance.gain);
      } else {
        v *= to.to_base2;
        if (both && !balance.wide) {
          v = ptx::exp2(v - balance.middle) * (own.scaled + factors[at]);
        } else {
          const float of_row = of_rows ? own.grad * ptx::exp2(v - own.lse) : 0.0f;
          v = of_row + (of_cols ? factors[at] * ptx::exp2(v - factors[BN + at]) : 0.0f);
        }
      }
      w[i / 2][2 * h + i % 2] = forgotten ? 0.0f : v;
    }
  }
}

template <int BN>
__device__ __forceinline__ void add_weights(const float (&w)[BN / 8][4], bool wanted, float (&weight_total)[2]) {
  if (!wanted) return;
#pragma unroll
  for (int i = 0; i < BN / 2; i++) weight_total[i / 2 % 2] += w[i / 4][i % 4];
}

// What rounding two numbers left of them.
template <Dtype T>
__device__ __forceinline__ uint32_t rest2(float low, float high, uint32_t rounded) {
  return ptx::narrow2<T>(low - ptx::widen<T>(uint16_t(rounded)), high - ptx::widen<T>(uint16_t(rounded >> 16)));
}

// Writes weights for the products that follow. A pair of columns may be half outside, where nobody reads.
template <Dtype T, int BN>
__device__ __forceinline__ void store_weights(const Strip& strip, const Pairs& p, int row, int col,
                                              const float (&w)[BN / 8][4]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (!ptx::guard(row + 8 * h < p.m)) continue;
    uint16_t* to = static_cast<uint16_t*>(strip.weights) + (row + 8 * h) * strip.pitch + col;
#pragma unroll
    for (int b = 0; b < BN / 8; b++) {
      if (!ptx::guard(col + 8 * b < p.n)) continue;
      const float first = w[b][2 * h], second = w[b][2 * h + 1];
      const uint32_t rounded = ptx::narrow2<T>(first, second);
      *reinterpret_cast<uint32_t*>(to + 8 * b) = rounded;
      if (strip.low) *reinterpret_cast<uint32_t*>(to + strip.low + 8 * b) = rest2<T>(first, second, rounded);
    }
  }
}

// Two neighbouring accumulators of a product are 16 columns of an operand of the next.
template <Dtype T>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = ptx::narrow2<T>(low[0], low[1]);
  a[1] = ptx::narrow2<T>(low[2], low[3]);
  a[2] = ptx::narrow2<T>(high[0], high[1]);
  a[3] = ptx::narrow2<T>(high[2], high[3]);
}

// What that left of them.
template <Dtype T>
__device__ __forceinline__ void pack_rest(uint32_t (&rest)[4], const uint32_t (&a)[4], const float (&low)[4],
                                          const float (&high)[4]) {
  rest[0] = rest2<T>(low[0], low[1], a[0]);
  rest[1] = rest2<T>(low[2], low[3], a[1]);
  rest[2] = rest2<T>(high[0], high[1], a[2]);
  rest[3] = rest2<T>(high[2], high[3], a[3]);
}

// Writes the sums of weights and the results of a thread's two rows, `row` and the eighth after it.
__device__ __forceinline__ void store_totals(const GradSide& side, const Balance& balance, int row, int split,
                                             float (&weight_total)[2], float (&total)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float sums[2] = {weight_total[h], total[h]};
#pragma unroll
    for (float& v : sums) {
      v += __shfl_xor_sync(kAll, v, 1);
      v += __shfl_xor_sync(kAll, v, 2);
    }
    const int r = row + 8 * h;
    if (threadIdx.x % 4 || !ptx::guard(r < side.pairs.m)) continue;
    const i64 at = i64(split) * side.pairs.m + r;
    if (side.sum) side.sum[at] = sums[0] / balance.gain;
    if (side.total) side.total[at] = sums[1];
  }
}

// Writes features first .. first + 8 K of a thread's two rows of the gradient.
template <Dtype T, int K>
__device__ __forceinline__ void store_rows(const GradSide& side, const Balance& balance, int row, int split, int first,
                                           const float (&out)[K][4]) {
  const int depth = side.pairs.depth / (kSplit<T> ? 2 : 1), lane = threadIdx.x % 32;
  if (!side.out) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = row + 8 * h;
    if (!ptx::guard(r < side.pairs.m)) continue;
    float* to = side.out + (i64(split) * side.pairs.m + r) * depth;
#pragma unroll
    for (int d = 0; d < K; d++) {
      const int feature = first + d * 8 + lane % 4 * 2;
      if (!ptx::guard(feature < depth)) break;
      *reinterpret_cast<float2*>(to + feature) = float2{out[d][2 * h] / balance.gain, out[d][2 * h + 1] / balance.gain};
    }
  }
}

}  // namespace fastcl::cuda
