// The walk over tiles: blocks, schedule, scratch, shift and fallback. See engine.hpp.
#include "engine.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <utility>

#include "pool.hpp"
#include "topk.hpp"

namespace fastcl {
namespace {

constexpr double LOG2E = 1.4426950408889634;
constexpr double INF = std::numeric_limits<double>::infinity();
constexpr float FINF = std::numeric_limits<float>::infinity();
constexpr int BLOCK = 224;     // rows of a block: a tile of fp32 weights and both operands fit 1 MB of L2 at D = 128
constexpr int FEW_BLOCKS = 8;  // with fewer blocks of rows, they are made smaller, so that threads need not queue up

i64 up(i64 n, i64 unit) { return (n + unit - 1) / unit * unit; }
i64 aligned(i64 bytes) { return up(bytes, 64); }
void* align(void* p) { return reinterpret_cast<void*>(up(reinterpret_cast<intptr_t>(p), 64)); }

// Keys are compared as 32-bit integers: as they are if they fit, else by their rank among all keys.
void narrow(const i64* a, i64 m, const i64* b, i64 n, std::vector<int32_t>& a32, std::vector<int32_t>& b32) {
  const auto fits = [](i64 v) { return v == int32_t(v); };
  if (std::all_of(a, a + m, fits) && std::all_of(b, b + n, fits)) {
    std::copy(a, a + m, a32.begin());
    std::copy(b, b + n, b32.begin());
    return;
  }
  std::vector<i64> all(a, a + m);
  all.insert(all.end(), b, b + n);
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  const auto rank = [&](i64 v) { return int32_t(std::lower_bound(all.begin(), all.end(), v) - all.begin()); };
  std::transform(a, a + m, a32.begin(), rank);
  std::transform(b, b + n, b32.begin(), rank);
}

struct Range {
  int32_t low, high;
};

std::vector<Range> ranges(const std::vector<int32_t>& keys, i64 n, i64 block) {
  std::vector<Range> out;
  for (i64 i = 0; i < n; i += block) {
    const auto [low, high] = std::minmax_element(keys.begin() + i, keys.begin() + std::min(n, i + block));
    out.push_back({*low, *high});
  }
  return out;
}

// Lowest and highest value of an optional bias, as what it adds to a bound.
void widen(const float* bias, i64 n, double& low, double& high) {
  if (!bias || n == 0) return;
  double least = INF, most = -INF;
  for (i64 i = 0; i < n; i++) {
    if (!(std::fabs(bias[i]) < FINF)) least = -INF, most = INF;
    least = std::min(least, double(bias[i]));
    most = std::max(most, double(bias[i]));
  }
  low += least;
  high += most;
}

}  // namespace

const Kernels& kernels(const char* isa, bool bf16) {
#ifdef FASTCL_X86
  if (!std::strcmp(isa, "avx512_bf16")) return bf16 ? avx512_bf16_kernels : avx512_kernels;
  if (!std::strcmp(isa, "avx512")) return avx512_kernels;
  if (!std::strcmp(isa, "avx2")) return avx2_kernels;
#endif
  (void)isa, (void)bf16;
  return baseline_kernels;
}

std::vector<const char*> instruction_sets() {
  std::vector<const char*> names;
#ifdef FASTCL_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) names.push_back("avx512_bf16");
  if (avx512) names.push_back("avx512");
  if (avx2) names.push_back("avx2");
#endif
  names.push_back("baseline");
  return names;
}

struct Engine::Plan {
  Pairs pairs;
  const Kernels& k;
  int threads;
  i64 m, n, depth, wide;
  i64 tm, tn, bm, bn;  // rows and columns of a block, blocks
  i64 ld;              // elements between rows of a tile's weights: not a power of two, which would strain L1
  Packed x{}, y{};
  const Plan* guide = nullptr;
  double bound_low = -INF, bound_high = INF, longest_y = INF;       // of every logit; of |y|
  std::vector<float> row_bias, col_bias, row_ceiling, col_ceiling;  // padded to whole blocks
  std::vector<int32_t> drop_x, drop_y, only_x, only_y;
  std::vector<Range> drop_x_range, drop_y_range, only_x_range, only_y_range;

  // Tiles in an order in which neighbours touch different blocks, so that threads seldom wait for each other.
  // turn_i: how many tiles of row block i come before this one; turn_j likewise (of the same blocks, if symmetric).
  struct Step {
    int i, j, turn_i, turn_j;
  };
  std::vector<Step> steps;

