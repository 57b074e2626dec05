// Whole rows at a time, in double whatever they are, so that squares of fp32 numbers stay in range. Bodies are static,
// as kernels.hpp asks.
#pragma once

#include <vector>

#include "elements.hpp"
#include "kernels.hpp"

namespace fastcl {

constexpr i64 PIECE = 128;  // rows a thread takes at a time: fewer are not worth waking another

// How an element is stored, and the type of lengths.
struct F32 {
  using Stored = float;
  using Length = float;
  FASTCL_INLINE double get(float v) { return v; }
  FASTCL_INLINE float put(double v) { return float(v); }
};
struct F64 {
  using Stored = double;
  using Length = double;
  FASTCL_INLINE double get(double v) { return v; }
  FASTCL_INLINE double put(double v) { return v; }
};
struct BF16 {
  using Stored = uint16_t;
  using Length = float;
  FASTCL_INLINE double get(uint16_t v) { return from_bf16(v); }
  FASTCL_INLINE uint16_t put(double v) { return to_bf16(float(v)); }
};
struct F16 {
  using Stored = uint16_t;
  using Length = float;
  FASTCL_INLINE double get(uint16_t v) { return from_f16(v); }
  FASTCL_INLINE uint16_t put(double v) { return to_f16(float(v)); }
};

template <class Call>
static void with_type(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::f32: return call(F32{});
    case Dtype::bf16: return call(BF16{});
    case Dtype::f16: return call(F16{});
    case Dtype::f64: return call(F64{});
  }
}

template <class T>
static void read(const Rows& from, i64 row, std::vector<double>& to) {
  const auto* at = static_cast<const typename T::Stored*>(from.data) + row * from.row_stride;
  if (from.col_stride == 1)
    for (i64 k = 0; k < from.depth; k++) to[k] = T::get(at[k]);
  else
    for (i64 k = 0; k < from.depth; k++) to[k] = T::get(at[k * from.col_stride]);
}

// term(0), term(1), ... combined in eight chains, which the compiler turns into vectors.
template <class Term, class Combine>
static double fold(i64 count, Term term, Combine combine) {
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

static inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return fold(i64(a.size()), [&](i64 k) { return a[k] * b[k]; }, [](double a, double b) { return a + b; });
}

}  // namespace fastcl
