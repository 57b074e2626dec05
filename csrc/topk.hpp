// The best k of a row of logits that arrives in pieces.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels.hpp"

namespace fastcl {

template <class Real>
void clear_best(i64 count, Real* values, i64* indices) {
  std::fill(values, values + count, -std::numeric_limits<Real>::infinity());
  std::fill(indices, indices + count, -1);
}

// Columns first .. first + n join the k best, in descending order; the first of equals comes first.
template <class Real>
void keep_best(const Real* logits, int n, i64 first, i64 k, Real* values, i64* indices) {
  const auto better = [](Real a, Real b) { return a > b || (a != a && b == b); };  // NaN is the largest, as in torch
  for (int c = 0; c < n; c++) {
    if (!better(logits[c], values[k - 1])) continue;
    i64 place = k - 1;
    for (; place > 0 && better(logits[c], values[place - 1]); place--)
      values[place] = values[place - 1], indices[place] = indices[place - 1];
    values[place] = logits[c], indices[place] = first + c;
  }
}

}  // namespace fastcl
