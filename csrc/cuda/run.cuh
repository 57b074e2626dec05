// Launches a kernel: on a stream of a GPU, or on the simulator.
#pragma once

#include <stdexcept>
#include <string>

#include "pairs.cuh"

namespace fastcl::cuda {

#ifndef FASTCL_SIMULATE
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}
#endif

template <int THREADS = kThreads, class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), Target target, int shared_bytes, const Arguments&... arguments) {
#ifdef FASTCL_SIMULATE
  sim::launch(kernel, {unsigned(target.blocks)}, THREADS, shared_bytes, Parameters(arguments)...);
#else
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes));
  kernel<<<target.blocks, THREADS, shared_bytes, static_cast<cudaStream_t>(target.stream)>>>(arguments...);
  check(cudaGetLastError());
#endif
}

// Rows of 16-bit numbers, `pitch` apart, as the copy engine sees them, in boxes of 64 rows and 64 features.
inline ptx::TensorMap tensor_map(const void* rows, int count, int depth, i64 pitch, Dtype dtype) {
#ifdef FASTCL_SIMULATE
  return {static_cast<const uint16_t*>(rows), count, depth, pitch};
#else
  // The driver is asked for by name, so that the module loads where there is none.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("CUDA: the driver has no tensor maps");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const cuuint64_t sizes[2] = {cuuint64_t(depth), cuuint64_t(count)}, pitches[1] = {cuuint64_t(pitch) * 2};
  const cuuint32_t box[2] = {64, 64}, every[2] = {1, 1};
  ptx::TensorMap map;
  const CUresult result =
      encode(&map, dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(rows), sizes, pitches, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("CUDA: no tensor map, error " + std::to_string(result));
  return map;
#endif
}

// Calls f with the depth that a kernel exists for, as a compile-time number.
template <class F>
void with_depth(int depth, F f) {
  if (depth <= 64)
    f.template operator()<64>();
  else if (depth <= 128)
    f.template operator()<128>();
  else if (depth <= kDeepest)
    f.template operator()<kDeepest>();
  else
    throw std::runtime_error("rows of " + std::to_string(depth) + " features; the kernels hold up to 256");
}

// Calls f with one of these dtypes, and with a link, as compile-time constants.
template <Dtype... TYPES, class F>
void with_link(Dtype dtype, Link link, F f) {
  const auto with = [&]<Dtype T>() {
    link == Link::exp ? f.template operator()<T, Link::exp>() : f.template operator()<T, Link::softplus>();
  };
  ((dtype == TYPES ? with.template operator()<TYPES>() : void()), ...);
}

}  // namespace fastcl::cuda
