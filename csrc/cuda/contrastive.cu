#include "contrastive.cuh"

#include "run.cuh"

namespace fastcl::cuda {

namespace {

// Calls f with the dtypes of raw rows and of those that are multiplied, as compile-time constants.
template <class F>
void with_dtypes(Dtype raw, Dtype dtype, F f) {
  const auto with_raw = [&]<Dtype R>() {
    dtype == Dtype::bf16 ? f.template operator()<R, Dtype::bf16>() : f.template operator()<R, Dtype::f16>();
  };
  if (raw == Dtype::f32)
    with_raw.template operator()<Dtype::f32>();
  else if (raw == Dtype::bf16)
    with_raw.template operator()<Dtype::bf16>();
  else
    with_raw.template operator()<Dtype::f16>();
}

}  // namespace

void prepare(const Views& views, Dtype raw, Dtype dtype, float* bounds, i64* keys, i64* ranges, Target target) {
  with_dtypes(raw, dtype, [&]<Dtype R, Dtype T>() {
    run(prepare_kernel<R, T>, target, kWarps * sizeof(float), views, bounds, keys, ranges);
  });
}

void restore(const Views& views, const Sides& sides, const RestoreSide& x, const RestoreSide& y, Dtype raw, Dtype dtype,
             Target target) {
  with_dtypes(raw, dtype, [&]<Dtype R, Dtype T>() { run(restore_kernel<R, T>, target, 0, views, sides, x, y); });
}

}  // namespace fastcl::cuda
