// The same reductions in fp64, as plain loops: no constant shift, no kept tiles, every row on its own.
#pragma once

#include "engine.hpp"

namespace fastcl {

// A symmetric matrix is walked as any other; results of the columns are those of the rows of the transposed matrix.
class Doubles {
 public:
  // Rows are contiguous.
  Doubles(const PairsOf<double>& pairs, const char* isa, int threads);

  // As Engine::guided_by.
  void guided_by(const Doubles& guide) { guide_ = &guide; }

  void reduce(Link link, double* row) const;
  // dx (M, D), zeros at first, and row_sum (M,); null where not wanted.
  void grad(Link link, SideOf<double> rows, SideOf<double> cols, double* dx, double* row_sum) const;
  void topk(i64 k, double* values, i64* indices) const;

 private:
  template <class Each>
  void walk(Each each) const;
  void logits(i64 i, int rows, i64 j, int cols, double* out) const;

  PairsOf<double> pairs_;
  const Doubles* guide_ = nullptr;
  const Kernels& kernels_;
  int threads_;
};

}  // namespace fastcl
