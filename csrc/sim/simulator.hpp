// Runs CUDA C++ kernels on a CPU, from their own source, so that they can be tested without a GPU. Not a fast path.
//
// Every CUDA thread is a fiber; blocks run one after the other. What threads do together (barriers, shuffles, matrix
// instructions) gathers the arguments of all who take part; the last to arrive computes for all. The memory model is
// made hostile on purpose, by a seed:
//   * warps run in a random order, each alone as far as it gets, so that a missing barrier is a wrong result;
//   * asynchronous copies land at once (which shows a buffer overwritten while it is read) or as late as they may: when
//     they are waited for, those of the copy engine when nothing else can go on (which shows a missing wait); matrix
//     products of warpgroups read their operands and write their results at once, or when they are waited for;
//   * stores of the copy engine land as early or as late, and shared memory that changes before they have read it, or
//     that changed after the last fence, is an error (whose writes a fence was to show is not known);
//   * shared memory is NaN before every block, and an address outside it is an error;
//   * collectives that diverge, wait for ever, or are given misaligned addresses are errors; so are barriers that are
//     used before they are made, and that are told of too many arrivals or bytes.
// Every barrier, wait, shuffle and mask is known by its place in the source, and can be left out at run time: tests
// leave out one after the other, and each must be missed.
//
// It is not a model of time, of caches or of bank conflicts, and races within one warp between two collectives are seen
// only in the order of lanes.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "../elements.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace sim {

// ---- fibers ---------------------------------------------------------------------------------------------------------

constexpr size_t kStack = 128 * 1024;

#if defined(__x86_64__)
extern "C" void fastcl_sim_switch(void** save, void* load);
// The registers that a function must preserve, and the stack pointer, are all there is to a fiber.
asm(R"(
.text
.weak fastcl_sim_switch
.type fastcl_sim_switch,@function
fastcl_sim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size fastcl_sim_switch,.-fastcl_sim_switch
)");

struct Fiber {
  void* stack_pointer = nullptr;
  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStack) & ~uintptr_t(63));
    *--top = nullptr;  // the entry never returns
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    stack_pointer = top;
  }
  static void change(Fiber& from, Fiber& to) { fastcl_sim_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Fiber {
  ucontext_t context;
  void start(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
};
#endif

// ---- threads and blocks ---------------------------------------------------------------------------------------------

// A 16-byte copy of cp.async that has not landed. `group`: how many groups its thread had committed before.
struct Copy {
  unsigned char* to;
  const void* from;  // null: zeros
  int group;
};

// A box that the copy engine carries from shared memory to memory. `group` as above, of stores.
struct Store {
  const unsigned char* from;
  std::vector<unsigned char> bytes;  // as they were when it began, and must be until they have been read
  int group;
  std::function<void()> land;
  bool read = false;
};

struct Thread {
  unsigned index = 0, lane = 0, warp = 0;
  Fiber fiber;
  char* stack = nullptr;
  bool done = false;
  const uint64_t* asleep_on = nullptr;  // until this counter is no longer `asleep_at`
  uint64_t asleep_at = 0;
  std::vector<Copy> copies;
  int committed = 0;
  std::vector<Store> stores;
  int committed_stores = 0;
};

// Threads that do something together.
struct Group {
  unsigned size = 0, arrived = 0;
  uint64_t generation = 0;
  std::string what;
  std::vector<const void*> argument;
  std::vector<void*> result;
  explicit Group(unsigned n = 0) : size(n), argument(n), result(n) {}
};

// A barrier in shared memory, which counts arrivals and bytes.
struct Barrier {
  int expected, missing;
  int64_t bytes = 0;
  uint64_t phase = 0;
  bool published = false;
};

// Products of matrices that a warp has begun, and those of groups it has committed, which are not done yet.
struct Products {
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> committed;
  bool fenced = false;
  size_t begun = 0;
};

// Four warps, which must begin the same products, each for its own rows, and share registers alike.
struct WarpGroup {
  Group group{128};
  std::vector<std::array<uint64_t, 3>> operands;  // of all products begun
  int registers = 0;
};

struct Block {
  dim3 grid, index;
  unsigned threads = 0;
  std::vector<Thread> all;
  std::vector<Group> warps;
  Group cta;
  std::vector<Products> products;  // by warp
  std::vector<WarpGroup> warp_groups;
  std::map<int, Group> named;
  std::map<uint32_t, Barrier> barriers;        // by address
  std::vector<std::function<void()>> landing;  // copies of the copy engine
  std::vector<unsigned char> fenced;           // shared memory as the copy engine sees it: at the last fence
  int spare_registers = 0;
  uint64_t releases = 0;  // of registers
  std::vector<unsigned char> shared;
  size_t shared_bytes = 0;
  Fiber scheduler;
  const void* scheduler_stack = nullptr;  // and its size: AddressSanitizer must know where a fiber returns to
  size_t scheduler_stack_size = 0;
  std::function<void()> body;
  std::exception_ptr error;
};

inline thread_local Block* block = nullptr;
inline thread_local Thread* thread = nullptr;
// Bit 0: copies land at once, or late; bit 1: products of warpgroups likewise. 0: warps in turn; else by chance.
inline thread_local unsigned seed = 0;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("simulator: " + what); }

// ---- places in the source -------------------------------------------------------------------------------------------

using Here = std::source_location;
inline std::map<std::pair<std::string, unsigned>, std::string> places;  // (file, line and column) -> "what file:line"
inline std::pair<std::string, unsigned> left_out;
inline unsigned times_left_out = 0;

// Whether what stands at this place is to be done. Asked for every pair of every tile, so answers are remembered.
inline bool wanted(const char* what, const Here& here) {
  struct Answer {
    const char* file;
    unsigned line, column, when;
    bool wanted;
  };
  static Answer answers[4096] = {};
  Answer& a = answers[(here.line() * 64 + here.column()) % 4096];
  if (a.file == here.file_name() && a.line == here.line() && a.column == here.column() && a.when == times_left_out)
    return a.wanted;
  const std::string path = here.file_name();
  const std::pair key{path.substr(path.rfind('/') + 1), here.line() * 256 + here.column()};
  if (!places.count(key)) places[key] = std::string(what) + " " + key.first + ":" + std::to_string(here.line());
  a = {here.file_name(), here.line(), here.column(), times_left_out, key != left_out};
  return a.wanted;
}

// ---- AddressSanitizer -----------------------------------------------------------------------------------------------

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
inline bool reported = false;

inline void forbid(void* begin, size_t bytes) { __asan_poison_memory_region(begin, bytes); }
inline void allow(void* begin, size_t bytes) { __asan_unpoison_memory_region(begin, bytes); }

// It goes on after an error (halt_on_error=0), so that a launch can end with an exception, and the next be tried.
inline void begin_to_watch() {
  reported = false;
  __asan_set_error_report_callback([](const char*) { reported = true; });
}

inline void refuse_reported() {
  if (reported) fail("AddressSanitizer reported an access to memory outside");
}
#else
constexpr bool kSanitized = false;
inline void forbid(void*, size_t) {}
inline void allow(void*, size_t) {}
inline void begin_to_watch() {}
inline void refuse_reported() {}
#endif

inline bool copies_land_at_once() { return seed & 1; }
inline bool products_are_done_at_once() { return seed & 2; }

inline unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block->shared.data()) + 1023) &
                                          ~uintptr_t(1023));
}

