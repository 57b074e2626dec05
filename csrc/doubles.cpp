#include "doubles.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pool.hpp"
#include "topk.hpp"

namespace fastcl {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr int ROWS = 16, COLS = 128;  // of a tile of logits: 16 KiB

// A log-sum-exp under way.
struct Running {
  double top = -INF, sum = 0;

  // Overwrites s.
  void take(double* s, int n, const Kernels& kernels) {
    double most = -INF;
    for (int c = 0; c < n; c++) most = s[c] > most || s[c] != s[c] ? s[c] : most;  // NaN once met stays
    if (most == -INF || top == INF) return;
    if (most == INF) {
      *this = {INF, 1};
      return;
    }
    if (!(most <= top)) {
      sum = sum == 0 ? 0 : sum * std::exp(top - most);
      top = most;
    }
    kernels.exps(s, n, top);
    double more = 0;
    for (int c = 0; c < n; c++) more += s[c];
    sum += more;
  }

  double value() const { return sum == 0 ? -INF : top + std::log(sum); }
};

double softplus(double s) { return (s < 0 ? 0 : s) + std::log1p(std::exp(-std::fabs(s))); }
double sigmoid(double s) {
  const double decay = std::exp(-std::fabs(s));
  return (s < 0 ? decay : 1) / (1 + decay);
}

}  // namespace

Doubles::Doubles(const PairsOf<double>& pairs, const char* isa, int threads)
    : pairs_(pairs), kernels_(kernels(isa, false)), threads_(threads) {}

// each(i, rows, j, cols, s) sees the tiles of a block of rows from left to right, on one thread.
template <class Each>
void Doubles::walk(Each each) const {
  in_pieces(threads_, pairs_.x.count, ROWS, [&](i64 begin, i64 end) {
    std::vector<double> s(ROWS * COLS);
    for (i64 j = 0; j < pairs_.y.count; j += COLS) {
      const int rows = int(end - begin), cols = int(std::min<i64>(COLS, pairs_.y.count - j));
      logits(begin, rows, j, cols, s.data());
      each(begin, rows, j, cols, s.data());
    }
  });
}

void Doubles::logits(i64 i, int rows, i64 j, int cols, double* out) const {
  const PairsOf<double>& p = pairs_;
  std::vector<double> guide(guide_ ? ROWS * COLS : 0);
  if (guide_) guide_->logits(i, rows, j, cols, guide.data());
  const i64 depth = p.x.depth;
  kernels_.dots(static_cast<const double*>(p.x.data) + i * depth, rows,
                static_cast<const double*>(p.y.data) + j * depth, cols, depth, out, COLS);
  for (int r = 0; r < rows; r++, i++) {
    double* s = out + r * COLS;
    const auto forget = [&](auto forgotten) {
      for (int c = 0; c < cols; c++) s[c] = forgotten(c) ? -INF : s[c];
    };
    for (int c = 0; c < cols; c++)
      s[c] = s[c] * p.scale + (p.row_bias ? p.row_bias[i] : 0) + (p.col_bias ? p.col_bias[j + c] : 0);
    if (p.row_ceiling) forget([&](int c) { return s[c] > p.row_ceiling[i]; });
    if (p.col_ceiling) forget([&](int c) { return s[c] > p.col_ceiling[j + c]; });
    if (p.drop_x) forget([&](int c) { return p.drop_x[i] == p.drop_y[j + c]; });
    if (p.only_x) forget([&](int c) { return p.only_x[i] != p.only_y[j + c]; });
    if (guide_) forget([&](int c) { return guide[r * COLS + c] == -INF; });
  }
}

void Doubles::reduce(Link link, double* row) const {
  if (link == Link::exp) {
    std::vector<Running> running(pairs_.x.count);
    walk([&](i64 i, int rows, i64, int cols, double* s) {
      for (int r = 0; r < rows; r++) running[i + r].take(s + r * COLS, cols, kernels_);
    });
    std::transform(running.begin(), running.end(), row, [](const Running& r) { return r.value(); });
    return;
  }
  std::fill(row, row + pairs_.x.count, 0);
  walk([&](i64 i, int rows, i64, int cols, const double* s) {
    for (int r = 0; r < rows; r++) {
      double sum = 0;
      for (int c = 0; c < cols; c++) sum += softplus(s[r * COLS + c]);
      row[i + r] += sum;
    }
  });
}

void Doubles::grad(Link link, SideOf<double> rows, SideOf<double> cols, double* dx, double* row_sum) const {
  const i64 depth = pairs_.x.depth;
  walk([&](i64 i, int n, i64 j, int m, double* s) {
    double power[COLS] = {};
    for (int r = 0; r < n; r++) {
      double *w = s + r * COLS, total = 0;
      const double g = rows.grad ? rows.grad[i + r] : 0, *h = cols.grad ? cols.grad + j : nullptr;
      if (link == Link::softplus) {
        for (int c = 0; c < m; c++) w[c] = sigmoid(w[c]) * (g + (h ? h[c] : 0));
      } else {
        for (int c = 0; h && c < m; c++) power[c] = w[c] - cols.lse[j + c];
        if (h) kernels_.exps(power, m, 0);
        if (rows.grad) kernels_.exps(w, m, rows.lse[i + r]);
        for (int c = 0; c < m; c++) w[c] = (rows.grad ? g * w[c] : 0) + (h ? h[c] * power[c] : 0);
      }
      for (int c = 0; c < m; c++) total += w[c];
      if (row_sum) row_sum[i + r] += total;
    }
    if (dx)
      kernels_.add_rows(s, COLS, n, static_cast<const double*>(pairs_.y.data) + j * depth, m, depth, dx + i * depth);
  });
}

void Doubles::topk(i64 k, double* values, i64* indices) const {
  clear_best(pairs_.x.count * k, values, indices);
  walk([&](i64 i, int rows, i64 j, int cols, const double* s) {
    for (int r = 0; r < rows; r++) keep_best(s + r * COLS, cols, j, k, values + (i + r) * k, indices + (i + r) * k);
  });
}

}  // namespace fastcl
