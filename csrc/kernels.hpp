// The kernels of one tile, as a table of functions: kernels.cpp is compiled once per instruction set and fills one
// table each time; engine.cpp picks a table at run time and walks the tiles.
//
// Nothing in this header may have an inline body with external linkage: the linker could keep the copy that was
// compiled for AVX-512 and hand it to code that runs on a machine without it.
#pragma once

#include <stdint.h>

namespace fastcl {

using i64 = int64_t;

enum class Link : int { exp, softplus };
enum class Dtype : int { f32, bf16, f16, f64 };

// A matrix of embeddings as the user holds it; strides in elements.
struct Rows {
  const void* data;
  Dtype dtype;
  i64 count, depth, row_stride, col_stride;
};

// The same matrix as the microkernels read it. NR and MR are the microtile's columns and rows, KP = 1 for fp32 and 2
// for bf16, whose dot product takes pairs. An element is a float, or a bf16.
//   panels [depth / NR][rows][NR]             rows of a product: a contiguous run of NR of a row's coordinates
//   columns [rows / NR][depth / KP][NR][KP]   columns of a product over the depth
//   deep   [depth / NR][rows / KP][NR][KP]    columns of a product over rows, for the gradient; fp32: same as panels
struct Packed {
  void *panels, *columns, *deep;
  i64 rows;  // stored: padded with zeros to whole blocks
};

// One tile of the implicit matrix of logits.
struct Tile {
  const void *x, *y;     // first row in `panels`, first column in `columns`
  i64 x_panel, y_depth;  // elements between panels of x; depth of y, padded to KP
  i64 depth;
  int rows, cols;      // inside the matrix
  bool diagonal;       // of a symmetric matrix: keep the upper triangle, count the diagonal half for either side
  bool plain;          // no bias, key, ceiling or guide anywhere
  float scale, shift;  // logit = scale * <x, y> + biases; exp link: value = 2^(logit / ln 2 - shift)
  const float *row_bias, *col_bias, *row_ceiling, *col_ceiling;  // at the tile's first row or column, or null
  const int32_t *drop_x, *drop_y, *only_x, *only_y;
  const float* guide;  // [rows][guide_ld], or null: -inf where a second similarity forgets the pair
  i64 guide_ld;
};

struct Kernels {
  const char* name;
  int mr, nr, element_bytes, vector;  // `vector`: floats per register, and partial sums per row

  // Packs rows [first, first + nr) of `from`, first % nr == 0, with zeros for those past its end; `columns` may be
  // null. Returns the largest squared length among them, NaN if any is NaN.
  double (*pack)(const Rows& from, i64 first, const Packed& to, bool gradient);
  // Whether those rows equal what `panels` holds, bit by bit.
  bool (*same)(const Rows& from, i64 first, const Packed& packed);

  // Adds the tile's values (2^.. or softplus) to row_part[rows][vector] and col_part[cols]; where `weight` is not null,
  // stores the gradient's basis there (2^.. or sigmoid), [rows][ld] elements.
  void (*reduce)(Link, const Tile&, float* row_part, float* col_part, void* weight, i64 ld);
  // weight = basis * (u_i + v_j), from embeddings or from a stored basis; weight_t, for bf16 only, is the same with
  // pairs of rows interleaved. row_part and col_part may be null; otherwise the weights are added to them.
  void (*weigh)(Link, const Tile&, const float* u, const float* v, void* weight, void* weight_t, i64 ld,
                float* row_part, float* col_part);
  void (*weigh_stored)(const Tile&, const void* basis, i64 basis_ld, const float* u, const float* v, void* weight,
                       void* weight_t, i64 ld, float* row_part, float* col_part);
  // out[rows][out_ld] += A * B, B = `deep` of the other side. transposed: A(r, k) = weight(k, r), from weight_t for
  // bf16. upper: the weights are an upper triangle, and its zeros are not multiplied.
  void (*accumulate)(float* out, i64 out_ld, int rows, const void* weight, i64 ld, bool transposed, bool upper,
                     const void* deep, i64 deep_panel, int steps, i64 depth);

  // The safe path: logits * unit, -inf where forgotten, [rows][ld] floats; `diagonal` is ignored.
  void (*logits)(const Tile&, float unit, float* out, i64 ld);
  // Folds rows of logits / ln 2 into a running maximum and a sum relative to it; `across` folds columns instead.
  void (*fold)(const float* logits, i64 ld, int rows, int cols, bool across, float* top, double* sum);
  // weight = g_i 2^(s - r_i) + h_j 2^(s - c_j) with s, r, c in units of ln 2; g or h may be null.
  void (*weigh_logits)(const float* logits, i64 logits_ld, int rows, int cols, const float* r, const float* g,
                       const float* c, const float* h, void* weight, void* weight_t, i64 ld, float* row_part,
                       float* col_part);

  // fp64, contiguous rows. out[rows][ld] = <x_r, y_c>; out[rows][depth] += weight[rows][ld] y; x = e^(x - shift), for n
  // numbers and up to a vector more.
  void (*dots)(const double* x, int rows, const double* y, int cols, i64 depth, double* out, i64 ld);
  void (*add_rows)(const double* weight, i64 ld, int rows, const double* y, int cols, i64 depth, double* out);
  void (*exps)(double* x, int n, double shift);
};

// isa: a name among instruction_sets(); bf16: whether rows of it are to be multiplied.
const Kernels& kernels(const char* isa, bool bf16);

extern const Kernels baseline_kernels;
#ifdef FASTCL_X86
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;
#endif

}  // namespace fastcl
