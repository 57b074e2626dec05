// What lies between raw rows and sums over their negatives, for the losses -log sigmoid(p - n) of anchors: p is the
// logit of a row with its partner, n the log-sum-exp of its negatives. fastcl/_ops.py says which rows those are.
#pragma once

#include "kernels.hpp"

namespace fastcl {

// Two views as they are multiplied: contiguous, row i the partner of row i + count / 2.
struct Views {
  Rows z;
  float scale;
};

// Anchors are the first rows of the views: of both, or of the first.
struct Anchors {
  i64 count;
  const float* lse;
  float* positive;  // (z.count) logits of partners
};

// Writes positive, and the loss of every anchor.
void losses(const Views& views, const Anchors& anchors, int threads, float* loss);

// Of every anchor the gradient of n, from that of its loss (one number for all where stride is 0), and n itself, +inf
// where there is no negative, so that weights are 0 there.
void upstreams(const Anchors& anchors, const float* grad, i64 stride, float* grad_of_lse, float* lse);

// The gradient of raw rows x, which are those of the views from `first` on: dz, of their negatives and without the
// scale, in rows of `pitch`; their partners' share of it; through the length, where rows were divided by it. dots: <z,
// dz>.
void restore(const Views& views, const Rows& x, const float* length, i64 first, i64 anchors, const float* grad_of_lse,
             const float* dz, i64 pitch, int threads, void* dx, float* dots);

}  // namespace fastcl
