#include "hopper_grad.cuh"

#include "run.cuh"

namespace fastcl::cuda {

void hopper_grad(const GradSide& rows, const GradSide& cols, Dtype dtype, Link link, Target target) {
  const Pairs& p = rows.pairs;
  const auto x = tensor_map(p.x, p.m, p.depth, p.depth, dtype), y = tensor_map(p.y, p.n, p.depth, p.depth, dtype);
  with_link<Dtype::bf16, Dtype::f16>(dtype, link, [&]<Dtype T, Link L>() {
    with_depth(p.depth, [&]<int D>() {
      run<3 * hopper::kGroup>(hopper::hopper_grad_kernel<T, D, L>, target, hopper::GradLayout<D>::kBytes, x, y, rows,
                              cols);
    });
  });
}

}  // namespace fastcl::cuda
