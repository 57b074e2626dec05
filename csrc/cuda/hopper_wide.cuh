// For rows too long for one block to own their gradients: tiles of 128 x 256 logits whose operands both pass by, 64
// features at a time. A tile becomes sums, or the weights of a strip of rows, which are written and then multiplied by
// the rows or columns they weigh.
#pragma once

#include "hopper.cuh"

namespace fastcl::cuda::hopper {

constexpr int kWideStages = 4, kHalfTile = 128;  // columns of a tile, or features, for each accumulator

// Shared memory: a ring of 64 features of both sides, 128 rows first, and what a kernel needs besides.
struct WideLayout {
  static constexpr int kRowsBytes = kHopperWideRows / kBox * kBoxBytes;
  static constexpr int kStageBytes = kRowsBytes + kHopperWideCols / kBox * kBoxBytes;
  static constexpr int kSums = kWideStages * kStageBytes;                       // over columns [group][warp][kHalfTile]
  static constexpr int kFactors = kSums + kComputing * kWarps * kHalfTile * 4;  // of columns [group][2][kHalfTile]
  static constexpr int kBalance = kFactors + kComputing * 2 * kHalfTile * 4;
  static constexpr int kBarriers = kBalance + 64, kBytes = kBarriers + Ring<kWideStages>::kBytes;
};

// The ring, for both roles: fill(to, barrier, step) copies a stage, and use(at, step) begins its products.
struct Steps {
  uint32_t shared;
  Ring<kWideStages> ring{shared + WideLayout::kBarriers};

  __device__ __forceinline__ uint32_t at(int stage) const { return shared + stage * WideLayout::kStageBytes; }

  template <class Fill>
  __device__ __forceinline__ void copy(int steps, Fill fill) {
    for (int step = 0; step < steps; step++, ring.next()) {
      ring.wait_empty();
      ptx::barrier_arrive_expecting(ring.full(), WideLayout::kStageBytes);
      fill(at(ring.stage), ring.full(), step);
    }
  }