  Plan(const Pairs& p, const char* isa, int n_threads)
      : pairs(p),
        k(kernels(isa, p.x.dtype == Dtype::bf16)),
        threads(std::max(1, n_threads)),
        m(p.x.count),
        n(p.y.count),
        depth(p.x.depth) {
    const i64 unit = std::lcm(k.mr, k.nr);
    wide = up(depth, k.nr);
    tm = tn = std::max<i64>(1, BLOCK / unit) * unit;
    if (!p.symmetric && m < FEW_BLOCKS * tm) tm = std::max<i64>(1, m / FEW_BLOCKS / k.mr) * k.mr;
    bm = (m + tm - 1) / tm;
    bn = (n + tn - 1) / tn;
    ld = tn + 64 / k.element_bytes;
    x.rows = up(bm * tm, k.nr);
    y.rows = bn * tn;

    const auto pad = [](const float* from, i64 count, i64 size, std::vector<float>& to) {
      if (!from) return;
      to.assign(size, 0);
      std::copy(from, from + count, to.begin());
    };
    pad(p.row_bias, m, x.rows, row_bias);
    pad(p.col_bias, n, y.rows, col_bias);
    pad(p.row_ceiling, m, x.rows, row_ceiling);
    pad(p.col_ceiling, n, y.rows, col_ceiling);
    const auto keys = [&](const i64* a, const i64* b, std::vector<int32_t>& a32, std::vector<int32_t>& b32,
                          std::vector<Range>& a_range, std::vector<Range>& b_range) {
      if (!a) return;
      a32.resize(x.rows);
      b32.resize(y.rows);
      narrow(a, m, b, n, a32, b32);
      a_range = ranges(a32, m, tm);
      b_range = ranges(b32, n, tn);
    };
    keys(p.drop_x, p.drop_y, drop_x, drop_y, drop_x_range, drop_y_range);
    keys(p.only_x, p.only_y, only_x, only_y, only_x_range, only_y_range);
    schedule();
  }

  void schedule() {
    std::vector<int> turns(p_symmetric() ? bm : bm + bn, 0);
    const auto add = [&](i64 i, i64 j) {
      if (p_symmetric() && i > j) std::swap(i, j);
      if (!only_x.empty() && disjoint(only_x_range[i], only_y_range[j])) return;  // forgotten, all of it
      const int turn_i = turns[i]++;
      steps.push_back({int(i), int(j), turn_i, p_symmetric() && i == j ? turn_i : turns[column_block(j)]++});
    };
    if (p_symmetric()) {
      for (i64 d = 0; d <= bm / 2; d++)
        for (i64 i = 0; i < (2 * d == bm ? d : bm); i++) add(i, (i + d) % bm);
    } else {
      for (i64 d = 0; d < bn; d++)
        for (i64 i = 0; i < bm; i++) add(i, (i + d) % bn);
    }
  }

  bool p_symmetric() const { return pairs.symmetric; }
  i64 column_block(i64 j) const { return pairs.symmetric ? j : bm + j; }
  static bool disjoint(Range a, Range b) { return a.high < b.low || b.high < a.low; }
  static bool one_key(Range a, Range b) { return a.low == a.high && b.low == b.high && a.low == b.low; }

  Tile tile(const Step& s, float shift) const {
    Tile t{};
    const i64 i = s.i * tm, j = s.j * tn, padded = up(depth, k.element_bytes == 2 ? 2 : 1);
    t.x = static_cast<const char*>(x.panels) + i * k.nr * k.element_bytes;
    t.y = static_cast<const char*>(y.columns) + j * padded * k.element_bytes;
    t.x_panel = x.rows * k.nr;
    t.y_depth = padded;
    t.depth = depth;
    t.rows = int(std::min(tm, m - i));
    t.cols = int(std::min(tn, n - j));
    t.diagonal = pairs.symmetric && s.i == s.j;
    t.scale = pairs.scale;
    t.shift = shift;
    const auto at = [](const auto& v, i64 from) { return v.empty() ? nullptr : v.data() + from; };
    t.row_bias = at(row_bias, i), t.col_bias = at(col_bias, j);
    t.row_ceiling = at(row_ceiling, i), t.col_ceiling = at(col_ceiling, j);
    if (!drop_x.empty() && !disjoint(drop_x_range[s.i], drop_y_range[s.j]))
      t.drop_x = at(drop_x, i), t.drop_y = at(drop_y, j);
    if (!only_x.empty() && !one_key(only_x_range[s.i], only_y_range[s.j]))
      t.only_x = at(only_x, i), t.only_y = at(only_y, j);
    t.plain = !t.row_bias && !t.col_bias && !t.row_ceiling && !t.col_ceiling && !t.drop_x && !t.only_x;
    return t;
  }