// Where `bytes` at a shared address lie; the address is an offset, as in PTX.
inline unsigned char* shared_at(uint32_t address, size_t bytes, size_t alignment) {
  if (address % alignment) fail("a shared address is not aligned to " + std::to_string(alignment) + " bytes");
  if (address + bytes > block->shared_bytes) fail("a shared address is outside the shared memory of the block");
  return shared_memory() + address;
}

// From now on the copy engine sees what was written there.
inline void show_to_copies(uint32_t address, size_t bytes) {
  std::memcpy(block->fenced.data() + address, shared_at(address, bytes, 1), bytes);
}

inline void leave() {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(thread->done ? nullptr : &fake, block->scheduler_stack, block->scheduler_stack_size);
#endif
  Thread* self = thread;
  Fiber::change(self->fiber, block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &block->scheduler_stack, &block->scheduler_stack_size);
#endif
}

inline void enter(Thread& t) {
  thread = &t;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, t.stack, kStack);
#endif
  Fiber::change(block->scheduler, t.fiber);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_size);
#endif
  try {
    block->body();
    if (!thread->copies.empty()) fail("a thread ended with copies that nothing waited for");
    for (const Store& store : thread->stores) {
      if (!store.read) fail("a thread ended with stores that nothing waited for");
      store.land();
    }
  } catch (...) {
    if (!block->error) block->error = std::current_exception();
  }
  thread->done = true;
  for (;;) leave();
}

inline void sleep_on(const uint64_t& counter) {
  const uint64_t value = counter;
  while (counter == value) {
    thread->asleep_on = &counter;
    thread->asleep_at = value;
    leave();
  }
  thread->asleep_on = nullptr;
}

// One member of a group arrives. The last computes for all, with their arguments and places for results.
template <class Compute>
void collect(Group& group, const char* what, unsigned place, const void* argument, void* result, Compute compute) {
  if (group.arrived && group.what != what) fail("threads diverged: " + group.what + " meets " + what);
  group.what = what;
  group.argument[place] = argument;
  group.result[place] = result;
  if (++group.arrived < group.size) return sleep_on(group.generation);
  compute(group);
  group.arrived = 0;
  ++group.generation;
}

template <class Compute>
void collect_warp(const char* what, const void* argument, void* result, Compute compute) {
  collect(block->warps[thread->warp], what, thread->lane, argument, result, compute);
}

inline void land(const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
}

// ---- the scheduler --------------------------------------------------------------------------------------------------

inline bool step(Thread& t) {
  if (t.done || (t.asleep_on && *t.asleep_on == t.asleep_at)) return false;
  enter(t);
  if (block->error) std::rethrow_exception(block->error);
  refuse_reported();
  return true;
}

