// The kernels of one tile; compiled once per instruction set, with FASTCL_KERNELS naming the table it fills.
//
// A microtile of the matrix, MR rows by two vectors, lives in registers from the first product to the exponential: it
// is never written as logits. Vectors are the compiler's own (GCC and Clang), so one source serves every machine;
// intrinsics appear only for the bf16 dot product. Nothing here allocates, throws or uses the standard library, whose
// inline functions must not be compiled for an instruction set that the machine may lack (see kernels.hpp).
#include "kernels.hpp"

#include <string.h>

#include "elements.hpp"

#ifdef FASTCL_BF16
#include <immintrin.h>
#endif

#define FORCE FASTCL_INLINE

namespace fastcl {
namespace {

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 14;  // 28 accumulators, 2 columns, 1 row of 32 registers
#elif defined(__AVX2__)
constexpr int VL = 8, MR = 6;  // 12 accumulators of 16 registers
#elif defined(__aarch64__)
constexpr int VL = 4, MR = 14;
#else
constexpr int VL = 4, MR = 6;
#endif
constexpr int NR = 2 * VL;

#ifdef FASTCL_BF16
using E = uint16_t;
constexpr int KP = 2;
#else
using E = float;
constexpr int KP = 1;
#endif

typedef float V __attribute__((vector_size(4 * VL)));
typedef int32_t I __attribute__((vector_size(4 * VL)));
typedef float Vu __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t Iu __attribute__((vector_size(4 * VL), aligned(4), may_alias));

FORCE V load(const float* p) { return *reinterpret_cast<const Vu*>(p); }
FORCE void store(float* p, V v) { *reinterpret_cast<Vu*>(p) = v; }
FORCE I load(const int32_t* p) { return *reinterpret_cast<const Iu*>(p); }
FORCE V all(float x) { return x - V{}; }  // x - 0 is x for every x, -0 included, so it costs nothing
FORCE I all(int32_t x) { return x - I{}; }
FORCE I lanes() {
  I v;
  for (int i = 0; i < VL; i++) v[i] = i;
  return v;
}
FORCE float sum(V v) {
  float total = 0;
  for (int half = VL / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  total = v[0];
  return total;
}

// ---------------------------------------------------------------- functions of a vector

constexpr float LOG2E = 1.4426950408889634f;
constexpr float INF = __builtin_inff();

// 2^x for -126 <= x <= 126, relative error 8e-8; 2^-126 below. Coefficients: minimax on [-1/2, 1/2], to 2e-9.
FORCE V exp2(V x) {
  const V magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  x = x < all(-126.f) ? all(-126.f) : x;
  const V t = x + magic, f = x - (t - magic);
  V p = all(0.0001534581242594868f);
  p = p * f + all(0.0013399930903688073f);
  p = p * f + all(0.009618489071726799f);
  p = p * f + all(0.05550328642129898f);
  p = p * f + all(0.24022646248340607f);
  p = p * f + all(0.6931471824645996f);
  p = p * f + all(1.0f);
  return (V)((I)p + ((I)t << 23));
}

// The same where x may be NaN, or -inf, whose power is exactly 0.
FORCE V exp2_safe(V x) {
  const V power = x < all(-126.f) ? V{} : exp2(x);
  return x == x ? power : x;
}

// log(1 + t) for 0 <= t <= 1, with all its digits however small t is: 2 artanh(t / (2 + t)).
FORCE V log1p(V t) {
  const V s = t / (t + 2.f), z = s * s;
  V p = all(2.f / 15);
  p = p * z + all(2.f / 13);
  p = p * z + all(2.f / 11);
  p = p * z + all(2.f / 9);
  p = p * z + all(2.f / 7);
  p = p * z + all(2.f / 5);
  p = p * z + all(2.f / 3);
  p = p * z + all(2.f);
  return p * s;
}

// Softplus and its derivative, the sigmoid, share one exponential.
FORCE V softplus(V s, V& sigmoid) {
  const V decay = exp2((s < V{} ? s : -s) * LOG2E);  // e^-|s|
  const V small = decay / (decay + 1.f);
  sigmoid = s < V{} ? small : 1.f - small;
  sigmoid = s == s ? sigmoid : s;
  return (s < V{} ? V{} : s) + log1p(decay);  // `s < 0 ? 0 : s` keeps a NaN
}

// ---------------------------------------------------------------- elements

FORCE float get(const Rows& from, i64 i, i64 k) {
  const i64 at = i * from.row_stride + k * from.col_stride;
  if (from.dtype == Dtype::f32) return static_cast<const float*>(from.data)[at];
  const uint16_t v = static_cast<const uint16_t*>(from.data)[at];
  return from.dtype == Dtype::bf16 ? from_bf16(v) : from_f16(v);
}

FORCE E element(const Rows& from, i64 i, i64 k) {
#ifdef FASTCL_BF16
  return static_cast<const uint16_t*>(from.data)[i * from.row_stride + k * from.col_stride];
#else
  return get(from, i, k);
#endif
}

FORCE float value(E v) {
#ifdef FASTCL_BF16
  return from_bf16(v);
#else
  return v;
#endif
}

double pack(const Rows& from, i64 first, const Packed& to, bool gradient) {
  const i64 depth = from.depth, padded = (depth + KP - 1) / KP * KP, wide = (depth + NR - 1) / NR * NR;
  const i64 n = from.count - first < NR ? (from.count > first ? from.count - first : 0) : NR;
  E* panels = static_cast<E*>(to.panels) + first * NR;
  E* columns = to.columns ? static_cast<E*>(to.columns) + first * padded : nullptr;
  for (i64 p = 0; p < wide; p += NR) {
    E* panel = panels + p * to.rows;
    const i64 width = depth - p < NR ? depth - p : NR;
    for (i64 r = 0; r < NR; r++) {
      i64 k = 0;
      if (r < n) {
        if (sizeof(E) == 4 && from.dtype == Dtype::f32 && from.col_stride == 1) {
          memcpy(panel + r * NR, static_cast<const float*>(from.data) + (first + r) * from.row_stride + p, width * 4);
          k = width;
        } else {
          for (; k < width; k++) panel[r * NR + k] = element(from, first + r, p + k);
        }
      }
      for (; k < NR; k++) panel[r * NR + k] = 0;
    }
    for (i64 k = 0; columns && k < (padded - p < NR ? padded - p : NR); k++)
      for (i64 r = 0; r < NR; r++) columns[((p + k) / KP * NR + r) * KP + k % KP] = panel[r * NR + k];
#ifdef FASTCL_BF16
    if (gradient) {
      E* deep = static_cast<E*>(to.deep) + first * NR + p * to.rows;
      for (i64 r = 0; r < NR; r++)
        for (i64 k = 0; k < NR; k++) deep[(r / 2 * NR + k) * 2 + r % 2] = panel[r * NR + k];
    }
#else
    (void)gradient;
#endif
  }
  double longest = 0;
  for (i64 r = 0; r < n; r++) {
    V squares{};
    for (i64 p = 0; p < wide; p += NR)
      for (int h = 0; h < 2; h++) {
        V v;
        for (int i = 0; i < VL; i++) v[i] = value(panels[p * to.rows + r * NR + h * VL + i]);
        squares += v * v;
      }
    const double length = sum(squares);
    longest = longest > length || longest != longest ? longest : length;
  }
  return longest;
}

bool same(const Rows& from, i64 first, const Packed& packed) {
  const i64 n = from.count - first < NR ? from.count - first : NR;
  for (i64 r = 0; r < n; r++)
    for (i64 p = 0; p < from.depth; p += NR) {
      const E* kept = static_cast<const E*>(packed.panels) + p * packed.rows + (first + r) * NR;
      const i64 width = from.depth - p < NR ? from.depth - p : NR;
      if (sizeof(E) == 4 && from.dtype == Dtype::f32 && from.col_stride == 1) {
        const float* row = static_cast<const float*>(from.data) + (first + r) * from.row_stride + p;
        if (memcmp(row, kept, width * 4) != 0) return false;
      } else {
        for (i64 k = 0; k < width; k++) {
          const E now = element(from, first + r, p + k);
          if (memcmp(&now, kept + k, sizeof(E)) != 0) return false;
        }
      }
    }
  return true;
}

// ---------------------------------------------------------------- microtile

// c += A B over `steps` steps of KP. along: A(r, k) lies at a[r * lda + k], otherwise at a[k * lda + r] (in KP-tuples).
template <bool along>
FORCE void multiply(V (&c)[MR][2], const E* a, i64 lda, const E* b, i64 steps) {
  for (i64 k = 0; k < steps; k++) {
#ifdef FASTCL_BF16
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * 2 * NR);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + k * 2 * NR + NR);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
      int pair;
      memcpy(&pair, along ? a + r * lda + 2 * k : a + 2 * (k * lda + r), 4);
      const __m512bh v = (__m512bh)_mm512_set1_epi32(pair);
      c[r][0] = (V)_mm512_dpbf16_ps((__m512)c[r][0], v, b0);
      c[r][1] = (V)_mm512_dpbf16_ps((__m512)c[r][1], v, b1);
    }
#else
    const V b0 = load(b + k * NR), b1 = load(b + k * NR + VL);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
      const V v = all(along ? a[r * lda + k] : a[k * lda + r]);
      c[r][0] += v * b0;
      c[r][1] += v * b1;
    }
#endif
  }
}

