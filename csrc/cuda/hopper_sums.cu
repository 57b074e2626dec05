#include "hopper_sums.cuh"

#include "run.cuh"

namespace fastcl::cuda {

void hopper_sums(const Pairs& pairs, Dtype dtype, Link link, const Sums& plan, Target target) {
  if (pairs.depth > kDeepest) return hopper_wide_sums(pairs, dtype, link, plan, target);
  const auto x = tensor_map(pairs.x, pairs.m, pairs.depth, pairs.depth, dtype),
             y = tensor_map(pairs.y, pairs.n, pairs.depth, pairs.depth, dtype);
  with_link<Dtype::bf16, Dtype::f16>(dtype, link, [&]<Dtype T, Link L>() {
    with_depth(pairs.depth, [&]<int D>() {
      run<3 * hopper::kGroup>(hopper::hopper_sums_kernel<T, D, L>, target, hopper::SumsLayout<D>::kBytes, x, y, pairs,
                              plan);
    });
  });
}

}  // namespace fastcl::cuda