inline void run_block(uint64_t random) {
  for (Thread& t : block->all) {
    t.done = false;
    t.asleep_on = nullptr;
    t.copies.clear();
    t.committed = 0;
    t.stores.clear();
    t.committed_stores = 0;
    allow(t.stack, kStack);  // frames of the block before have not been left
    t.fiber.start(t.stack, run_thread);
  }
  std::fill(block->shared.begin(), block->shared.end(), 0xff);  // NaN in every floating-point format
  block->fenced.assign(block->shared_bytes, 0xff);
  // Of each thread, where no second block has to fit.
  const int registers = std::min(65536 / int(block->threads) / 8 * 8, 255);
  block->products.assign(block->warps.size(), Products{});
  block->warp_groups.assign(block->threads / 128, WarpGroup{});
  for (WarpGroup& group : block->warp_groups) group.registers = registers;
  block->spare_registers = 65536 - int(block->threads) * registers;
  block->named.clear();
  block->barriers.clear();
  std::vector<unsigned> order(block->warps.size());
  for (unsigned i = 0; i < order.size(); i++) order[i] = i;
  const auto warp_gets = [](unsigned warp) {
    bool any = false;
    for (unsigned i = warp * 32; i < std::min<size_t>(block->all.size(), warp * 32 + 32); i++)
      any |= step(block->all[i]);
    return any;
  };
  for (;;) {
    bool any = false;
    if (seed)
      for (size_t i = order.size(); i-- > 1;) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        std::swap(order[i], order[random % (i + 1)]);
      }
    for (unsigned warp : order) {
      any |= warp_gets(warp);
      while (seed && warp_gets(warp)) any = true;  // alone, as far as it gets
    }
    if (any) continue;
    if (!block->landing.empty()) {
      const auto copy = block->landing.begin() + random % block->landing.size();
      const auto land = std::move(*copy);
      block->landing.erase(copy);
      land();
      continue;
    }
    for (Thread& t : block->all)
      if (!t.done)
        fail("threads wait for ever in " + (block->cta.arrived ? block->cta.what : "a warp or for a barrier"));
    for (const Products& products : block->products)
      if (!products.open.empty() || !products.committed.empty())
        fail("a block ended with products that nothing waited for");
    for (auto& [address, barrier] : block->barriers)
      if (barrier.bytes) fail("a block ended with copies that nothing waited for");
    return;
  }
}

// kernel<<<grid, threads, shared_bytes>>>(arguments...)
template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, unsigned threads, size_t shared_bytes, Arguments... arguments) {
  if (threads % 32) fail("blocks of whole warps are modelled");
  Block b;
  b.grid = grid;
  b.threads = threads;
  b.all.resize(threads);
  b.warps.assign(threads / 32, Group(32));
  b.cta = Group(threads);
  b.shared_bytes = shared_bytes;
  b.shared.resize(shared_bytes + 1024);
  b.body = [&] { kernel(arguments...); };
  std::unique_ptr<char[]> stacks(new char[threads * kStack]);
  for (unsigned i = 0; i < threads; i++) {
    b.all[i].index = i;
    b.all[i].lane = i % 32;
    b.all[i].warp = i / 32;
    b.all[i].stack = stacks.get() + i * kStack;
  }
  begin_to_watch();
  block = &b;
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x; x++) {
      b.index = {x, y, 0};
      run_block((seed + 1) * 0x9E3779B97F4A7C15ull + x + y * 7919);
    }
  block = nullptr;
}

inline dim3 thread_index() { return {thread->index, 0, 0}; }

}  // namespace sim

// ---- CUDA's own names -----------------------------------------------------------------------------------------------

#define threadIdx (sim::thread_index())
#define blockIdx (sim::block->index)
#define gridDim (sim::block->grid)
using std::max;
using std::min;

struct float2 {
  float x, y;
};

inline int __float_as_int(float v) { return int(fastcl::as_bits(v)); }
inline float __int_as_float(int v) { return fastcl::as_float(uint32_t(v)); }

inline void __syncthreads(sim::Here here = sim::Here::current()) {
  if (!sim::wanted("__syncthreads", here)) return;
  sim::collect(sim::block->cta, "__syncthreads", sim::thread->index, nullptr, nullptr, [](sim::Group&) {});
}

template <class T, class Source>
T sim_shuffle(const char* what, T value, sim::Here here, Source source) {
  if (!sim::wanted(what, here)) return value;
  T result;
  sim::collect_warp(what, &value, &result, [&](sim::Group& g) {
    for (unsigned lane = 0; lane < 32; lane++)
      *static_cast<T*>(g.result[lane]) = *static_cast<const T*>(g.argument[source(lane) & 31]);
  });
  return result;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, sim::Here here = sim::Here::current()) {
  return sim_shuffle("__shfl_xor_sync", value, here, [=](unsigned lane) { return lane ^ mask; });
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  unsigned result;
  sim::collect_warp("__ballot_sync", &predicate, &result, [](sim::Group& g) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; lane++) bits |= unsigned(*static_cast<const bool*>(g.argument[lane])) << lane;
    for (void* r : g.result) *static_cast<unsigned*>(r) = bits;
  });
  return result;
}
