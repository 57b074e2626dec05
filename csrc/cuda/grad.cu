#include "grad.cuh"

#include "run.cuh"

namespace fastcl::cuda {

void grad(const GradSide& rows, const GradSide& cols, Dtype dtype, Link link, Target target) {
  with_link<Dtype::f32, Dtype::bf16, Dtype::f16>(dtype, link, [&]<Dtype T, Link L>() {
    with_depth(rows.pairs.depth, [&]<int D>() { run(grad_kernel<T, D, L>, target, kGradShared<D>, rows, cols); });
  });
}

}  // namespace fastcl::cuda