// <x_r, y_j> for MR rows from r0 and the NR columns of panel p.
FORCE void products(V (&c)[MR][2], const Tile& t, int r0, int p) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++) c[r][0] = c[r][1] = V{};
  const E* x = static_cast<const E*>(t.x) + r0 * NR;
  const E* y = static_cast<const E*>(t.y) + i64(p) * NR * t.y_depth;
  for (i64 k = 0; k < t.depth; k += NR, x += t.x_panel, y += NR * NR)
    multiply<true>(c, x, NR, y, ((t.depth - k < NR ? t.depth - k : NR) + KP - 1) / KP);
}

// Logits with biases of row r (r0 + r of the tile), columns of half h, and which of them are kept.
FORCE V logit(V product, const Tile& t, int row, int col, I& kept) {
  V s = product * t.scale;
  const int safe_row = row < t.rows ? row : t.rows - 1;  // a padding row reads a bias that is there, and is not kept
  if (t.row_bias) s += t.row_bias[safe_row];
  I in = lanes() + col < all(t.cols);
  if (row >= t.rows) in = I{};
  // The arrays of columns are padded to whole panels by the engine.
  if (t.col_bias) s += load(t.col_bias + col);
  if (t.row_ceiling) in &= ~(s > all(t.row_ceiling[safe_row]));
  if (t.col_ceiling) in &= ~(s > load(t.col_ceiling + col));
  if (t.drop_x) in &= load(t.drop_y + col) != all(t.drop_x[safe_row]);
  if (t.only_x) in &= load(t.only_y + col) == all(t.only_x[safe_row]);
  if (t.row_bias || t.col_bias) in &= s != all(-INF);  // its power is 0, which exp2 is not
  if (t.guide) in &= load(t.guide + safe_row * t.guide_ld + col) != all(-INF);
  kept = in;
  return s;
}

