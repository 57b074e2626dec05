// Reductions over the pairs of an implicit matrix, and their gradients, on a CPU. The mathematics stands in
// fastcl/_ops.py; this is one implementation of it, which knows pointers and no Python.
#pragma once

#include <memory>
#include <vector>

#include "kernels.hpp"

namespace fastcl {

// The implicit matrix, as fastcl.backends.Pairs; vectors are contiguous, null where absent.
template <class Real>
struct PairsOf {
  Rows x, y;
  bool symmetric;
  Real scale;
  const Real *row_bias, *col_bias, *row_ceiling, *col_ceiling;
  const i64 *drop_x, *drop_y, *only_x, *only_y;
};
using Pairs = PairsOf<float>;

// Results and upstream gradients of one side; lse of a row without kept pairs is +inf. Null where absent.
template <class Real>
struct SideOf {
  const Real *lse, *grad;
};
using Side = SideOf<float>;

// The names of the instruction sets this machine can run, best first.
std::vector<const char*> instruction_sets();

class Engine {
 public:
  // isa: a name among instruction_sets(). bf16 rows are multiplied in bf16 where the set has it.
  Engine(const Pairs& pairs, const char* isa, int threads);
  ~Engine();

  // Pairs that `guide` forgets, a packed engine of as many rows and columns, are forgotten here, too. It must live as
  // long as this engine.
  void guided_by(const Engine& guide);

  // Scratch that the caller provides, in bytes, aligned to 64: packed operands, and what the threads work in.
  i64 packed_bytes(bool gradient) const;
  i64 work_bytes() const;
  // Tiles of the gradient's basis that a reduction may keep for the gradient, and the size of one.
  i64 tiles() const;
  i64 tile_bytes() const;
  // Columns of dx and dy: the depth, padded.
  i64 wide() const;

  // Packs the operands; or takes what was packed for a gradient before, if it is these operands bit by bit.
  void pack(void* packed, bool gradient);
  bool reuse(void* packed);

  // Returns how many tiles were kept, of the `keep` that fit into `kept`; the first so many.
  i64 reduce(Link link, bool both, void* work, void* kept, i64 keep, float* row, float* col);
  // dx (M, wide), dy (N, wide), zeros at first, null where not wanted; row_sum and col_sum likewise.
  void grad(Link link, Side rows, Side cols, void* work, const void* kept, i64 keep, float* dx, float* dy,
            float* row_sum, float* col_sum);
  // The exponential link's reduction and its unit gradient in one pass. False, and results undefined, where the
  // shift leaves too few digits: then reduce() and grad() are right.
  bool reduce_grad(void* work, float* row, float* dx);
  void topk(void* work, i64 k, float* values, i64* indices);

 private:
  void bound(void* packed);
  struct Plan;
  std::unique_ptr<Plan> plan_;
};

}  // namespace fastcl
