// Launches a kernel: on a stream of a GPU, or on the simulator.
#pragma once

#include <stdexcept>
#include <string>

#include "pairs.cuh"

namespace fastcl::cuda {

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), Target target, int shared_bytes, const Arguments&... arguments) {
#ifdef FASTCL_SIMULATE
  sim::launch(kernel, {unsigned(target.blocks)}, kThreads, shared_bytes, Parameters(arguments)...);
#else
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  };
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes));
  kernel<<<target.blocks, kThreads, shared_bytes, static_cast<cudaStream_t>(target.stream)>>>(arguments...);
  check(cudaGetLastError());
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

template <class F>
void with_link(Dtype dtype, Link link, F f) {
  if (dtype == Dtype::bf16)
    link == Link::exp ? f.template operator()<Dtype::bf16, Link::exp>()
                      : f.template operator()<Dtype::bf16, Link::softplus>();
  else
    link == Link::exp ? f.template operator()<Dtype::f16, Link::exp>()
                      : f.template operator()<Dtype::f16, Link::softplus>();
}

}  // namespace fastcl::cuda