// From products to values (2^.., softplus) or to the gradient's basis (2^.., sigmoid); `both` gives both.
template <Link link>
FORCE V finish(V s, const Tile& t, bool scaled, V& basis) {
  if (link == Link::exp) {
    basis = exp2(scaled ? s * LOG2E - t.shift : s * (t.scale * LOG2E) - t.shift);
    return basis;
  }
  return softplus(scaled ? s : s * t.scale, basis);
}

// Kept lanes of v, the diagonal halved: a symmetric matrix adds it once as a row and once as a column.
FORCE V masked(V v, I kept, const Tile& t, int row, int col) {
  if (t.diagonal) {
    const I at = lanes() + col;
    v = at == all(row) ? v * 0.5f : v;
    kept &= at >= all(row);
  }
  return kept ? v : V{};
}

template <Link link>
FORCE void values(V (&c)[MR][2], V (&basis)[MR][2], const Tile& t, int r0, int p) {
  const bool edge = r0 + MR > t.rows || (p + 1) * NR > t.cols || (t.diagonal && r0 + MR > p * NR);
  if (t.plain && !edge) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++)
      for (int h = 0; h < 2; h++) c[r][h] = finish<link>(c[r][h], t, false, basis[r][h]);
    return;
  }
  for (int r = 0; r < MR; r++)
    for (int h = 0; h < 2; h++) {
      I kept;
      const int row = r0 + r, col = p * NR + h * VL;
      const V s = logit(c[r][h], t, row, col, kept);
      V b;
      const V v = finish<link>(s, t, true, b);
      c[r][h] = masked(v, kept, t, row, col);
      basis[r][h] = masked(b, kept, t, row, col);
    }
}

