#include "sums.cuh"

#include "run.cuh"

namespace fastcl::cuda {

void sums(const Pairs& pairs, Dtype dtype, Link link, const Sums& plan, Target target) {
  with_link<Dtype::f32, Dtype::bf16, Dtype::f16>(dtype, link, [&]<Dtype T, Link L>() {
    with_depth(pairs.depth, [&]<int D>() { run(sums_kernel<T, D, L>, target, kSumsShared<D>, pairs, plan); });
  });
}

}  // namespace fastcl::cuda
