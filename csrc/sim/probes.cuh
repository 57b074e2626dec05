// Kernels that ship nowhere: they try what the simulator and ptx.cuh know beyond what those of cuda/ use.
#pragma once

#include "../cuda/pairs.cuh"

namespace fastcl::cuda {

// out (16, 8) = a (16, depth) times the transpose of b (8, depth), in TF32, by one warp.
__global__ void tf32_kernel(const float* a, const float* b, float* out, int depth) {
  const int lane = threadIdx.x % 32, row = lane / 4, at = lane % 4;
  float d[4] = {};
  for (int k = 0; k < depth; k += 8) {
    uint32_t rows[4], cols[2];
    for (int i = 0; i < 4; i++) rows[i] = ptx::to_tf32(a[(row + i % 2 * 8) * depth + k + at + i / 2 * 4]);
    for (int i = 0; i < 2; i++) cols[i] = ptx::to_tf32(b[row * depth + k + at + i * 4]);
    ptx::mma_m16n8k8_tf32(d, rows, cols);
  }
  for (int i = 0; i < 4; i++) out[(row + i / 2 * 8) * 8 + at * 2 + i % 2] = d[i];
}

constexpr int kProbeBytes = 64 * 64 * 2, kProbeShared = kProbeBytes + 8;  // a box, and its barrier

// Changes the signs of all numbers of a matrix, box by box, each by way of the same place in shared memory.
__global__ void __launch_bounds__(kThreads)
    negate_kernel(const __grid_constant__ ptx::TensorMap from, const __grid_constant__ ptx::TensorMap to,
                  int boxes_down, int boxes_across) {
  unsigned char* memory = ptx::shared_memory();
  const uint32_t shared = ptx::shared_address(memory), barrier = shared + kProbeBytes;
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::barrier_publish();
  }
  __syncthreads();
  for (int box = 0; box < boxes_down * boxes_across; box++) {
    const int row = box / boxes_across * 64, feature = box % boxes_across * 64;
    if (threadIdx.x == 0) {
      ptx::store_wait_read<0>();  // of the box before
      ptx::barrier_arrive_expecting(barrier, kProbeBytes);
      ptx::copy_box(shared, from, barrier, feature, row);
    }
    ptx::barrier_wait(barrier, box & 1);
    for (int i = threadIdx.x; i < kProbeBytes / 4; i += kThreads) reinterpret_cast<uint32_t*>(memory)[i] ^= 0x80008000u;
    ptx::store_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::store_box(to, shared, feature, row);
      ptx::store_commit();
    }
  }
  if (threadIdx.x == 0) ptx::store_wait<0>();
}

}  // namespace fastcl::cuda
