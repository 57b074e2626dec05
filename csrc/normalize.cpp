// See normalize.hpp.
#include "normalize.hpp"

#include <cmath>
#include <limits>

#include "pool.hpp"
#include "rows.hpp"

namespace fastcl {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

double plus(double a, double b) { return a + b; }
double larger(double a, double b) { return a > b ? a : b; }

template <class T, class To>
void normalize_rows(const Rows& x, i64 begin, i64 end, typename To::Stored* unit, typename T::Length* length) {
  std::vector<double> row(x.depth);
  for (i64 i = begin; i < end; i++) {
    read<T>(x, i, row);
    if (!length) {
      for (i64 k = 0; k < x.depth; k++) unit[i * x.depth + k] = To::put(row[k]);
      continue;
    }
    const double largest = fold(x.depth, [&](i64 k) { return std::fabs(row[k]); }, larger);
    const bool is_short = largest < std::numeric_limits<typename T::Length>::min();
    // Only squares of doubles can leave the range; a power of two brings them back without rounding.
    const bool wide = sizeof(typename T::Length) == 8 && !is_short && largest < INF;
    const double near_one = wide ? std::ldexp(1., -std::ilogb(largest)) : 1;
    const auto square = [&](i64 k) { return (row[k] * near_one) * (row[k] * near_one); };
    const double scaled = std::sqrt(fold(x.depth, square, plus));
    // A row with a NaN, which `larger` passes over, or an infinity is NaN all over.
    const double l = !(scaled < INF) ? std::nan("") : is_short ? INF : scaled;
    for (i64 k = 0; k < x.depth; k++) unit[i * x.depth + k] = To::put(row[k] * near_one * (1 / l));
    length[i] = typename T::Length(l / near_one);
  }
}

template <class T>
void grad_rows(const Rows& x, const typename T::Length* length, const Rows& g, i64 begin, i64 end,
               typename T::Stored* dx) {
  std::vector<double> unit(x.depth), up(x.depth);
  for (i64 i = begin; i < end; i++) {
    read<T>(x, i, unit);
    read<T>(g, i, up);
    const double inverse = 1 / double(length[i]);
    for (i64 k = 0; k < x.depth; k++) unit[k] *= inverse;
    const double along = dot(unit, up);
    for (i64 k = 0; k < x.depth; k++) dx[i * x.depth + k] = T::put((up[k] - unit[k] * along) * inverse);
  }
}

}  // namespace

void normalize(const Rows& x, int threads, Dtype dtype, void* unit, void* length) {
  with_type(x.dtype, [&](auto from) {
    with_type(dtype, [&](auto to) {
      using T = decltype(from);
      using To = decltype(to);
      in_pieces(threads, x.count, PIECE, [&](i64 begin, i64 end) {
        normalize_rows<T, To>(x, begin, end, static_cast<typename To::Stored*>(unit),
                              static_cast<typename T::Length*>(length));
      });
    });
  });
}

void normalize_grad(const Rows& x, const void* length, const Rows& g, int threads, void* dx) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    in_pieces(threads, x.count, PIECE, [&](i64 begin, i64 end) {
      grad_rows<T>(x, static_cast<const typename T::Length*>(length), g, begin, end,
                   static_cast<typename T::Stored*>(dx));
    });
  });
}

}  // namespace fastcl