FORCE void put(const V (&c)[MR][2], E* out, E* out_t, i64 ld) {
#ifdef FASTCL_BF16
  for (int r = 0; r < MR; r++)
    _mm512_storeu_si512(out + r * ld, (__m512i)_mm512_cvtne2ps_pbh((__m512)c[r][1], (__m512)c[r][0]));
  if (!out_t) return;
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(order);
  for (int r = 0; r < MR; r += 2)
    for (int h = 0; h < 2; h++) {
      const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh((__m512)c[r + 1][h], (__m512)c[r][h]);
      _mm512_storeu_si512(out_t + r * ld + h * NR, _mm512_permutexvar_epi16(interleave, pair));
    }
#else
  (void)out_t;
  for (int r = 0; r < MR; r++)
    for (int h = 0; h < 2; h++) store(out + r * ld + h * VL, c[r][h]);
#endif
}

// What put() and read() make of a basis: weights are those of a basis that was kept, whether it was or not.
FORCE void round_as_kept(V (&c)[MR][2]) {
#ifdef FASTCL_BF16
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
    for (int h = 0; h < 2; h++) c[r][h] = (V)_mm512_cvtpbh_ps(_mm512_cvtneps_pbh((__m512)c[r][h]));
#else
  (void)c;
#endif
}

FORCE void add_sums(const V (&c)[MR][2], float* row_part, float* col_part) {
  V s0 = load(col_part), s1 = load(col_part + VL);
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++) {
    s0 += c[r][0];
    s1 += c[r][1];
    store(row_part + r * VL, load(row_part + r * VL) + (c[r][0] + c[r][1]));
  }
  store(col_part, s0);
  store(col_part + VL, s1);
}

FORCE void times(V (&c)[MR][2], const float* u, const float* v) {
  const V v0 = load(v), v1 = load(v + VL);
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++) {
    const V w = all(u[r]);
    c[r][0] *= w + v0;
    c[r][1] *= w + v1;
  }
}

// Microtiles of a tile, panel by panel: the panel stays in L1. `skipped` gets those below the diagonal.
template <class F, class S>
FORCE void microtiles(const Tile& t, F f, S skipped) {
  for (int p = 0; p * NR < t.cols; p++)
    for (int r = 0; r < t.rows; r += MR) {
      if (t.diagonal && r >= (p + 1) * NR)
        skipped(r, p);
      else
        f(r, p);
    }
}

template <Link link>
FORCE void reduce_tile(const Tile& t, float* row_part, float* col_part, E* weight, i64 ld) {
  microtiles(
      t,
      [&](int r, int p) __attribute__((always_inline)) {
        V c[MR][2], basis[MR][2];
        products(c, t, r, p);
        values<link>(c, basis, t, r, p);
        add_sums(c, row_part + r * VL, col_part + p * NR);
        if (weight) put(basis, weight + r * ld + p * NR, nullptr, ld);
      },
      [&](int r, int p) {
        for (int q = 0; weight && q < MR; q++) memset(weight + (r + q) * ld + p * NR, 0, NR * sizeof(E));
      });
}

void reduce(Link link, const Tile& t, float* row_part, float* col_part, void* weight, i64 ld) {
  if (link == Link::exp)
    reduce_tile<Link::exp>(t, row_part, col_part, static_cast<E*>(weight), ld);
  else
    reduce_tile<Link::softplus>(t, row_part, col_part, static_cast<E*>(weight), ld);
}

FORCE void clear(E* weight, E* weight_t, i64 ld, int r, int p) {
  for (int q = 0; q < MR; q++) memset(weight + (r + q) * ld + p * NR, 0, NR * sizeof(E));
  for (int q = 0; weight_t && q < MR; q += 2) memset(weight_t + (r + q) * ld + p * NR * 2, 0, 2 * NR * sizeof(E));
}

FORCE E* pairs_at(E* weight_t, i64 ld, int r, int p) { return weight_t ? weight_t + r * ld + p * NR * 2 : nullptr; }

