// Sums over rows, and in the same pass over columns, for Hopper: wgmma and the copy engine.
#pragma once

#include "hopper.cuh"

namespace fastcl::cuda::hopper {

// A panel has two halves, one for each computing warpgroup, in which its column sums grow; both read the same tiles of
// rows.
constexpr int kHalf = 128, kTiles = 8;
template <int D>
constexpr int kHalfBytes = kHalf / kBox * (D / kBox) * kBoxBytes;

// Shared memory: both halves, a ring of boxes of the tiles, sums over columns [group][warp][kHalf], barriers.
template <int D>
struct SumsLayout {
  static constexpr int kRing = kComputing * kHalfBytes<D>, kSums = kRing + kTiles * kBoxBytes;
  static constexpr int kBarriers = kSums + kComputing * kWarps * kHalf * 4;
  static constexpr int kBytes = kBarriers + Ring<kTiles>::kBytes + kComputing * Ring<1>::kBytes;
};

// As sums_kernel of sm_80; there are two parts for every span of columns, one of each warpgroup.
template <Dtype T, int D, Link L>
__global__ void __launch_bounds__(3 * kGroup, 1)
    hopper_sums_kernel(const __grid_constant__ ptx::TensorMap x, const __grid_constant__ ptx::TensorMap y,
                       const Pairs p, const Sums plan) {
  using Layout = SumsLayout<D>;
  constexpr int BN = kHalf, BOXES = D / kBox;
  const int group = threadIdx.x / kGroup, warp = threadIdx.x / 32 % kWarps, lane = threadIdx.x % 32;
  unsigned char* memory = ptx::shared_memory();
  const uint32_t shared = ptx::shared_address(memory);
  Ring<kTiles> tiles{shared + Layout::kBarriers};
  const auto half_ring = [&](int half) { return Ring<1>{tiles.barriers + tiles.kBytes + half * Ring<1>::kBytes}; };
  const auto box_of_tile = [&] { return shared + Layout::kRing + tiles.stage * kBoxBytes; };
  if (threadIdx.x == 0) {
    tiles.init(1, kComputing * kWarps);
    for (int half = 0; half < kComputing; half++) half_ring(half).init(1, kWarps);
    ptx::barrier_publish();
  }
  __syncthreads();

  if (group == kComputing) {
    ptx::fewer_registers<kCopyRegisters>();
    if (warp == 0 && lane == 0) {
      each_panel<kComputing * kHalf>(p, plan, [&](const Panel& at) {
        for (int row = at.first; row < at.stop; row += kBox)
          for (int box = 0; box < BOXES; box++, tiles.next()) {
            tiles.wait_empty();
            ptx::barrier_arrive_expecting(tiles.full(), kBoxBytes);
            ptx::copy_box(box_of_tile(), x, tiles.full(), box * kBox, row);
          }
      });
    } else if (warp <= kComputing && lane == 0) {
      const int half = warp - 1;
      Ring<1> ring = half_ring(half);
      each_panel<kComputing * kHalf>(p, plan, [&](const Panel& at) {
        ring.wait_empty();
        ptx::barrier_arrive_expecting(ring.full(), kHalfBytes<D>);
        uint32_t to = shared + half * kHalfBytes<D>;
        for (int box = 0; box < BOXES; box++)
          for (int row = 0; row < kHalf; row += kBox, to += kBoxBytes)
            ptx::copy_box(to, y, ring.full(), box * kBox, at.col + half * kHalf + row);
        ring.next();
      });
    }
  } else {
    ptx::more_registers<kComputeRegisters>();
    Ring<1> half = half_ring(group);
    const Operand panel = row_operand(shared + group * kHalfBytes<D>);
    float* col_sums = reinterpret_cast<float*>(memory + Layout::kSums) + group * kWarps * kHalf;
    Logits to = logits_of<L>(p);
    const float shift = L == Link::exp ? constant_shift(plan.bounds, *p.scale, plan.room) : 0.0f;
    to.plain = to.plain && shift < kLargestShift;  // else exponents may be too large for polynomials
    if (group == 1) pass_turn(group);

    each_panel<kComputing * kHalf>(p, plan, [&](const Panel& at) {
      const int first_col = at.col + group * kHalf;
      float col_total[BN / 8][2] = {};
      bool all_kept = false;  // by some tile that counts for the columns
      half.wait_full();
      for (int row = at.first; row < at.stop; row += kBox) {
        const int own = row + warp * 16 + lane / 4, own_col = first_col + lane % 4 * 2;
        const Kept<BN> kept(p, own, own_col, needs_mask<kBox, BN>(p, row, first_col));
        Ring<kTiles> used = tiles;
        float s[BN / 8][4], total[2];
        wait_for_turn(group);
#pragma unroll
        for (int box = 0; box < BOXES; box++) {
          tiles.wait_full();
          ptx::wgmma_fence();
          const Operand tile = row_operand(box_of_tile());
#pragma unroll
          for (int k = 0; k < kBox; k += 16)
            ptx::wgmma_shared<T, BN>(s, tile.at(k * 2), panel.at(box * (kHalf / kBox) * kBoxBytes + k * 2),
                                     box + k > 0);
          tiles.next();
        }
        ptx::wgmma_commit();
        pass_turn(group);
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(s);
        if (lane == 0) {
          for (int box = 0; box < BOXES; box++, used.next()) ptx::barrier_arrive(used.empty());
          if (row + kBox >= at.stop) ptx::barrier_arrive(half.empty());
        }
        const bool for_cols = plan.col_parts && !(p.symmetric && !ptx::guard(row < at.col));
        all_kept |= for_cols && !kept.masked;
        add_tile<L, BN, kShare<D>>(p, to, s, own, own_col, shift, kept, for_cols, total, col_total);
        across_columns<L>(total, !kept.masked);
        add_to_rows(plan.row_parts + i64(kComputing * at.j + group) * p.m, total, own, p.m, row < at.visited);
      }
      half.next();
      if (!plan.col_parts) return;
      across_rows<BN>(col_total, col_sums + warp * BN);
      group_sync(group);
      store_columns<L, BN>(p, plan, at, first_col, col_sums, all_kept);
      // The next turn comes before any warp writes col_sums again.
    });
  }
}

}  // namespace fastcl::cuda::hopper
