// Sums over rows, and in the same pass over columns, for sm_80 and later: mma.sync and cp.async.
#pragma once

#include "panels.cuh"

namespace fastcl::cuda {

template <int D>
constexpr int kSumsShared = kTileBytes<kSumsCols<D>, D> + 2 * kTileBytes<kSumsRows, D> + kWarps * kSumsCols<D> * 4;

// Sums over rows are added to this unit's part in memory, which each row's own thread does, those over columns stay in
// registers while a panel does; off the diagonal of one set they are those of the mirrored rows. The diagonal units
// leave them in a part of their own, the last. Nothing is atomic, and all orders are fixed.
template <Dtype T, int D, Link L>
__global__ void __launch_bounds__(kThreads) sums_kernel(const Pairs p, const Sums plan) {
  constexpr int BM = kSumsRows, BN = kSumsCols<D>;
  static_assert(BN % BM == 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned char* shared = ptx::shared_memory();
  const uint32_t panel = ptx::shared_address(shared), tiles = panel + kTileBytes<BN, D>;
  float* col_sums = reinterpret_cast<float*>(shared + kTileBytes<BN, D> + 2 * kTileBytes<BM, D>);  // [kWarps][BN]
  const Logits to = logits_of<L>(p);
  const float shift = L == Link::exp ? constant_shift(plan.bounds, *p.scale, plan.room) : 0.0f;

  each_panel<BN>(p, plan, [&](const Panel& at) {
    float col_total[BN / 8][2] = {};
    bool all_kept = false;  // by some tile that counts for the columns
    copy_rows<BN, D>(panel, p.y, at.col, p.n, p.depth);
    copy_rows<BM, D>(tiles, p.x, at.first, p.m, p.depth);
    ptx::cp_async_commit();
    for (int row = at.first, stage = 0; row < at.stop; row += BM, stage ^= 1) {
      if (row + BM < at.stop) {
        copy_rows<BM, D>(tiles + (stage ^ 1) * kTileBytes<BM, D>, p.x, row + BM, p.m, p.depth);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
      } else {
        ptx::cp_async_wait<0>();
      }
      __syncthreads();
      const int own = row + warp * 16 + lane / 4, own_col = at.col + lane % 4 * 2;
      const Kept<BN> kept(p, own, own_col, needs_mask<BM, BN>(p, row, at.col));
      float s[BN / 8][4], total[2];
      products<T, D, BN>(s, tiles + stage * kTileBytes<BM, D>, panel);
      const bool for_cols = plan.col_parts && !(p.symmetric && !ptx::guard(row < at.col));
      all_kept |= for_cols && !kept.masked;
      add_tile<L, BN, 0>(p, to, s, own, own_col, shift, kept, for_cols, total, col_total);
      across_columns<L>(total, !kept.masked);
      add_to_rows(plan.row_parts + i64(at.j) * p.m, total, own, p.m, row < at.visited);
      __syncthreads();  // the tile may be overwritten now
    }
    if (!plan.col_parts) return;
    across_rows<BN>(col_total, col_sums + warp * BN);
    __syncthreads();
    float* part = plan.col_parts + i64(p.symmetric && at.i == at.j ? plan.row_spans : at.i) * p.n + at.col;
    add_warps<L, BN>(col_sums, p.n - at.col, all_kept, [&](int c, float total) { part[c] = total; });
    // The next panel's first barrier comes before anyone writes col_sums again.
  });
}

}  // namespace fastcl::cuda
