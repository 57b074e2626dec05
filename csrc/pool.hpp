// A few worker threads, created when they are first needed and gone after a fork: an OpenMP runtime that has run once
// hangs in a forked child, and data loaders fork.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace fastcl {

// Runs work(0) .. work(n - 1), each on a thread of its own, and returns when all have ended. Work must not throw. While
// another caller uses the workers, or where no thread can be created, work(0) runs alone: work(k) must share out a
// common list, not assume that all of it runs.
void run_on_threads(int n, const std::function<void(int)>& work);

// A loop over [0, count) in pieces, shared out: body(begin, end).
template <class Body>
void in_pieces(int threads, int64_t count, int64_t piece, Body body) {
  std::atomic<int64_t> next{0};
  run_on_threads(int(std::min<int64_t>(threads, (count + piece - 1) / piece)), [&](int) {
    for (int64_t at; (at = next.fetch_add(piece)) < count;) body(at, std::min(count, at + piece));
  });
}

}  // namespace fastcl
