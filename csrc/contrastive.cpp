// See contrastive.hpp.
#include "contrastive.hpp"

#include <cmath>
#include <limits>

#include "pool.hpp"
#include "rows.hpp"

namespace fastcl {

void losses(const Views& views, const Anchors& anchors, int threads, float* loss) {
  const Rows& z = views.z;
  const i64 half = z.count / 2;
  with_type(z.dtype, [&](auto type) {
    using T = decltype(type);
    in_pieces(threads, half, PIECE, [&](i64 begin, i64 end) {
      std::vector<double> row(z.depth), partner(z.depth);
      for (i64 i = begin; i < end; i++) {
        read<T>(z, i, row);
        read<T>(z, half + i, partner);
        const double p = views.scale * dot(row, partner);
        for (i64 a = i; a < z.count; a += half) {
          anchors.positive[a] = float(p);
          if (a >= anchors.count) continue;
          const double s = anchors.lse[a] - p, log = std::log1p(std::exp(-std::fabs(s)));
          loss[a] = float(s > 0 ? s + log : log);
        }
      }
    });
  });
}

void upstreams(const Anchors& anchors, const float* grad, i64 stride, float* grad_of_lse, float* lse) {
  for (i64 a = 0; a < anchors.count; a++) {
    const double s = double(anchors.lse[a]) - anchors.positive[a];
    grad_of_lse[a] = float(grad[a * stride] / (1 + std::exp(-s)));
    lse[a] = anchors.lse[a] == -std::numeric_limits<float>::infinity() ? -anchors.lse[a] : anchors.lse[a];
  }
}

void restore(const Views& views, const Rows& x, const float* length, i64 first, i64 anchors, const float* grad_of_lse,
             const float* dz, i64 pitch, int threads, void* dx, float* dots) {
  const Rows& z = views.z;
  const i64 half = z.count / 2, depth = z.depth;
  with_type(z.dtype, [&](auto type) {
    with_type(x.dtype, [&](auto raw) {
      using T = decltype(type);
      using R = decltype(raw);
      in_pieces(threads, x.count, PIECE, [&](i64 begin, i64 end) {
        std::vector<double> own(depth), partner(depth), grad(depth);
        for (i64 i = begin; i < end; i++) {
          const i64 row = first + i, pair = row % half;
          read<T>(z, row, own);
          read<T>(z, row < half ? row + half : row - half, partner);
          // What n receives, p receives with the other sign, from both of its anchors.
          double share = 0;
          for (i64 a = pair; a < anchors; a += half) share -= grad_of_lse[a];
          for (i64 k = 0; k < depth; k++) grad[k] = dz[i * pitch + k] + share * partner[k];
          dots[i] = float(dot(own, grad));
          for (double& g : grad) g *= views.scale;
          if (length) {
            const double inverse = 1 / double(length[i]);
            read<R>(x, i, own);  // not as it was rounded
            for (double& u : own) u *= inverse;
            const double radial = dot(own, grad);
            for (i64 k = 0; k < depth; k++) grad[k] = (grad[k] - own[k] * radial) * inverse;
          }
          auto* to = static_cast<typename R::Stored*>(dx) + i * depth;
          for (i64 k = 0; k < depth; k++) to[k] = R::put(grad[k]);
        }
      });
    });
  });
}

}  // namespace fastcl