  // What a thread works in.
  struct Scratch {
    float *row_part, *col_part, *logits, *guide;
    void *weight, *weight_t;
  };
  i64 row_part_bytes() const { return aligned(tm * k.vector * 4); }
  i64 col_part_bytes() const { return aligned(tn * 4); }
  i64 weight_bytes() const { return aligned(tm * ld * k.element_bytes); }
  i64 logits_bytes() const { return aligned(tm * ld * 4); }
  i64 thread_bytes() const {
    return row_part_bytes() + col_part_bytes() + logits_bytes() * (guide ? 2 : 1) +
           weight_bytes() * (k.element_bytes == 2 ? 2 : 1);
  }
  Scratch scratch(void* work, int thread) const {
    char* at = static_cast<char*>(work) + thread * thread_bytes();
    const auto take = [&](i64 bytes) { return std::exchange(at, at + bytes); };
    Scratch s{};
    s.row_part = reinterpret_cast<float*>(take(row_part_bytes()));
    s.col_part = reinterpret_cast<float*>(take(col_part_bytes()));
    s.logits = reinterpret_cast<float*>(take(logits_bytes()));
    s.guide = guide ? reinterpret_cast<float*>(take(logits_bytes())) : nullptr;
    s.weight = take(weight_bytes());
    s.weight_t = k.element_bytes == 2 ? take(weight_bytes()) : nullptr;
    return s;
  }

  // The tile with all that forgets pairs: the guide's logits are formed first, -inf where one is above its limit.
  Tile guided(const Step& step, float shift, const Scratch& s) const {
    Tile t = tile(step, shift);
    if (!guide) return t;
    guide->k.logits(guide->tile(step, 0), 1, s.guide, ld);
    t.guide = s.guide;
    t.guide_ld = ld;
    t.plain = false;
    return t;
  }

  // compute(step, index, scratch) runs in parallel; then add(step, scratch) runs in the order of the steps for every
  // block it writes to. So sums are added in one order, and have the same bits, for any number of threads.
  template <class Compute, class Add>
  void walk(void* work, bool rows, bool cols, Compute compute, Add add) const {
    std::vector<std::atomic<int>> done(pairs.symmetric ? bm : bm + bn);
    std::atomic<i64> next{0};
    const auto wait = [&](i64 block, int turn) {
      for (int spins = 0; done[block].load(std::memory_order_acquire) != turn; spins++)
        if (spins > 200) std::this_thread::yield();
    };
    run_on_threads(int(std::min<i64>(threads, steps.size())), [&](int thread) {
      const Scratch s = scratch(work, thread);
      for (i64 at; (at = next.fetch_add(1)) < i64(steps.size());) {
        const Step& step = steps[at];
        const bool both = cols && !(pairs.symmetric && step.i == step.j);
        compute(step, at, s);
        if (rows) wait(step.i, step.turn_i);
        if (both) wait(column_block(step.j), step.turn_j);
        add(step, s);
        if (rows) done[step.i].fetch_add(1, std::memory_order_release);
        if (both) done[column_block(step.j)].fetch_add(1, std::memory_order_release);
      }
    });
  }

  void clear(const Scratch& s) const {
    std::memset(s.row_part, 0, row_part_bytes());
    std::memset(s.col_part, 0, col_part_bytes());
  }

  float row_total(const Scratch& s, i64 r) const {
    float total = 0;
    for (int lane = 0; lane < k.vector; lane++) total += s.row_part[r * k.vector + lane];
    return total;
  }

  // The shift of the exponential link, in units of ln 2, or NaN where none can serve: a value then stays below
  // 2^126 / n, and summed with rows of that length below 2^126. A whole number is one in fp32, too.
  double shift(double length = 1) const {
    const double top = 120 - std::ceil(std::log2(double(std::max<i64>({m, n, 2})))) - std::ceil(std::log2(length));
    const double shift = std::ceil(std::max(bound_high * LOG2E - top, (bound_low + bound_high) / 2 * LOG2E));
    return std::fabs(bound_high - bound_low) < 1e5 && std::fabs(shift) < 1e5 ? shift : std::nan("");
  }

