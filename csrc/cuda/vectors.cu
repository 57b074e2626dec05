#include "vectors.cuh"

#include "run.cuh"

namespace fastcl::cuda {

constexpr int kShared = kWarps * sizeof(float);

void bounds(const Pairs& pairs, Dtype dtype, float* bounds, i64* row_ranges, i64* col_ranges, Target target) {
  const auto launch = dtype == Dtype::f32    ? bounds_kernel<Dtype::f32>
                      : dtype == Dtype::bf16 ? bounds_kernel<Dtype::bf16>
                                             : bounds_kernel<Dtype::f16>;
  run(launch, target, kShared, pairs, bounds, row_ranges, col_ranges);
}

void finish(const FinishSide& rows, const FinishSide& cols, Dtype dtype, Link link, const float* bounds, int room,
            Target target) {
  with_link<Dtype::f32, Dtype::bf16, Dtype::f16>(
      dtype, link, [&]<Dtype T, Link L>() { run(finish_kernel<T, L>, target, 0, rows, cols, bounds, room); });
}

}  // namespace fastcl::cuda
