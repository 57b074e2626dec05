// The instructions that CUDA C++ has no words for: on a GPU as PTX, on a CPU as what the simulator does in their place.
// This is the only file that knows which of the two it is, so that kernels are tested from the source that ships.
#pragma once

#include "../kernels.hpp"

#ifdef FASTCL_SIMULATE
#include "../sim/ptx.hpp"
#else
#include <cuda.h>
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

// In the upper 19 bits, rounded to the nearest.
__device__ __forceinline__ uint32_t to_tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}

// d (16 x 8, fp32) += a (16 x 8) b (8 x 8)
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
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

// ---- Hopper ---------------------------------------------------------------------------------------------------------

using TensorMap = CUtensorMap;

// Barriers in shared memory (8 bytes). A phase ends when all who are expected have arrived and all bytes have landed;
// waiting is for the end of the phase of a parity, which is 0 at first: a wait for parity 1 returns at once.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// By the thread that made them, before a copy or another thread may use them.
__device__ __forceinline__ void barrier_publish() {
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

// Begins to copy the box of 64 rows and 64 features at (row, feature), zeros outside, as 8 KiB of rows of 128 bytes
// whose 16-byte pieces are permuted (the 128-byte swizzle). Tells the barrier when it has landed.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap& from, uint32_t barrier, int feature, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(&from), "r"(barrier), "r"(feature), "r"(row)
      : "memory");
}

// By every thread that wrote to shared memory, before a barrier and a store of what it wrote.
__device__ __forceinline__ void store_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Begins to copy a box of 64 rows and 64 features, in the 128-byte swizzle, to (row, feature); what is outside is not
// written.
__device__ __forceinline__ void store_box(const TensorMap& to, uint32_t from, int feature, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&to), "r"(from),
               "r"(feature), "r"(row)
               : "memory");
}

__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the last N groups of this thread's stores have been read from shared memory, or written.
template <int N>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

template <int N>
__device__ __forceinline__ void store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// Barriers of some of the block's warps, by number; those who arrive do not wait.
__device__ __forceinline__ void named_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A warpgroup gives registers back, or takes them.
template <int N>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Before the first product after registers that it reads or adds to were written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last N groups of products are done.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving what reads or writes these registers across products in flight.
template <int K>
__device__ __forceinline__ void wgmma_keep(float (&d)[K][4]) {
#pragma unroll
  for (int i = 0; i < K; i++) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

// The same number, of which the compiler does not know it: what depends on it is computed here, and not ahead of a loop
// whose registers it would take.
__device__ __forceinline__ uint32_t renewed(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}

#define FASTCL_D(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FASTCL_D32 \
  FASTCL_D(0), FASTCL_D(1), FASTCL_D(2), FASTCL_D(3), FASTCL_D(4), FASTCL_D(5), FASTCL_D(6), FASTCL_D(7)
#define FASTCL_D64                                                                                            \
  FASTCL_D32, FASTCL_D(8), FASTCL_D(9), FASTCL_D(10), FASTCL_D(11), FASTCL_D(12), FASTCL_D(13), FASTCL_D(14), \
      FASTCL_D(15)
#define FASTCL_R32                                                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FASTCL_R64                                                                                              \
  FASTCL_R32                                                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTCL_WGMMA(N, type) "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." type "." type " "

// d (64 x N, fp32) = or += a b. Of an operand, a (64 x 16) or b (N x 16), the 16 numbers of a row lie side by side, or
// those of a column do.
// clang-format off: the words of an instruction stay together
#define FASTCL_SHARED(N, type, registers, outputs, a_at, b_at, add_at, a_columns, b_columns)                   \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " add_at ", 0; " FASTCL_WGMMA(N, type) "{" registers "}, " a_at \
               ", " b_at ", p, 1, 1, " a_columns ", " b_columns "; }"                                          \
               : outputs                                                                                       \
               : "l"(a), "l"(b), "r"(int(add)), "n"(int(COLUMNS_A)), "n"(int(COLUMNS_B)))
// clang-format on
#define FASTCL_SHARED_32(N, type) FASTCL_SHARED(N, type, FASTCL_R32, FASTCL_D32, "%32", "%33", "%34", "%35", "%36")
#define FASTCL_SHARED_64(N, type) FASTCL_SHARED(N, type, FASTCL_R64, FASTCL_D64, "%64", "%65", "%66", "%67", "%68")
template <Dtype T, int N, bool COLUMNS_A = false, bool COLUMNS_B = false>
__device__ __forceinline__ void wgmma_shared(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add) {
  static_assert(N == 64 || N == 128);
  if constexpr (N == 64 && T == Dtype::bf16) FASTCL_SHARED_32("64", "bf16");
  if constexpr (N == 64 && T == Dtype::f16) FASTCL_SHARED_32("64", "f16");
  if constexpr (N == 128 && T == Dtype::bf16) FASTCL_SHARED_64("128", "bf16");
  if constexpr (N == 128 && T == Dtype::f16) FASTCL_SHARED_64("128", "f16");
}

// The same with a in registers, as mma.m16n8k16 has it, and b (16 x N), whose N numbers of a row lie side by side.
// clang-format off
#define FASTCL_REGISTERS(N, type, registers, outputs, a_at, b_at, add_at)                                          \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " add_at ", 0; " FASTCL_WGMMA(N, type) "{" registers "}, {" a_at    \
               "}, " b_at ", p, 1, 1, 1; }"                                                                        \
               : outputs                                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)))
// clang-format on
#define FASTCL_A32 "%32, %33, %34, %35"
#define FASTCL_A64 "%64, %65, %66, %67"
template <Dtype T, int N>
__device__ __forceinline__ void wgmma_registers(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(N == 64 || N == 128);
  if constexpr (N == 64 && T == Dtype::bf16)
    FASTCL_REGISTERS("64", "bf16", FASTCL_R32, FASTCL_D32, FASTCL_A32, "%36", "%37");
  if constexpr (N == 64 && T == Dtype::f16)
    FASTCL_REGISTERS("64", "f16", FASTCL_R32, FASTCL_D32, FASTCL_A32, "%36", "%37");
  if constexpr (N == 128 && T == Dtype::bf16)
    FASTCL_REGISTERS("128", "bf16", FASTCL_R64, FASTCL_D64, FASTCL_A64, "%68", "%69");
  if constexpr (N == 128 && T == Dtype::f16)
    FASTCL_REGISTERS("128", "f16", FASTCL_R64, FASTCL_D64, FASTCL_A64, "%68", "%69");
}

}  // namespace fastcl::ptx
#endif