  // Below this a sum may have lost terms that underflowed.
  double least_sum() const { return std::exp2(std::ceil(std::log2(double(std::max<i64>({m, n, 2})))) - 100); }

  bool sums_hold(const std::vector<double>& sums) const {
    const double least = least_sum();
    return std::all_of(sums.begin(), sums.end(), [&](double s) { return s == 0 || (s >= least && s < INF); });
  }

  // Row (and column) sums of values; both are the same array of a symmetric matrix.
  i64 sums(Link link, bool both, double shift, void* work, void* kept, i64 keep, std::vector<double>& row,
           std::vector<double>& col) const {
    const bool cols = both || pairs.symmetric;
    const i64 bytes = tm * tn * k.element_bytes;
    walk(
        work, true, cols,
        [&](const Step& step, i64 at, const Scratch& s) {
          clear(s);
          void* basis = at < keep ? static_cast<char*>(kept) + at * bytes : nullptr;
          k.reduce(link, guided(step, float(shift), s), s.row_part, s.col_part, basis, tn);
        },
        [&](const Step& step, const Scratch& s) {
          for (i64 i = step.i * tm, r = 0; r < tm && i < m; r++, i++) row[i] += row_total(s, r);
          std::vector<double>& to = pairs.symmetric ? row : col;
          for (i64 j = step.j * tn, c = 0; cols && c < tn && j < n; c++, j++) to[j] += s.col_part[c];
        });
    return std::min<i64>(keep, steps.size());
  }

  // The same by running maxima: any logits at all.
  void safe_sums(bool both, void* work, std::vector<float>& row_top, std::vector<double>& row,
                 std::vector<float>& col_top, std::vector<double>& col) const {
    const bool cols = both || pairs.symmetric;
    walk(
        work, true, cols,
        [&](const Step& step, i64, const Scratch& s) { k.logits(guided(step, 0, s), float(LOG2E), s.logits, ld); },
        [&](const Step& step, const Scratch& s) {
          const Tile t = tile(step, 0);
          const i64 i = step.i * tm, j = step.j * tn;
          k.fold(s.logits, ld, t.rows, t.cols, false, row_top.data() + i, row.data() + i);
          if (!cols || t.diagonal) return;
          auto& top = pairs.symmetric ? row_top : col_top;
          auto& sum = pairs.symmetric ? row : col;
          k.fold(s.logits, ld, t.rows, t.cols, true, top.data() + j, sum.data() + j);
        });
  }

