#include "pool.hpp"

#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace fastcl {
namespace {

struct Pool {
  std::mutex busy;  // held by the caller whose work runs
  std::mutex state;
  std::condition_variable start, done;
  const std::function<void(int)>* work = nullptr;
  int wanted = 0, running = 0, threads = 0;
  long round = 0;

  void worker(int id, long seen) {
    std::unique_lock<std::mutex> lock(state);
    for (;;) {
      start.wait(lock, [&] { return round != seen; });
      seen = round;
      if (id >= wanted) continue;
      lock.unlock();
      (*work)(id);
      lock.lock();
      if (--running == 0) done.notify_one();
    }
  }
};

Pool* pool = nullptr;
std::once_flag once;

// The child has none of the parent's threads, and its mutexes may be locked forever: it starts afresh, and the parent's
// pool is left behind, unfreed.
void forget_pool() { pool = new Pool; }

}  // namespace

void run_on_threads(int n, const std::function<void(int)>& work) {
  std::call_once(once, [] {
    pool = new Pool;  // never deleted: its threads sleep until the process ends
    pthread_atfork(nullptr, nullptr, forget_pool);
  });
  Pool& p = *pool;
  std::unique_lock<std::mutex> busy(p.busy, std::try_to_lock);
  if (n <= 1 || !busy.owns_lock()) return work(0);
  {
    std::lock_guard<std::mutex> lock(p.state);
    try {
      while (p.threads < n - 1) {
        std::thread(&Pool::worker, &p, p.threads + 1, p.round).detach();
        p.threads++;
      }
    } catch (const std::system_error&) {
      n = p.threads + 1;  // the system gives no more threads
    }
    p.work = &work;
    p.wanted = n;
    p.running = n - 1;
    p.round++;
  }
  p.start.notify_all();
  work(0);
  std::unique_lock<std::mutex> lock(p.state);
  p.done.wait(lock, [&] { return p.running == 0; });
}

}  // namespace fastcl
