// Gradients of rows and columns, for sm_80 and later. It is attention's forward with one matrix for keys and values: a
// block owns 64 rows of the result, a tile of columns is read once and serves both products, and the weights between
// them never leave the registers. Too few blocks for the device: columns are split, and the splits are added
// afterwards, in order.
#pragma once

#include "tile.cuh"

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
  const int row = program % side.blocks * BM, split = program / side.blocks;
  const int first_row = row + warp * 16 + lane / 4;
  const Balance balance = balance_of<T, L>(side.sides, p, col_sides + 2 * 2 * BN);
  const Logits to = logits_of<L>(p);
  const RowFactors<L> row_factors(side, to, first_row, balance);

  float out[D / (kSplit<T> ? 16 : 8)][4] = {}, weight_total[2] = {}, total[2] = {};
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
    float* factors = col_sides + stage * 2 * BN;
    if (side.sides.col.grad && threadIdx.x < BN)
      column_factors<L, BN>(factors + threadIdx.x, side, col + threadIdx.x, balance);
    if (col + BN < end)
      ptx::cp_async_wait<1>();
    else
      ptx::cp_async_wait<0>();
    __syncthreads();
    const uint32_t tile = tiles + stage * kTileBytes<BN, D>;
    const int own_col = int(ptx::renewed(col + lane % 4 * 2));
    const Kept<BN> kept(p, first_row, own_col, needs_mask<BM, BN>(p, row, col));
    float w[BN / 8][4];
    products<T, D, BN>(w, q, tile);
    weigh_tile<L, BN, 0>(side, to, balance, row_factors, factors + lane % 4 * 2, w, first_row, own_col, kept, total);
    add_weights<BN>(w, side.sum, weight_total);
    if (side.out) {
#pragma unroll
      for (int k = 0; k < BN; k += 16) {
        uint32_t a[4], rest[4];
        pack_operand<kOperand<T>>(a, w[k / 8], w[k / 8 + 1]);
        if constexpr (kSplit<T>) pack_rest<kOperand<T>>(rest, a, w[k / 8], w[k / 8 + 1]);
#pragma unroll
        for (int d = 0; d < D; d += 16) {
          uint32_t y[4];
          ptx::ldmatrix_x4_trans(y, tile + ((k + lane % 16) * kPitch<D> + d + lane / 16 * 8) * 2);
          if constexpr (kSplit<T>) {  // the high and the low parts of eight features
            ptx::mma_m16n8k16<kOperand<T>>(out[d / 16], rest, y[0], y[1]);
            ptx::mma_m16n8k16<kOperand<T>>(out[d / 16], a, y[2], y[3]);
            ptx::mma_m16n8k16<kOperand<T>>(out[d / 16], a, y[0], y[1]);
          } else {
            ptx::mma_m16n8k16<T>(out[d / 8], a, y[0], y[1]);
            ptx::mma_m16n8k16<T>(out[d / 8 + 1], a, y[2], y[3]);
          }
        }
      }
    }
    __syncthreads();  // the tile and the factors may be overwritten now
  }
  store_totals(side, balance, first_row, split, weight_total, total);
  store_rows<T>(side, balance, first_row, split, 0, out);
}

// Blocks take the rows, and after them the columns, which are the rows of the transposed matrix.
template <Dtype T, int D, Link L>
__global__ void __launch_bounds__(kThreads)
    grad_kernel(const __grid_constant__ GradSide rows, const __grid_constant__ GradSide cols) {
  const int of_rows = rows.blocks * rows.splits;
  const bool is_row = int(blockIdx.x) < of_rows;
  grad_rows<T, D, L>(is_row ? rows : cols, blockIdx.x - (is_row ? 0 : of_rows));
}

}  // namespace fastcl::cuda
