// Sums over rows, and in the same pass over columns, for sm_80 and later: mma.sync and cp.async.
#pragma once

#include "pairs.cuh"

namespace fastcl::cuda {

template <int D>
constexpr int kSumsShared = kTileBytes<kSumsCols<D>, D> + 2 * kTileBytes<kSumsRows, D> + kWarps * kSumsCols<D> * 4;

// A unit is a span of rows times a span of columns. A panel of BN columns stays, tiles of BM rows pass by: sums over rows
// are added to this unit's part in memory, which each row's own thread does, those over columns stay in registers. One set
// visits the units and tiles of its upper triangle; off the diagonal the sums over columns are those of the mirrored rows.
// The diagonal units leave them in a part of their own, the last. Nothing is atomic, and all orders are fixed.
template <Dtype T, int D, Link L>
__global__ void __launch_bounds__(kThreads) sums_kernel(const Pairs p, const Sums plan) {
  constexpr int BM = kSumsRows, BN = kSumsCols<D>, SQUARE = BM > BN ? BM : BN;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned char* shared = ptx::shared_memory();
  const uint32_t panel = ptx::shared_address(shared), tiles = panel + kTileBytes<BN, D>;
  float* col_sums = reinterpret_cast<float*>(shared + kTileBytes<BN, D> + 2 * kTileBytes<BM, D>);  // [kWarps][BN]
  const float scale = *p.scale;
  const float shift = L == Link::exp ? constant_shift(plan.bounds, scale, plan.room) : 0.0f;
  // Natural logits are needed by ceilings and softplus only; otherwise one multiplication gives those of base 2.
  const bool base2 = L == Link::exp && !p.row_ceiling && !p.col_ceiling;
  const float unit = base2 ? kLog2E : 1.0f, to_base2 = base2 ? 1.0f : kLog2E, factor = scale * unit;

  for (int index = blockIdx.x; index < plan.units; index += gridDim.x) {
    int i, j;
    if (p.symmetric) {  // index = j (j + 1) / 2 + i with i <= j
      j = int((sqrtf(8.0f * index + 1.0f) - 0.99f) * 0.5f);
      i = index - j * (j + 1) / 2;
    } else {
      j = index / plan.row_spans;
      i = index % plan.row_spans;
    }
    const int first = i * plan.row_span, last = min(first + plan.row_span, p.m);
    float* row_part = plan.row_parts + i64(j) * p.m;
    int visited = first;  // rows of the span before this one have sums of earlier panels
    for (int col = j * plan.col_span; col < min((j + 1) * plan.col_span, p.n); col += BN) {
      const int stop = p.symmetric ? min(last, (col / SQUARE + 1) * SQUARE) : last;
      float col_total[BN / 8][2] = {};
      bool all_kept = false;  // by some tile that counts for the columns
      copy_rows<BN, D>(panel, p.y, col, p.n, p.depth);
      copy_rows<BM, D>(tiles, p.x, first, p.m, p.depth);
      ptx::cp_async_commit();
      for (int row = first, stage = 0; row < stop; row += BM, stage ^= 1) {
        if (row + BM < stop) {
          copy_rows<BM, D>(tiles + (stage ^ 1) * kTileBytes<BM, D>, p.x, row + BM, p.m, p.depth);
          ptx::cp_async_commit();
          ptx::cp_async_wait<1>();
        } else {
          ptx::cp_async_wait<0>();
        }
        __syncthreads();
        float s[BN / 8][4];
        products<T, D, BN>(s, tiles + stage * kTileBytes<BM, D>, panel);
        const bool masked = needs_mask<BM, BN>(p, row, col);
        // pairs of a square on the diagonal are seen from both of their sides already
        const bool off_diagonal = !p.symmetric || ptx::guard(row / SQUARE != col / SQUARE);
        const bool for_cols = plan.col_parts && off_diagonal;
        all_kept |= for_cols && !masked;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int r = row + warp * 16 + lane / 4 + 8 * h;
          const float row_bias = p.row_bias && ptx::bound(r < p.m) ? p.row_bias[r] * unit : 0.0f;
          float total = 0.0f;
#pragma unroll
          for (int b = 0; b < BN / 8; b++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const int c = col + b * 8 + lane % 4 * 2 + e;
              float v = s[b][2 * h + e] * factor + row_bias;
              if (p.col_bias) v += ptx::bound(c < p.n) ? p.col_bias[c] * unit : 0.0f;
              const bool forgotten = masked && !kept(p, r, c, v);
              if constexpr (L == Link::exp) {
                // A sum of 0 says that no pair was kept: a kept pair gives at least the smallest number.
                v = v * to_base2 - shift;
                v = masked ? ptx::exp2(v < -126.0f ? -126.0f : v) : ptx::exp2(v);
              } else {
                v = softplus(v);
              }
              v = forgotten ? 0.0f : v;
              total += v;
              if (for_cols) col_total[b][e] += v;
            }
          total += __shfl_xor_sync(kAll, total, 1);
          total += __shfl_xor_sync(kAll, total, 2);
          if (L == Link::exp && !masked && total < kTiny) total = kTiny;
          if (lane % 4 == 0 && ptx::guard(r < p.m)) row_part[r] = total + (row < visited ? row_part[r] : 0.0f);
        }
        __syncthreads();  // the tile may be overwritten now
      }
      visited = stop;
      if (!plan.col_parts) continue;
#pragma unroll
      for (int b = 0; b < BN / 8; b++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float total = col_total[b][e];
          total += __shfl_xor_sync(kAll, total, 4);
          total += __shfl_xor_sync(kAll, total, 8);
          total += __shfl_xor_sync(kAll, total, 16);
          if (lane < 4) col_sums[warp * BN + b * 8 + lane * 2 + e] = total;
        }
      __syncthreads();
      float* col_part = plan.col_parts + i64(p.symmetric && i == j ? plan.row_spans : i) * p.n;
      for (int c = threadIdx.x; c < BN && ptx::guard(col + c < p.n); c += kThreads) {
        float total = 0.0f;
        for (int w = 0; w < kWarps; w++) total += col_sums[w * BN + c];
        if (L == Link::exp && all_kept && total < kTiny) total = kTiny;
        col_part[col + c] = total;
      }
      // The next panel's first barrier comes before anyone writes col_sums again.
    }
  }
}

}  // namespace fastcl::cuda