  // A stage is empty when the products after its own have begun.
  template <class Use>
  __device__ __forceinline__ void multiply(int steps, float (&acc)[2][kHalfTile / 8][4], Use use) {
    const bool tells = threadIdx.x % 32 == 0;
    Ring<kWideStages> used = ring;
    for (int step = 0; step < steps; step++, ring.next()) {
      ring.wait_full();
      ptx::wgmma_fence();
      use(at(ring.stage), step);
      ptx::wgmma_commit();
      if (step == 0) continue;
      ptx::wgmma_wait<1>();
      if (tells) ptx::barrier_arrive(used.empty());
      used.next();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_keep(acc[0]);
    ptx::wgmma_keep(acc[1]);
    if (tells) ptx::barrier_arrive(used.empty());
  }
};

__device__ __forceinline__ Steps begin_steps() {
  Steps steps{ptx::shared_address(ptx::shared_memory())};
  if (threadIdx.x == 0) {
    steps.ring.init(1, kComputing * kWarps);
    ptx::barrier_publish();
  }
  __syncthreads();
  return steps;
}

// Sums as sums_kernel of sm_80, in two parts for every span of columns, or weights and their sums. A computing
// warpgroup has half of the columns and all rows of a tile.
template <Dtype T, Link L, bool WEIGHTS>
__global__ void __launch_bounds__(3 * kGroup, 1)
    hopper_wide_kernel(const __grid_constant__ ptx::TensorMap x, const __grid_constant__ ptx::TensorMap y,
                       const __grid_constant__ GradSide side, const Sums plan, const Strip strip) {
  constexpr int BN = kHalfTile;
  const Pairs& p = side.pairs;
  const int group = threadIdx.x / kGroup, warp = threadIdx.x / 32 % kWarps, lane = threadIdx.x % 32;
  unsigned char* memory = ptx::shared_memory();
  const int boxes = (p.depth + kBox - 1) / kBox;
  Balance balance{};
  if constexpr (WEIGHTS) {
    balance = balance_of<T, L, 3 * kGroup>(side.sides, p, reinterpret_cast<float*>(memory + WideLayout::kBalance));
    if (blockIdx.x == 0 && threadIdx.x == 0) *strip.gain = balance.gain;
  }
  Steps steps = begin_steps();

  if (group == kComputing) {
    ptx::fewer_registers<kCopyRegisters>();
    if (warp == 0 && lane == 0)
      each_panel<kHopperWideCols>(p, plan, [&](const Panel& at) {
        for (int row = at.first; row < at.stop; row += kHopperWideRows)
          steps.copy(boxes, [&](uint32_t to, uint32_t barrier, int box) {
            for (int r = 0; r < kHopperWideRows; r += kBox, to += kBoxBytes)
              ptx::copy_box(to, x, barrier, box * kBox, row + r);
            for (int c = 0; c < kHopperWideCols; c += kBox, to += kBoxBytes)
              ptx::copy_box(to, y, barrier, box * kBox, at.col + c);
          });
      });
  } else {
    ptx::more_registers<kComputeRegisters>();
    float* col_sums = reinterpret_cast<float*>(memory + WideLayout::kSums) + group * kWarps * BN;
    float* factors = reinterpret_cast<float*>(memory + WideLayout::kFactors) + group * 2 * BN;
    const Logits to = logits_of<L>(p);
    const float shift = !WEIGHTS && L == Link::exp ? constant_shift(plan.bounds, *p.scale, plan.room) : 0.0f;

    each_panel<kHopperWideCols>(p, plan, [&](const Panel& at) {
      const int first_col = at.col + group * BN;
      bool all_kept = false;  // by some tile that counts for the columns
      if constexpr (WEIGHTS) {
        group_sync(group);  // the panel before is done with its factors
        const int c = threadIdx.x % kGroup;
        column_factors<L, BN>(factors + c, side, first_col + c, balance);
        group_sync(group);
      }
      for (int row = at.first; row < at.stop; row += kHopperWideRows) {
        float s[2][BN / 8][4];
        steps.multiply(boxes, s, [&](uint32_t stage, int box) {
          const Operand cols = row_operand(stage + WideLayout::kRowsBytes + group * (BN / kBox) * kBoxBytes);
#pragma unroll
          for (int k = 0; k < kBox; k += 16)
#pragma unroll
            for (int m = 0; m < 2; m++)
              ptx::wgmma_shared<T, BN>(s[m], row_operand(stage + m * kBoxBytes).at(k * 2), cols.at(k * 2), box + k > 0);
        });
        const bool for_cols = plan.col_parts && !(p.symmetric && !ptx::guard(row < at.col));
#pragma unroll
        for (int m = 0; m < 2; m++) {
          ptx::wgmma_keep(s[m]);  // one after the other: the numbers of both at once take too many registers
          const int first_row = row + m * kBox, own = first_row + warp * 16 + lane / 4;
          const int own_col = int(ptx::renewed(first_col + lane % 4 * 2));
          const Kept<BN> kept(p, own, own_col, needs_mask<kBox, BN>(p, first_row, first_col));
          float total[2] = {}, col_total[BN / 8][2] = {};  // of 64 rows: there are no registers for those of a panel
          if constexpr (WEIGHTS) {
            float results[2] = {};  // not wanted
            const RowFactors<L> row_factors(side, to, own, balance);
            weigh_tile<L, BN, 0>(side, to, balance, row_factors, factors + lane % 4 * 2, s[m], own, own_col, kept,
                                 results);
            store_weights<T, BN>(strip, p, own, own_col, s[m]);
            add_weights<BN>(s[m], plan.row_parts, total);
            if (for_cols)
#pragma unroll
              for (int i = 0; i < BN / 2; i++) col_total[i / 4][i % 2] += s[m][i / 4][i % 4];
          } else {
            all_kept |= for_cols && !kept.masked;
            add_tile<L, BN, 0>(p, to, s[m], own, own_col, shift, kept, for_cols, total, col_total);
          }
          if (plan.row_parts) {
            across_columns<WEIGHTS ? Link::softplus : L>(total, !kept.masked);
            add_to_rows(plan.row_parts + i64(kComputing * at.j + group) * p.m, total, own, p.m, row < at.visited);
          }
          if (plan.col_parts) across_rows<BN>(col_total, col_sums + warp * BN, first_row > at.first);
        }
      }
      if (!plan.col_parts) return;
      group_sync(group);
      store_columns<WEIGHTS ? Link::softplus : L, BN>(p, plan, at, first_col, col_sums, all_kept);
      group_sync(group);  // before any warp writes col_sums again
    });
  }
}

// out (rows, depth) = or += weights (rows, inner) y (inner, depth), or of the transposed weights, which are (inner,
// rows) then. A block has 128 rows and 256 features of it, a computing warpgroup half of the rows.
template <Dtype T, bool TRANSPOSED>
__global__ void __launch_bounds__(3 * kGroup, 1)
    hopper_product_kernel(const __grid_constant__ ptx::TensorMap weights, const __grid_constant__ ptx::TensorMap y,
                          const Product product) {
  const int group = threadIdx.x / kGroup, warp = threadIdx.x / 32 % kWarps, lane = threadIdx.x % 32;
  const int blocks_across = (product.depth + kHopperWideCols - 1) / kHopperWideCols;
  const int row = int(blockIdx.x) / blocks_across * kHopperWideRows;
  const int feature = int(blockIdx.x) % blocks_across * kHopperWideCols, boxes = (product.inner + kBox - 1) / kBox;
  Steps steps = begin_steps();

  if (group == kComputing) {
    ptx::fewer_registers<kCopyRegisters>();
    if (warp == 0 && lane == 0)
      steps.copy(boxes, [&](uint32_t to, uint32_t barrier, int box) {
        for (int r = 0; r < kHopperWideRows; r += kBox, to += kBoxBytes)
          if constexpr (TRANSPOSED)
            ptx::copy_box(to, weights, barrier, row + r, box * kBox);
          else
            ptx::copy_box(to, weights, barrier, box * kBox, row + r);
        for (int d = 0; d < kHopperWideCols; d += kBox, to += kBoxBytes)
          ptx::copy_box(to, y, barrier, feature + d, box * kBox);
      });
  } else {
    ptx::more_registers<kComputeRegisters>();
    float s[2][kHalfTile / 8][4];
    steps.multiply(boxes, s, [&](uint32_t stage, int box) {
      const uint32_t rows = stage + group * kBoxBytes;
#pragma unroll
      for (int k = 0; k < kBox; k += 16)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const Operand features =
              column_operand(stage + WideLayout::kRowsBytes + half * (kHalfTile / kBox) * kBoxBytes, kBoxBytes);
          ptx::wgmma_shared<T, kHalfTile, TRANSPOSED, true>(
              s[half], TRANSPOSED ? column_operand(rows, kBoxBytes).at(k * 128) : row_operand(rows).at(k * 2),
              features.at(k * 128), box + k > 0);
        }
    });
    const float gain = *product.gain;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int r = row + group * kBox + warp * 16 + lane / 4 + 8 * h;
        if (!ptx::guard(r < product.rows)) continue;
#pragma unroll
        for (int d = 0; d < kHalfTile / 8; d++) {
          const int at = feature + half * kHalfTile + d * 8 + lane % 4 * 2;
          if (!ptx::guard(at < product.depth)) break;
          float2* out = reinterpret_cast<float2*>(product.out + i64(r) * product.depth + at);
          const float2 before = product.add ? *out : float2{0.0f, 0.0f};
          *out = float2{before.x + s[half][d][2 * h] / gain, before.y + s[half][d][2 * h + 1] / gain};
        }
      }
  }
}

}  // namespace fastcl::cuda::hopper
