// Gradients of rows and columns for Hopper. A block owns 128 rows of the result, its computing warpgroups 64 each. A
// tile of columns serves both products: its rows give the similarities, whose weights stay in registers, and its
// columns what they weigh.
#pragma once

#include "hopper.cuh"

namespace fastcl::cuda::hopper {

constexpr int kGradStages = 4;

// Shared memory: the block's rows, a ring of tiles of columns, their factors [stage][2][kCols], barriers, room for the
// balance.
template <int D>
struct GradLayout {
  static constexpr int kCols = hopper_grad_cols(D), kOut = D < 128 ? D : 128;  // features that one product adds to
  static constexpr int kRowsBytes = kHopperGradRows / kBox * (D / kBox) * kBoxBytes;
  static constexpr int kTileBytes = kCols / kBox * (D / kBox) * kBoxBytes;
  static constexpr int kFactors = kRowsBytes + kGradStages * kTileBytes;
  static constexpr int kBarriers = kFactors + kGradStages * 2 * kCols * 4;
  static constexpr int kBalance = kBarriers + Ring<kGradStages>::kBytes + 8, kBytes = kBalance + 3 * kGroup / 32 * 4;
};

template <Dtype T, int D, Link L>
__device__ __forceinline__ void grad_rows(const ptx::TensorMap& x, const ptx::TensorMap& y, const GradSide& side,
                                          int program) {
  using Layout = GradLayout<D>;
  constexpr int BN = Layout::kCols, OUT = Layout::kOut, BOXES = D / kBox;
  const int group = threadIdx.x / kGroup, warp = threadIdx.x / 32 % kWarps, lane = threadIdx.x % 32;
  unsigned char* memory = ptx::shared_memory();
  const uint32_t shared = ptx::shared_address(memory);
  float* factors = reinterpret_cast<float*>(memory + Layout::kFactors);
  Ring<kGradStages> tiles{shared + Layout::kBarriers};
  const uint32_t rows_full = tiles.barriers + tiles.kBytes;
  const auto tile_at = [&](int stage) { return shared + Layout::kRowsBytes + stage * Layout::kTileBytes; };
  if (threadIdx.x == 0) {
    tiles.init(1 + 32, kComputing * kWarps);
    ptx::barrier_init(rows_full, 1);
    ptx::barrier_publish();
  }
  __syncthreads();
  const Pairs& p = side.pairs;
  const Balance balance =
      balance_of<T, L, 3 * kGroup>(side.sides, p, reinterpret_cast<float*>(memory + Layout::kBalance));
  const int row = program % side.blocks * kHopperGradRows, split = program / side.blocks;
  const int tile_count = (p.n + BN - 1) / BN, each = (tile_count + side.splits - 1) / side.splits;
  const int begin = split * each * BN, end = min(begin + each * BN, p.n);  // no split is empty

  if (group == kComputing) {
    ptx::fewer_registers<kCopyRegisters>();
    const auto copy = [&](uint32_t to, const ptx::TensorMap& from, uint32_t barrier, int first, int count) {
      ptx::barrier_arrive_expecting(barrier, count / kBox * BOXES * kBoxBytes);
      for (int box = 0; box < BOXES; box++)
        for (int r = 0; r < count; r += kBox, to += kBoxBytes) ptx::copy_box(to, from, barrier, box * kBox, first + r);
    };
    if (warp == 0 && lane == 0) {
      copy(shared, x, rows_full, row, kHopperGradRows);
      for (int col = begin; col < end; col += BN, tiles.next()) {
        tiles.wait_empty();
        copy(tile_at(tiles.stage), y, tiles.full(), col, BN);
      }
    } else if (warp == 1) {
      for (int col = begin; col < end; col += BN, tiles.next()) {
        tiles.wait_empty();
        float* to = factors + tiles.stage * 2 * BN;
        for (int c = lane; side.sides.col.grad && c < BN; c += 32)
          column_factors<L, BN>(to + c, side, col + c, balance);
        ptx::barrier_arrive(tiles.full());
      }
    }
  } else {
    ptx::more_registers<kComputeRegisters>();
    const int group_row = row + group * kBox, own = group_row + warp * 16 + lane / 4;
    const Logits to = logits_of<L>(p);
    const RowFactors<L> row_factors(side, to, own, balance);
    float out[D / OUT][OUT / 8][4] = {}, w[BN / 8][4], weight_total[2] = {}, total[2] = {};
    uint32_t weights[BN / 16][4];

    const auto multiply = [&](int stage) {  // w = the similarities of the tile
      const Operand own_rows = row_operand(ptx::renewed(shared) + group * kBoxBytes),
                    tile = row_operand(tile_at(stage));
#pragma unroll
      for (int k = 0; k < D; k += 16) {
        const int box = k / kBox, in_box = k % kBox * 2;
        ptx::wgmma_shared<T, BN>(w, own_rows.at(box * (kHopperGradRows / kBox) * kBoxBytes + in_box),
                                 tile.at(box * (BN / kBox) * kBoxBytes + in_box), k > 0);
      }
    };
    const auto accumulate = [&](int stage) {            // out += the weighted rows of the tile
      constexpr int kFeatures = BN / kBox * kBoxBytes;  // from 64 features to the next
      const Operand tile = column_operand(tile_at(stage), kFeatures);
#pragma unroll
      for (int k = 0; k < BN; k += 16)
#pragma unroll
        for (int d = 0; d < D; d += OUT)
          ptx::wgmma_registers<T, OUT>(out[d / OUT], weights[k / 16], tile.at(d / kBox * kFeatures + k * 128), true);
    };
    const auto turn = [&](auto products) {
      wait_for_turn(group);
      ptx::wgmma_fence();
      products();
      ptx::wgmma_commit();
      pass_turn(group);
      ptx::wgmma_wait<0>();
      ptx::wgmma_keep(w);
#pragma unroll
      for (auto& part : out) ptx::wgmma_keep(part);
    };

    const auto kept_of = [&](int col) {
      return Kept<BN>(p, own, col + lane % 4 * 2, needs_mask<kBox, BN>(p, group_row, col));
    };

    if (group == 1) pass_turn(group);
    Kept<BN> kept = kept_of(begin);
    ptx::barrier_wait(rows_full, 0);
    tiles.wait_full();
    turn([&] { multiply(0); });
    for (int col = begin;;) {
      weigh_tile<L, BN, kShare<D>>(side, to, balance, row_factors, factors + tiles.stage * 2 * BN + lane % 4 * 2, w,
                                   own, col + lane % 4 * 2, kept, total);
      add_weights<BN>(w, side.sum, weight_total);
#pragma unroll
      for (int k = 0; k < BN / 16; k++) pack_operand<T>(weights[k], w[2 * k], w[2 * k + 1]);
      const Ring<kGradStages> weighed = tiles;
      tiles.next();
      col += BN;
      if (col >= end) {
        turn([&] { accumulate(weighed.stage); });
        break;
      }
      kept = kept_of(col);
      tiles.wait_full();
      turn([&] {
        accumulate(weighed.stage);
        multiply(tiles.stage);
      });
      if (lane == 0) ptx::barrier_arrive(weighed.empty());
    }
    store_totals(side, balance, own, split, weight_total, total);
#pragma unroll
    for (int d = 0; d < D; d += OUT) store_rows<T>(side, balance, own, split, d, out[d / OUT]);
  }
}

// Blocks take the rows, and after them the columns, which are the rows of the transposed matrix.
template <Dtype T, int D, Link L>
__global__ void __launch_bounds__(3 * kGroup, 1)
    hopper_grad_kernel(const __grid_constant__ ptx::TensorMap x, const __grid_constant__ ptx::TensorMap y,
                       const __grid_constant__ GradSide rows, const __grid_constant__ GradSide cols) {
  const int of_rows = rows.blocks * rows.splits;
  const bool is_row = int(blockIdx.x) < of_rows;
  grad_rows<T, D, L>(is_row ? x : y, is_row ? y : x, is_row ? rows : cols, blockIdx.x - (is_row ? 0 : of_rows));
}

}  // namespace fastcl::cuda::hopper
