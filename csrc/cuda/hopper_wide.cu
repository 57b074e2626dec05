#include "hopper_wide.cuh"

#include "run.cuh"

namespace fastcl::cuda {

namespace {

template <bool WEIGHTS>
void wide(const GradSide& side, Dtype dtype, Link link, const Sums& plan, const Strip& strip, Target target) {
  const Pairs& p = side.pairs;
  const auto x = tensor_map(p.x, p.m, p.depth, p.depth, dtype), y = tensor_map(p.y, p.n, p.depth, p.depth, dtype);
  with_link<Dtype::bf16, Dtype::f16>(dtype, link, [&]<Dtype T, Link L>() {
    run<3 * hopper::kGroup>(hopper::hopper_wide_kernel<T, L, WEIGHTS>, target, hopper::WideLayout::kBytes, x, y, side,
                            plan, strip);
  });
}

}  // namespace

void hopper_wide_sums(const Pairs& pairs, Dtype dtype, Link link, const Sums& plan, Target target) {
  GradSide side{};
  side.pairs = pairs;
  wide<false>(side, dtype, link, plan, {}, target);
}

void hopper_weights(const GradSide& side, Dtype dtype, Link link, const Sums& plan, const Strip& strip, Target target) {
  wide<true>(side, dtype, link, plan, strip, target);
}

void hopper_product(const Product& p, const void* weights, i64 pitch, const void* y, bool transposed, Dtype dtype,
                    Target target) {
  const auto w = transposed ? tensor_map(weights, p.inner, p.rows, pitch, dtype)
                            : tensor_map(weights, p.rows, p.inner, pitch, dtype);
  const auto to = tensor_map(y, p.inner, p.depth, p.depth, dtype);
  const auto launch = [&]<Dtype T>() {
    run<3 * hopper::kGroup>(
        transposed ? hopper::hopper_product_kernel<T, true> : hopper::hopper_product_kernel<T, false>, target,
        hopper::WideLayout::kBytes, w, to, p);
  };
  dtype == Dtype::bf16 ? launch.operator()<Dtype::bf16>() : launch.operator()<Dtype::f16>();
}

}  // namespace fastcl::cuda