  // dx_i += w y, and unless only rows are asked for, dy_j (of a symmetric matrix: dx_j) += w' x.
  void add_products(const Tile& t, const Step& step, const Scratch& s, float* dx, float* dy, bool rows_only) const {
    const bool bf16 = k.element_bytes == 2;
    const auto deep = [&](const Packed& p, i64 row) {
      return static_cast<const char*>(bf16 ? p.deep : p.panels) + row * k.nr * k.element_bytes;
    };
    const i64 i = step.i * tm, j = step.j * tn;
    if (dx)
      k.accumulate(dx + i * wide, wide, t.rows, s.weight, ld, false, t.diagonal, deep(y, j), y.rows * k.nr,
                   int(up(t.cols, k.nr)), wide);
    float* mirror = pairs.symmetric ? dx : dy;
    if (mirror && !rows_only)
      k.accumulate(mirror + j * wide, wide, t.cols, bf16 ? s.weight_t : s.weight, ld, true, t.diagonal, deep(x, i),
                   x.rows * k.nr, int(up(t.rows, k.mr)), wide);
  }
};

Engine::Engine(const Pairs& pairs, const char* isa, int threads) : plan_(new Plan(pairs, isa, threads)) {}
Engine::~Engine() = default;

void Engine::guided_by(const Engine& guide) {
  const Plan &p = *plan_, &g = *guide.plan_;
  if (p.m != g.m || p.n != g.n || p.tm != g.tm || p.tn != g.tn || p.pairs.symmetric)
    throw std::logic_error("a guide must have the tiles of what it guides");
  plan_->guide = &g;
}

i64 Engine::tiles() const { return plan_->steps.size(); }
i64 Engine::tile_bytes() const { return plan_->tm * plan_->tn * plan_->k.element_bytes; }
i64 Engine::wide() const { return plan_->wide; }
i64 Engine::work_bytes() const { return plan_->threads * plan_->thread_bytes() + 64; }

namespace {

// What stands before the packed operands: the longest row of either side.
struct Lengths {
  double x, y;
};

// Lays the packed operands out in one buffer, or only measures it.
i64 lay_out(void* buffer, const Kernels& k, i64 depth, i64 wide, bool symmetric, bool gradient, Packed& x, Packed& y) {
  char* at = static_cast<char*>(buffer);
  i64 size = aligned(sizeof(Lengths));
  const auto take = [&](i64 elements) {
    void* here = at ? at + size : nullptr;
    size += aligned(elements * k.element_bytes);
    return here;
  };
  const i64 padded = up(depth, k.element_bytes == 2 ? 2 : 1);
  const bool deep = gradient && k.element_bytes == 2;
  x.panels = take(x.rows * wide);
  x.deep = deep ? take(x.rows * wide) : nullptr;
  if (symmetric) {
    x.columns = take(x.rows * padded);
    y = x;
  } else {
    y.panels = take(y.rows * wide);
    y.deep = deep ? take(y.rows * wide) : nullptr;
    y.columns = take(y.rows * padded);
  }
  return size;
}

}  // namespace

i64 Engine::packed_bytes(bool gradient) const {
  Packed x = plan_->x, y = plan_->y;
  return lay_out(nullptr, plan_->k, plan_->depth, plan_->wide, plan_->pairs.symmetric, gradient, x, y) + 64;
}

void Engine::pack(void* buffer, bool gradient) {
  Plan& p = *plan_;
  lay_out(align(buffer), p.k, p.depth, p.wide, p.pairs.symmetric, gradient, p.x, p.y);
  const auto side = [&](const Rows& from, const Packed& to) {
    std::vector<double> longest(to.rows / p.k.nr);
    in_pieces(p.threads, to.rows / p.k.nr, 8, [&](i64 begin, i64 end) {
      for (i64 g = begin; g < end; g++) longest[g] = p.k.pack(from, g * p.k.nr, to, gradient);
    });
    double most = 0;
    for (double l : longest) most = l > most || l != l ? l : most;
    return std::sqrt(most) * (1 + 1e-5);
  };
  const double x = side(p.pairs.x, p.x);
  *static_cast<Lengths*>(align(buffer)) = {x, p.pairs.symmetric ? x : side(p.pairs.y, p.y)};
  bound(buffer);
}

bool Engine::reuse(void* buffer) {
  Plan& p = *plan_;
  lay_out(align(buffer), p.k, p.depth, p.wide, p.pairs.symmetric, true, p.x, p.y);
  std::atomic<bool> equal{true};
  const auto side = [&](const Rows& from, const Packed& packed) {
    in_pieces(p.threads, (from.count + p.k.nr - 1) / p.k.nr, 8, [&](i64 begin, i64 end) {
      for (i64 g = begin; g < end && equal.load(std::memory_order_relaxed); g++)
        if (!p.k.same(from, g * p.k.nr, packed)) equal = false;
    });
  };
  side(p.pairs.x, p.x);
  if (!p.pairs.symmetric) side(p.pairs.y, p.y);
  if (equal) bound(buffer);
  return equal;
}

void Engine::bound(void* buffer) {
  Plan& p = *plan_;
  const Lengths longest = *static_cast<Lengths*>(align(buffer));
  p.longest_y = longest.y;
  p.bound_high = std::fabs(double(p.pairs.scale)) * longest.x * longest.y;
  p.bound_low = -p.bound_high;
  widen(p.pairs.row_bias, p.m, p.bound_low, p.bound_high);
  widen(p.pairs.col_bias, p.n, p.bound_low, p.bound_high);
}

i64 Engine::reduce(Link link, bool both, void* work, void* kept, i64 keep, float* row, float* col) {
  Plan& p = *plan_;
  work = align(work), kept = align(kept);
  std::vector<double> row_sum(p.m, 0), col_sum(both ? p.n : 0, 0);
  if (link == Link::softplus) {
    const i64 stored = p.sums(link, both, 0, work, kept, keep, row_sum, col_sum);
    std::copy(row_sum.begin(), row_sum.end(), row);
    std::copy(col_sum.begin(), col_sum.end(), col);
    return stored;
  }
  const double shift = p.shift();
  if (shift == shift) {
    const i64 stored = p.sums(link, both, shift, work, kept, keep, row_sum, col_sum);
    if (p.sums_hold(row_sum) && p.sums_hold(col_sum)) {
      const auto log = [&](double s) { return float((std::log2(s) + shift) / LOG2E); };  // log2(0) is -inf
      std::transform(row_sum.begin(), row_sum.end(), row, log);
      std::transform(col_sum.begin(), col_sum.end(), col, log);
      return stored;
    }
  }
  std::vector<float> row_top(p.m, -FINF), col_top(both ? p.n : 0, -FINF);
  std::fill(row_sum.begin(), row_sum.end(), 0);
  std::fill(col_sum.begin(), col_sum.end(), 0);
  p.safe_sums(both, work, row_top, row_sum, col_top, col_sum);
  const auto log = [](float top, double s) { return s == 0 ? -FINF : float((std::log2(s) + top) / LOG2E); };
  std::transform(row_top.begin(), row_top.end(), row_sum.begin(), row, log);
  std::transform(col_top.begin(), col_top.end(), col_sum.begin(), col, log);
  return 0;
}

void Engine::grad(Link link, Side rows, Side cols, void* work, const void* kept, i64 keep, float* dx, float* dy,
                  float* row_sum, float* col_sum) {
  Plan& p = *plan_;
  work = align(work), kept = align(const_cast<void*>(kept));
  // The stored or recomputed value is 2^(s - shift); times u_i = g_i 2^(shift - r_i) it is the weight. u is brought
  // near 1 by a power of two, taken out of the result again, so that neither a large nor a small g leaves the range.
  std::vector<float> u(p.bm * p.tm, 0), v(p.bn * p.tn, 0);
  double unit = 1, shift = 0;
  bool fast = true;
  if (link == Link::softplus) {
    if (rows.grad) std::copy(rows.grad, rows.grad + p.m, u.begin());
    if (cols.grad) std::copy(cols.grad, cols.grad + p.n, v.begin());
  } else {
    shift = p.shift();
    double most = 0;
    const auto largest = [&](const Side& side, i64 count) {
      for (i64 i = 0; side.grad && i < count; i++)
        if (side.lse[i] != FINF) most = std::max(most, std::fabs(double(side.grad[i])));
    };
    largest(rows, p.m);
    largest(cols, p.n);
    unit = most > 0 && most < INF ? std::exp2(std::floor(std::log2(most)) - 30) : 1;
    const auto factors = [&](const Side& side, i64 count, std::vector<float>& out) {
      for (i64 i = 0; side.grad && i < count; i++) {
        const double f = side.lse[i] == FINF ? 0 : side.grad[i] / unit * std::exp2(shift - side.lse[i] * LOG2E);
        if (f != 0 && !(std::fabs(f) > 0x1p-120 && std::fabs(f) < 0x1p120)) fast = false;
        out[i] = float(f);
      }
    };
    factors(rows, p.m, u);
    factors(cols, p.n, v);
  }
  if (p.pairs.symmetric) v = u;
  std::vector<float> r, g, c, h;  // of the safe path
  if (!fast) {
    const auto side = [](const Side& from, i64 count, i64 size, std::vector<float>& lse, std::vector<float>& grad) {
      if (!from.grad) return;
      lse.assign(size, FINF), grad.assign(size, 0);
      for (i64 i = 0; i < count; i++) lse[i] = float(from.lse[i] * LOG2E), grad[i] = from.grad[i];
    };
    unit = 1;
    side(rows, p.m, p.bm * p.tm, r, g);
    side(p.pairs.symmetric ? rows : cols, p.n, p.bn * p.tn, c, h);
  }
  const bool sums = row_sum || col_sum, want_y = dy || (p.pairs.symmetric && dx);
  std::vector<double> row_total(sums ? p.m : 0, 0), col_total(sums && !p.pairs.symmetric ? p.n : 0, 0);
  const i64 bytes = p.tm * p.tn * p.k.element_bytes;
  const auto part = [&](const std::vector<float>& a, i64 at) { return a.empty() ? nullptr : a.data() + at; };
  p.walk(
      work, dx || sums, want_y || sums,
      [&](const Plan::Step& step, i64 at, const Plan::Scratch& s) {
        const i64 i = step.i * p.tm, j = step.j * p.tn;
        float *row_part = sums ? s.row_part : nullptr, *col_part = sums ? s.col_part : nullptr;
        if (sums) p.clear(s);
        Tile t = fast && at < keep ? p.tile(step, float(shift)) : p.guided(step, float(shift), s);
        if (!fast) {
          p.k.logits(t, float(LOG2E), s.logits, p.ld);
          // A tile on the diagonal is whole here, and seen once: from its rows, which carry half of both sides.
          p.k.weigh_logits(s.logits, p.ld, t.rows, t.cols, part(r, i), part(g, i), part(c, j), part(h, j), s.weight,
                           s.weight_t, p.ld, row_part, col_part);
        } else if (at < keep) {
          p.k.weigh_stored(t, static_cast<const char*>(kept) + at * bytes, p.tn, u.data() + i, v.data() + j, s.weight,
                           s.weight_t, p.ld, row_part, col_part);
        } else {
          p.k.weigh(link, t, u.data() + i, v.data() + j, s.weight, s.weight_t, p.ld, row_part, col_part);
        }
      },
      [&](const Plan::Step& step, const Plan::Scratch& s) {
        Tile t = p.tile(step, float(shift));
        const bool whole = t.diagonal && !fast;  // as said above
        if (whole) t.diagonal = false;
        p.add_products(t, step, s, dx, dy, whole);
        if (!sums) return;
        for (i64 i = step.i * p.tm, q = 0; q < p.tm && i < p.m; q++, i++) row_total[i] += p.row_total(s, q);
        std::vector<double>& to = p.pairs.symmetric ? row_total : col_total;
        for (i64 j = step.j * p.tn, q = 0; !whole && q < p.tn && j < p.n; q++, j++) to[j] += s.col_part[q];
      });
  const auto scaled = [&](float* d, i64 count) {
    if (d && unit != 1)
      in_pieces(p.threads, count, 256, [&](i64 begin, i64 end) {
        for (i64 at = begin * p.wide; at < end * p.wide; at++) d[at] = float(d[at] * unit);
      });
  };
  scaled(dx, p.m);
  scaled(dy, p.n);
  const auto give = [&](const std::vector<double>& from, float* to) {
    if (to) std::transform(from.begin(), from.end(), to, [&](double s) { return float(s * unit); });
  };
  give(row_total, row_sum);
  give(p.pairs.symmetric ? row_total : col_total, col_sum);
}

bool Engine::reduce_grad(void* work, float* row, float* dx) {
  Plan& p = *plan_;
  work = align(work);
  const double shift = p.shift(std::max(64., p.longest_y));  // the same, and so the same bits, for rows of most lengths
  if (shift != shift) return false;
  std::vector<double> sum(p.m, 0);
  p.walk(
      work, true, false,
      [&](const Plan::Step& step, i64, const Plan::Scratch& s) {
        p.clear(s);
        p.k.reduce(Link::exp, p.guided(step, float(shift), s), s.row_part, s.col_part, s.weight, p.ld);
      },
      [&](const Plan::Step& step, const Plan::Scratch& s) {
        p.add_products(p.tile(step, float(shift)), step, s, dx, nullptr, true);
        for (i64 i = step.i * p.tm, q = 0; q < p.tm && i < p.m; q++, i++) sum[i] += p.row_total(s, q);
      });
  if (!p.sums_hold(sum)) return false;
  for (i64 i = 0; i < p.m; i++) {
    row[i] = float((std::log2(sum[i]) + shift) / LOG2E);
    const double inverse = sum[i] == 0 ? 0 : 1 / sum[i];
    for (i64 d = 0; d < p.wide; d++) dx[i * p.wide + d] = float(dx[i * p.wide + d] * inverse);
  }
  return true;
}

void Engine::topk(void* work, i64 k, float* values, i64* indices) {
  Plan& p = *plan_;
  work = align(work);
  clear_best(p.m * k, values, indices);
  std::atomic<i64> next{0};
  run_on_threads(int(std::min<i64>(p.threads, p.bm)), [&](int thread) {
    const Plan::Scratch s = p.scratch(work, thread);
    for (i64 block; (block = next.fetch_add(1)) < p.bm;)
      for (i64 j = 0; j < p.bn; j++) {
        const Tile t = p.guided({int(block), int(j), 0, 0}, 0, s);
        p.k.logits(t, 1, s.logits, p.ld);
        for (int r = 0; r < t.rows; r++) {
          const i64 at = (block * p.tm + r) * k;
          keep_best(s.logits + r * p.ld, t.cols, j * p.tn, k, values + at, indices + at);
        }
      }
  });
}

}  // namespace fastcl
