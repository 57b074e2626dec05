// Gradients of rows and columns, for sm_80 and later. It is attention's forward with one matrix for keys and values: a block
// owns 64 rows of the result, a tile of columns is read once and serves both products, and the weights between them never
// leave the registers. Too few blocks for the device: columns are split, and the splits are added afterwards, in order.
#pragma once

#include "sides.cuh"

namespace fastcl::cuda {

// Rows, two tiles of columns, what a column's weight needs, and room for the balance.
template <int D>
constexpr int kGradShared =
    kTileBytes<kGradRows, D> + 2 * kTileBytes<kGradCols<D>, D> + 2 * 2 * kGradCols<D> * 4 + kWarps * 4;

template <Dtype T, int D, Link L>
__device__ __forceinline__ void grad_rows(const GradSide& side, int program) {
  constexpr int BM = kGradRows, BN = kGradCols<D>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned char* shared = ptx::shared_memory();
  const uint32_t q = ptx::shared_address(shared), tiles = q + kTileBytes<BM, D>;
  float* col_sides = reinterpret_cast<float*>(shared + kTileBytes<BM, D> + 2 * kTileBytes<BN, D>);  // [2][2][BN]
  const Pairs& p = side.pairs;
  const Sides& sides = side.sides;
  const int row = program % side.blocks * BM, split = program / side.blocks;
  const auto [middle, wide, gain] = balance_of<T, L>(sides, p, col_sides + 2 * 2 * BN);
  const float scale = *p.scale;
  const bool of_rows = sides.row.grad, of_cols = sides.col.grad;
  const bool base2 = L == Link::exp && !p.row_ceiling && !p.col_ceiling;
  const float unit = base2 ? kLog2E : 1.0f, to_base2 = base2 ? 1.0f : kLog2E, factor = scale * unit;

  float out[D / 8][4] = {}, weight_total[2] = {}, total[2] = {}, row_bias[2];
  Side own[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = row + warp * 16 + lane / 4 + 8 * h;
    own[h] = side_of<L>(sides.row, r, p.m, middle, gain);
    row_bias[h] = p.row_bias && ptx::bound(r < p.m) ? p.row_bias[r] * unit : 0.0f;
  }
  const int tile_count = (p.n + BN - 1) / BN, each = (tile_count + side.splits - 1) / side.splits;
  // no split is empty
  const int begin = split * each * BN, end = min(begin + each * BN, p.n);
  copy_rows<BM, D>(q, p.x, row, p.m, p.depth);
  copy_rows<BN, D>(tiles, p.y, begin, p.n, p.depth);
  ptx::cp_async_commit();
  for (int col = begin, stage = 0; col < end; col += BN, stage ^= 1) {
    if (col + BN < end) {
      copy_rows<BN, D>(tiles + (stage ^ 1) * kTileBytes<BN, D>, p.y, col + BN, p.n, p.depth);
      ptx::cp_async_commit();
    }
    // What the weights of a column need: its gradient, and its scaled gradient or its log-sum-exp.
    float* factors = col_sides + stage * 2 * BN;
    if (of_cols && threadIdx.x < BN) {
      const Side s = side_of<L>(sides.col, col + threadIdx.x, p.n, middle, gain);
      factors[threadIdx.x] = L == Link::softplus || wide || !of_rows ? s.grad : s.scaled;
      factors[BN + threadIdx.x] = s.lse;
    }
    if (col + BN < end)
      ptx::cp_async_wait<1>();
    else
      ptx::cp_async_wait<0>();
    __syncthreads();
    const uint32_t tile = tiles + stage * kTileBytes<BN, D>;
    float w[BN / 8][4];
    products<T, D, BN>(w, q, tile);
    const bool masked = needs_mask<BM, BN>(p, row, col);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int b = 0; b < BN / 8; b++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int r = row + warp * 16 + lane / 4 + 8 * h, at = b * 8 + lane % 4 * 2 + e, c = col + at;
          float v = w[b][2 * h + e] * factor + row_bias[h];
          if (p.col_bias) v += ptx::bound(c < p.n) ? p.col_bias[c] * unit : 0.0f;
          const bool forgotten = masked && !kept(p, r, c, v);
          if constexpr (L == Link::softplus) {
            if (side.total && !forgotten) total[h] += softplus(v);
            const float both = (of_rows ? own[h].grad : 0.0f) + (of_cols ? factors[at] : 0.0f);
            v = sigmoid(v) * (of_rows || of_cols ? both : gain);  // with no gradients at all: of the sum over all rows
          } else {
            v *= to_base2;
            if (of_rows && of_cols)
              v = wide ? own[h].grad * ptx::exp2(v - own[h].lse) + factors[at] * ptx::exp2(v - factors[BN + at])
                       : ptx::exp2(v - middle) * (own[h].scaled + factors[at]);
            else
              v = of_rows ? own[h].grad * ptx::exp2(v - own[h].lse) : factors[at] * ptx::exp2(v - factors[BN + at]);
          }
          v = forgotten ? 0.0f : v;
          weight_total[h] += v;
          w[b][2 * h + e] = v;
        }
    if (side.out) {
      // Two neighbouring accumulators of the first product are one operand of the second.
#pragma unroll
      for (int k = 0; k < BN; k += 16) {
        const float(&low)[4] = w[k / 8], (&high)[4] = w[k / 8 + 1];
        const uint32_t a[4] = {ptx::narrow2<T>(low[0], low[1]), ptx::narrow2<T>(low[2], low[3]),
                               ptx::narrow2<T>(high[0], high[1]), ptx::narrow2<T>(high[2], high[3])};
#pragma unroll
        for (int d = 0; d < D; d += 16) {
          uint32_t y[4];
          ptx::ldmatrix_x4_trans(y, tile + ((k + lane % 16) * kPitch<D> + d + lane / 16 * 8) * 2);
          ptx::mma_m16n8k16<T>(out[d / 8], a, y[0], y[1]);
          ptx::mma_m16n8k16<T>(out[d / 8 + 1], a, y[2], y[3]);
        }
      }
    }
    __syncthreads();  // the tile and the factors may be overwritten now
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = row + warp * 16 + lane / 4 + 8 * h;
    float sums[2] = {weight_total[h], total[h]};
#pragma unroll
    for (float& v : sums) {
      v += __shfl_xor_sync(kAll, v, 1);
      v += __shfl_xor_sync(kAll, v, 2);
    }
    if (!ptx::guard(r < p.m)) continue;
    const i64 at = i64(split) * p.m + r;
    if (side.sum && lane % 4 == 0) side.sum[at] = sums[0] / gain;
    if (side.total && lane % 4 == 0) side.total[at] = sums[1];
    if (!side.out) continue;
#pragma unroll
    for (int d = 0; d < D; d += 8) {
      const int feature = d + lane % 4 * 2;
      if (!ptx::guard(feature < p.depth)) break;
      *reinterpret_cast<float2*>(side.out + at * p.depth + feature) =
          float2{out[d / 8][2 * h] / gain, out[d / 8][2 * h + 1] / gain};
    }
  }
}

// Blocks take the rows, and after them the columns, which are the rows of the transposed matrix.
template <Dtype T, int D, Link L>
__global__ void __launch_bounds__(kThreads) grad_kernel(const __grid_constant__ GradSide rows,
                                                        const __grid_constant__ GradSide cols) {
  const int of_rows = rows.blocks * rows.splits;
  const bool is_row = int(blockIdx.x) < of_rows;
  grad_rows<T, D, L>(is_row ? rows : cols, blockIdx.x - (is_row ? 0 : of_rows));
}

}  // namespace fastcl::cuda