template <Link link>
FORCE void weigh_tile(const Tile& t, const float* u, const float* v, E* weight, E* weight_t, i64 ld, float* row_part,
                      float* col_part) {
  microtiles(
      t,
      [&](int r, int p) __attribute__((always_inline)) {
        V c[MR][2], basis[MR][2];
        products(c, t, r, p);
        values<link>(c, basis, t, r, p);
        round_as_kept(basis);
        times(basis, u + r, v + p * NR);
        if (row_part) add_sums(basis, row_part + r * VL, col_part + p * NR);
        put(basis, weight + r * ld + p * NR, pairs_at(weight_t, ld, r, p), ld);
      },
      [&](int r, int p) { clear(weight, weight_t, ld, r, p); });
}

void weigh(Link link, const Tile& t, const float* u, const float* v, void* weight, void* weight_t, i64 ld,
           float* row_part, float* col_part) {
  E *w = static_cast<E*>(weight), *wt = static_cast<E*>(weight_t);
  if (link == Link::exp)
    weigh_tile<Link::exp>(t, u, v, w, wt, ld, row_part, col_part);
  else
    weigh_tile<Link::softplus>(t, u, v, w, wt, ld, row_part, col_part);
}

FORCE V read(const E* p) {
#ifdef FASTCL_BF16
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
  return load(p);
#endif
}

void weigh_stored(const Tile& t, const void* basis, i64 basis_ld, const float* u, const float* v, void* weight,
                  void* weight_t, i64 ld, float* row_part, float* col_part) {
  E *w = static_cast<E*>(weight), *wt = static_cast<E*>(weight_t);
  const E* from = static_cast<const E*>(basis);
  for (int r = 0; r < t.rows; r += MR)
    for (int p = 0; p * NR < t.cols; p++) {
      V c[MR][2];
      for (int q = 0; q < MR; q++)
        for (int h = 0; h < 2; h++) c[q][h] = read(from + (r + q) * basis_ld + p * NR + h * VL);
      times(c, u + r, v + p * NR);
      if (row_part) add_sums(c, row_part + r * VL, col_part + p * NR);
      put(c, w + r * ld + p * NR, pairs_at(wt, ld, r, p), ld);
    }
}

template <bool transposed>
FORCE void accumulate_tile(float* out, i64 out_ld, int rows, const E* weight, i64 ld, bool upper, const E* deep,
                           i64 deep_panel, int steps, i64 depth) {
  for (i64 d = 0; d < depth; d += NR, deep += deep_panel)
    for (int r = 0; r < rows; r += MR) {
      // An upper triangle's row r starts at column r, its column r ends at row r.
      const int from = upper && !transposed ? r / KP * KP : 0;
      const int to = upper && transposed && r + MR < steps ? (r + MR + KP - 1) / KP * KP : steps;
      V c[MR][2] = {};
      const E* a = transposed ? weight + r * KP : weight + r * ld + from;
      multiply<!transposed>(c, a, ld, deep + from * NR, (to - from + KP - 1) / KP);
      // The sum over this tile starts from 0, so a long sum is one of short sums and keeps fp32's accuracy.
      const int n = rows - r < MR ? rows - r : MR;
      for (int q = 0; q < n; q++) {
        float* o = out + (r + q) * out_ld + d;
        store(o, load(o) + c[q][0]);
        store(o + VL, load(o + VL) + c[q][1]);
      }
    }
}

void accumulate(float* out, i64 out_ld, int rows, const void* weight, i64 ld, bool transposed, bool upper,
                const void* deep, i64 deep_panel, int steps, i64 depth) {
  const E *w = static_cast<const E*>(weight), *b = static_cast<const E*>(deep);
  if (transposed)
    accumulate_tile<true>(out, out_ld, rows, w, ld, upper, b, deep_panel, steps, depth);
  else
    accumulate_tile<false>(out, out_ld, rows, w, ld, upper, b, deep_panel, steps, depth);
}

// ---------------------------------------------------------------- the safe path

