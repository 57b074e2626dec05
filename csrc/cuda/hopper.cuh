// What Hopper's kernels share. A block is three warpgroups: two compute, on 64 rows each, and one copies ahead of them,
// by the copy engine, a box of 64 rows and 64 features at a time. Barriers in shared memory tell when a copy has landed
// and when its place is free again.
#pragma once

#include "panels.cuh"

namespace fastcl::cuda::hopper {

constexpr int kGroup = 128, kComputing = 2;
constexpr int kBox = 64, kBoxBytes = kBox * kBox * 2;
// Registers of a thread: 65,536 are for three warpgroups, and the one that copies needs few.
constexpr int kCopyRegisters = 40, kComputeRegisters = 232;

// Where wgmma finds an operand: boxes in the 128-byte swizzle, eight rows of 128 bytes in 1,024.
struct Operand {
  uint32_t low;
  __device__ __forceinline__ uint64_t at(int bytes) const { return uint64_t(0x40000040) << 32 | (low + bytes / 16); }
};
// Rows of 64 features, any number of which may follow each other.
__device__ __forceinline__ Operand row_operand(uint32_t address) { return {1 << 16 | address / 16}; }
// Their transpose, in which features 64 and on begin `next` bytes later.
__device__ __forceinline__ Operand column_operand(uint32_t address, int next) {
  return {uint32_t(next / 16 << 16) | address / 16};
}

// Places that are filled and emptied in turn. The one who fills and those who empty them walk along, each with a copy.
template <int STAGES>
struct Ring {
  uint32_t barriers;  // of full places, then of empty ones
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t full() const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty() const { return barriers + 8 * (STAGES + stage); }
  __device__ __forceinline__ void wait_full() const { ptx::barrier_wait(full(), parity); }
  __device__ __forceinline__ void wait_empty() const { ptx::barrier_wait(empty(), parity ^ 1); }
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  // By one thread, before all begin. Every computing warp says of a place that it is empty.
  __device__ __forceinline__ void init(int fillers, int warps) const {
    for (int i = 0; i < STAGES; i++) {
      ptx::barrier_init(barriers + 8 * i, fillers);
      ptx::barrier_init(barriers + 8 * (STAGES + i), warps);
    }
  }
  static constexpr int kBytes = 2 * STAGES * 8;
};

// The computing warpgroups take turns at the matrix units, so that one multiplies while the other takes exponentials.
__device__ __forceinline__ void wait_for_turn(int group) { ptx::named_wait(1 + group, kComputing * kGroup); }
__device__ __forceinline__ void pass_turn(int group) { ptx::named_arrive(1 + (group ^ 1), kComputing * kGroup); }

// Barriers of one computing warpgroup.
__device__ __forceinline__ void group_sync(int group) { ptx::named_wait(1 + kComputing + group, kGroup); }

// How many of the exponentials of a tile are taken by polynomials: at 128 features they keep up with the products
// barely, at 64 not.
template <int D>
constexpr int kShare = D > 128  ? 0
                       : D > 64 ? 8
                                : 4;

// The sums over a warpgroup's columns of a panel, as add_warps. Of one set, the second of a span's two parts is the
// other warpgroup's, which has no sums for these columns.
template <Link L, int BN>
__device__ __forceinline__ void store_columns(const Pairs& p, const Sums& plan, const Panel& at, int first_col,
                                              const float* sums, bool all_kept) {
  const bool two_parts = p.symmetric && at.i != at.j;
  const int number = p.symmetric ? kComputing * (at.i == at.j ? plan.row_spans : at.i) : at.i;
  float* part = plan.col_parts + i64(number) * p.n + first_col;
  add_warps<L, BN>(sums, p.n - first_col, all_kept, [&](int c, float total) {
    part[c] = total;
    if (two_parts) part[p.n + c] = 0.0f;
  });
}

}  // namespace fastcl::cuda::hopper
