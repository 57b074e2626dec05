// The instructions that CUDA C++ has no words for: on a GPU as PTX, on a CPU as what the simulator does in their place.
// This is the only file that knows which of the two it is, so that kernels are tested from the source that ships.
#pragma once

#include "../kernels.hpp"

#ifdef FASTCL_SIMULATE
#include "../sim/ptx.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastcl::ptx {

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// Conditions that keep away what must not count, or what lies outside. The simulator can leave one out, as if it held
// everywhere: without a guard results are wrong, or memory around them is written; without a bound something outside is
// read, which only a sanitizer sees.
__device__ __forceinline__ bool guard(bool holds) { return holds; }
__device__ __forceinline__ bool bound(bool holds) { return holds; }

__device__ __forceinline__ unsigned char* shared_memory() { return dynamic_shared_memory; }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit numbers; lane 8 m + r gives the address of row r of matrix m.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

template <Dtype T>
__device__ __forceinline__ float widen(uint16_t v) {
  if constexpr (T == Dtype::bf16) return __uint_as_float(uint32_t(v) << 16);
  return __half2float(__ushort_as_half(v));
}

// Two numbers, rounded to the nearest; `low` in the lower half.
template <Dtype T>
__device__ __forceinline__ uint32_t narrow2(float low, float high) {
  uint32_t both;
  if constexpr (T == Dtype::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// d (16 x 8, fp32) += a (16 x 16) b (16 x 8)
template <Dtype T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (T == Dtype::bf16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes to shared memory, zeros where not inside; `from` is a valid address even then.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last N groups of this thread have landed.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ float exp2(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

__device__ __forceinline__ float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

}  // namespace fastcl::ptx
#endif