void logits(const Tile& tile, float unit, float* out, i64 ld) {
  Tile t = tile;
  t.diagonal = false;
  microtiles(
      t,
      [&](int r, int p) __attribute__((always_inline)) {
        V c[MR][2];
        products(c, t, r, p);
        for (int q = 0; q < MR; q++)
          for (int h = 0; h < 2; h++) {
            I kept;
            const V s = logit(c[q][h], t, r + q, p * NR + h * VL, kept);
            store(out + (r + q) * ld + p * NR + h * VL, kept ? s * unit : all(-INF));
          }
      },
      [](int, int) {});
}

// A running sum of 2^(s - top) takes in n more terms whose largest is `most`; their sum relative to it is `more`.
FORCE void merge(float& top, double& sum, float most, double more) {
  if (most == -INF) return;
  if (sum == 0 || most > top || most != most) {
    sum = (sum == 0 ? 0 : sum * __builtin_exp2(double(top) - most)) + more;
    top = most;
  } else {
    sum += more * __builtin_exp2(double(most) - top);
  }
}

FORCE V larger(V a, V b) { return b > a || b != b ? b : a; }  // NaN once met stays

void fold(const float* logits, i64 ld, int rows, int cols, bool across, float* top, double* sums) {
  const int wide = (cols + NR - 1) / NR * NR;
  if (!across) {
    for (int r = 0; r < rows; r++) {
      const float* s = logits + r * ld;
      V most = all(-INF), more{};
      for (int c = 0; c < wide; c += VL) most = larger(most, load(s + c));
      float m = -INF;
      for (int i = 0; i < VL; i++) m = most[i] > m || most[i] != most[i] ? most[i] : m;
      if (m == INF) {
        merge(top[r], sums[r], m, 1);
        continue;
      }
      for (int c = 0; c < wide; c += VL) more += exp2_safe(load(s + c) - m);
      merge(top[r], sums[r], m, sum(more));
    }
    return;
  }
  for (int c = 0; c < wide; c += VL) {
    V most = all(-INF), more{};
    for (int r = 0; r < rows; r++) most = larger(most, load(logits + r * ld + c));
    const V shift = most == all(-INF) ? V{} : most;
    for (int r = 0; r < rows; r++) more += exp2_safe(load(logits + r * ld + c) - shift);
    for (int i = 0; i < VL && c + i < cols; i++) merge(top[c + i], sums[c + i], most[i], most[i] == INF ? 1 : more[i]);
  }
}

void weigh_logits(const float* logits, i64 logits_ld, int rows, int cols, const float* r, const float* g,
                  const float* c, const float* h, void* weight, void* weight_t, i64 ld, float* row_part,
                  float* col_part) {
  E *w = static_cast<E*>(weight), *wt = static_cast<E*>(weight_t);
  for (int row = 0; row < rows; row += MR)
    for (int p = 0; p * NR < cols; p++) {
      V out[MR][2];
      for (int q = 0; q < MR; q++)
        for (int half = 0; half < 2; half++) {
          const int col = p * NR + half * VL, i = row + q < rows ? row + q : rows - 1;
          const V s = row + q < rows ? load(logits + i * logits_ld + col) : all(-INF);
          V total{};
          if (g) total += g[i] * exp2_safe(s - r[i]);
          if (h) total += load(h + col) * exp2_safe(s - load(c + col));
          out[q][half] = total;
        }
      if (row_part) add_sums(out, row_part + row * VL, col_part + p * NR);
      put(out, w + row * ld + p * NR, pairs_at(wt, ld, row, p), ld);
    }
}

// ---------------------------------------------------------------- fp64

constexpr int DL = VL / 2, DR = 4;  // doubles of a vector; rows, and columns, whose products are formed together
typedef double D __attribute__((vector_size(4 * VL)));
typedef int64_t L __attribute__((vector_size(4 * VL)));
typedef double Du __attribute__((vector_size(4 * VL), aligned(8), may_alias));

FORCE D load(const double* p) { return *reinterpret_cast<const Du*>(p); }
FORCE void store(double* p, D v) { *reinterpret_cast<Du*>(p) = v; }

