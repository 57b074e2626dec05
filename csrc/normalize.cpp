// Computed in double whatever the rows are, so that squares of fp32 numbers stay in range; see normalize.hpp.
#include "normalize.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "elements.hpp"
#include "pool.hpp"

namespace fastcl {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr i64 PIECE = 128;  // rows a thread takes at a time: fewer are not worth waking another

// How an element is stored, and the type of lengths.
struct F32 {
  using Stored = float;
  using Length = float;
  static double get(float v) { return v; }
  static float put(double v) { return float(v); }
};
struct F64 {
  using Stored = double;
  using Length = double;
  static double get(double v) { return v; }
  static double put(double v) { return v; }
};
struct BF16 {
  using Stored = uint16_t;
  using Length = float;
  static double get(uint16_t v) { return from_bf16(v); }
  static uint16_t put(double v) { return to_bf16(float(v)); }
};
struct F16 {
  using Stored = uint16_t;
  using Length = float;
  static double get(uint16_t v) { return from_f16(v); }
  static uint16_t put(double v) { return to_f16(float(v)); }
};

template <class Call>
void with_type(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::f32: return call(F32{});
    case Dtype::bf16: return call(BF16{});
    case Dtype::f16: return call(F16{});
    case Dtype::f64: return call(F64{});
  }
}

template <class T>
void read(const Rows& from, i64 row, std::vector<double>& to) {
  const auto* at = static_cast<const typename T::Stored*>(from.data) + row * from.row_stride;
  if (from.col_stride == 1)
    for (i64 k = 0; k < from.depth; k++) to[k] = T::get(at[k]);
  else
    for (i64 k = 0; k < from.depth; k++) to[k] = T::get(at[k * from.col_stride]);
}

// term(0), term(1), ... combined in eight chains, which the compiler turns into vectors.
template <class Term, class Combine>
double fold(i64 count, Term term, Combine combine) {
  constexpr int CHAINS = 8;
  double chain[CHAINS] = {};
  i64 k = 0;
  for (; k + CHAINS <= count; k += CHAINS)
    for (int c = 0; c < CHAINS; c++) chain[c] = combine(chain[c], term(k + c));
  for (; k < count; k++) chain[0] = combine(chain[0], term(k));
  for (int half = CHAINS / 2; half > 0; half /= 2)
    for (int c = 0; c < half; c++) chain[c] = combine(chain[c], chain[c + half]);
  return chain[0];
}

double plus(double a, double b) { return a + b; }
double larger(double a, double b) { return a > b ? a : b; }

template <class T>
void normalize_rows(const Rows& x, i64 begin, i64 end, typename T::Stored* unit, typename T::Length* length) {
  std::vector<double> row(x.depth);
  for (i64 i = begin; i < end; i++) {
    read<T>(x, i, row);
    const double largest = fold(x.depth, [&](i64 k) { return std::fabs(row[k]); }, larger);
    const bool is_short = largest < std::numeric_limits<typename T::Length>::min();
    // Only squares of doubles can leave the range; a power of two brings them back without rounding.
    const bool wide = sizeof(typename T::Length) == 8 && !is_short && largest < INF;
    const double near_one = wide ? std::ldexp(1., -std::ilogb(largest)) : 1;
    const auto square = [&](i64 k) { return (row[k] * near_one) * (row[k] * near_one); };
    const double scaled = std::sqrt(fold(x.depth, square, plus));
    // A row with a NaN, which `larger` passes over, or an infinity is NaN all over.
    const double l = !(scaled < INF) ? std::nan("") : is_short ? INF : scaled;
    for (i64 k = 0; k < x.depth; k++) unit[i * x.depth + k] = T::put(row[k] * near_one * (1 / l));
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
    const double dot = fold(x.depth, [&](i64 k) { return unit[k] * up[k]; }, plus);
    for (i64 k = 0; k < x.depth; k++) dx[i * x.depth + k] = T::put((up[k] - unit[k] * dot) * inverse);
  }
}

}  // namespace

void normalize(const Rows& x, int threads, void* unit, void* length) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    in_pieces(threads, x.count, PIECE, [&](i64 begin, i64 end) {
      normalize_rows<T>(x, begin, end, static_cast<typename T::Stored*>(unit),
                        static_cast<typename T::Length*>(length));
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
