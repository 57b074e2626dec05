// Rows of length 1, and the gradient of that: fastcl.pairwise.l2_normalize.
#pragma once

#include "kernels.hpp"

namespace fastcl {

// unit: contiguous, of `dtype`. length: one double per row for f64 rows, else one float; +inf for a row that is too
// short to have a direction, whose unit row is 0. Without `length`, rows are rounded to `dtype` and no more.
void normalize(const Rows& x, int threads, Dtype dtype, void* unit, void* length);

// dx = (g - u <u, g>) / length with u = x / length; contiguous, of the dtype of x, which is that of g too.
void normalize_grad(const Rows& x, const void* length, const Rows& g, int threads, void* dx);

}  // namespace fastcl
