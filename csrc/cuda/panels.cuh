// How sums walk the matrix. A unit is a span of rows times a span of columns. A panel of columns stays, tiles of rows
// pass by. One set visits the units and tiles of its upper triangle.
#pragma once

#include "tile.cuh"

namespace fastcl::cuda {

struct Panel {
  int i, j;         // the unit
  int col;          // the first column
  int first, stop;  // rows that pass by
  int visited;      // rows before this one met an earlier panel of the unit
};

// Calls visit(Panel) for all panels of SQUARE columns of this block's units. Of one set, tiles end with the SQUARE x
// SQUARE on the diagonal, whose pairs are seen from both of their sides.
template <int SQUARE, class Visit>
__device__ __forceinline__ void each_panel(const Pairs& p, const Sums& plan, Visit visit) {
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
    int visited = first;
    for (int col = j * plan.col_span; col < min((j + 1) * plan.col_span, p.n); col += SQUARE) {
      const int stop = p.symmetric ? min(last, col + SQUARE) : last;
      visit(Panel{i, j, col, first, stop, visited});
      visited = stop;
    }
  }
}

// Adds a thread's two sums of rows to what earlier panels of the unit left. Each row has one such thread.
__device__ __forceinline__ void add_to_rows(float* part, const float (&total)[2], int row, int count, bool visited) {
  if (threadIdx.x % 4) return;
#pragma unroll
  for (int h = 0; h < 2; h++)
    if (const int r = row + 8 * h; ptx::guard(r < count)) part[r] = total[h] + (visited ? part[r] : 0.0f);
}

// The sums over columns, which the warps of kThreads left at `sums` [kWarps][BN], in order.
template <Link L, int BN, class Store>
__device__ __forceinline__ void add_warps(const float* sums, int columns, bool all_kept, Store store) {
  for (int c = threadIdx.x % kThreads; c < BN && ptx::guard(c < columns); c += kThreads) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; w++) total += sums[w * BN + c];
    if (L == Link::exp && all_kept && total < kTiny) total = kTiny;
    store(c, total);
  }
}

}  // namespace fastcl::cuda