// e^x, relative error 3e-16; 0 below e^-708. The power series up to x^13 suffices on half a factor of 2.
FORCE D exp(D given) {
  constexpr double LOG2 = 0.6931471805599453, LOG2_REST = 2.3190468138462996e-17;  // their sum is ln 2 to 106 bits
  const D magic = 6755399441055744. - D{};                                         // 1.5 * 2^52, as in exp2
  D x = given < -708. ? -708. - D{} : given;
  x = x > 708. ? 708. - D{} : x;
  const D t = x * 1.4426950408889634 + magic, n = t - magic;
  const D f = x - n * LOG2 - n * LOG2_REST;
  double factorial = 6227020800;
  D p = 1 / factorial - D{};
#pragma GCC unroll 13
  for (int k = 13; k > 0; k--) {
    factorial /= k;
    p = p * f + 1 / factorial;
  }
  const D power = (D)((L)p + ((L)t << 52));
  return given < -708. ? D{} : given == given ? power : given;
}

void exps(double* x, int n, double shift) {
  for (int c = 0; c < n; c += DL) store(x + c, exp(load(x + c) - shift));
}

FORCE double dot(const double* a, const double* b, i64 depth) {
  double total = 0;
  for (i64 k = 0; k < depth; k++) total += a[k] * b[k];
  return total;
}

void dots(const double* x, int rows, const double* y, int cols, i64 depth, double* out, i64 ld) {
  const i64 even = depth / DL * DL;
  for (int c0 = 0; c0 < cols; c0 += DR)
    for (int r0 = 0; r0 < rows; r0 += DR) {
      const int nr = rows - r0 < DR ? rows - r0 : DR, nc = cols - c0 < DR ? cols - c0 : DR;
      const double *a[DR], *b[DR];  // a row or column past the end is read again and not stored
      for (int i = 0; i < DR; i++) {
        a[i] = x + (r0 + (i < nr ? i : 0)) * depth;
        b[i] = y + (c0 + (i < nc ? i : 0)) * depth;
      }
      D sums[DR][DR] = {};
      for (i64 k = 0; k < even; k += DL)
#pragma GCC unroll 4
        for (int i = 0; i < DR; i++)
#pragma GCC unroll 4
          for (int j = 0; j < DR; j++) sums[i][j] += load(a[i] + k) * load(b[j] + k);
      for (int i = 0; i < nr; i++)
        for (int j = 0; j < nc; j++) {
          double total = dot(a[i] + even, b[j] + even, depth - even);
          for (int lane = 0; lane < DL; lane++) total += sums[i][j][lane];
          out[(r0 + i) * ld + c0 + j] = total;
        }
    }
}

// out[rows][2 vectors] += weight y, for at most DR rows.
FORCE void add_block(const double* weight, i64 ld, int rows, const double* y, int cols, i64 depth, double* out) {
  const double* w[DR];  // a row past the end is read again and not stored
  for (int r = 0; r < DR; r++) w[r] = weight + (r < rows ? r : 0) * ld;
  D sums[DR][2] = {};
  for (int c = 0; c < cols; c++, y += depth) {
    const D y0 = load(y), y1 = load(y + DL);
#pragma GCC unroll 4
    for (int r = 0; r < DR; r++) {
      sums[r][0] += w[r][c] * y0;
      sums[r][1] += w[r][c] * y1;
    }
  }
  for (int r = 0; r < rows; r++, out += depth) {
    store(out, load(out) + sums[r][0]);
    store(out + DL, load(out + DL) + sums[r][1]);
  }
}

void add_rows(const double* weight, i64 ld, int rows, const double* y, int cols, i64 depth, double* out) {
  const i64 even = depth / (2 * DL) * (2 * DL);
  for (i64 k = 0; k < even; k += 2 * DL)
    for (int r = 0; r < rows; r += DR)
      add_block(weight + r * ld, ld, rows - r < DR ? rows - r : DR, y + k, cols, depth, out + r * depth + k);
  for (int r = 0; r < rows; r++)
    for (i64 k = even; k < depth; k++) {
      double total = 0;
      for (int c = 0; c < cols; c++) total += weight[r * ld + c] * y[c * depth + k];
      out[r * depth + k] += total;
    }
}

}  // namespace

extern const Kernels FASTCL_KERNELS = {
    FASTCL_ISA_NAME, MR,         NR,     sizeof(E), VL,           pack, same,     reduce, weigh,
    weigh_stored,    accumulate, logits, fold,      weigh_logits, dots, add_rows, exps,
};

}  // namespace fastcl
