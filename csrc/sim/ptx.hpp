// What the wrappers of cuda/ptx.cuh do, on the simulator. The layouts of fragments are those of the PTX ISA, sections
// on ldmatrix and mma.m16n8k16.
#pragma once

#include "simulator.hpp"

namespace fastcl::ptx {

inline bool guard(bool holds, sim::Here here = sim::Here::current()) { return !sim::wanted("guard", here) || holds; }
inline bool bound(bool holds, sim::Here here = sim::Here::current()) { return !sim::wanted("bound", here) || holds; }

inline unsigned char* shared_memory() { return sim::shared_memory(); }

inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - sim::shared_memory();
  if (offset < 0 || size_t(offset) >= sim::block->shared_bytes) sim::fail("a pointer is not into shared memory");
  return uint32_t(offset);
}

namespace detail {
// Four 8 x 8 matrices of 16-bit numbers, whose rows the lanes point to: lane 8 m + r to row r of matrix m.
inline void ldmatrix(const char* what, bool transposed, uint32_t (&r)[4], uint32_t address) {
  sim::collect_warp(what, &address, &r, [=](sim::Group& g) {
    for (int m = 0; m < 4; m++) {
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; row++)
        std::memcpy(matrix[row], sim::shared_at(*static_cast<const uint32_t*>(g.argument[m * 8 + row]), 16, 16), 16);
      for (int lane = 0; lane < 32; lane++) {
        uint16_t pair[2];
        for (int i = 0; i < 2; i++)
          pair[i] = transposed ? matrix[lane % 4 * 2 + i][lane / 4] : matrix[lane / 4][lane % 4 * 2 + i];
        std::memcpy(static_cast<uint32_t*>(g.result[lane]) + m, pair, 4);
      }
    }
  });
}
}  // namespace detail

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { detail::ldmatrix("ldmatrix", false, r, address); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  detail::ldmatrix("ldmatrix.trans", true, r, address);
}

template <Dtype T>
float widen(uint16_t v) {
  return T == Dtype::bf16 ? from_bf16(v) : from_f16(v);
}

template <Dtype T>
uint32_t narrow2(float low, float high) {
  const auto narrow = [](float f) { return T == Dtype::bf16 ? to_bf16(f) : to_f16(f); };
  return uint32_t(narrow(low)) | uint32_t(narrow(high)) << 16;
}

template <Dtype T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    const uint32_t* a;
    uint32_t b[2];
  } operands{a, {b0, b1}};
  sim::collect_warp("mma.m16n8k16", &operands, &d, [](sim::Group& g) {
    float a[16][16], b[16][8], c[16][8] = {};
    for (int lane = 0; lane < 32; lane++) {
      const auto& from = *static_cast<const Operands*>(g.argument[lane]);
      const int row = lane / 4, pair = lane % 4 * 2;
      for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 4; i++)
          a[row + i % 2 * 8][pair + i / 2 * 8 + half] = widen<T>(uint16_t(from.a[i] >> 16 * half));
        for (int i = 0; i < 2; i++) b[pair + i * 8 + half][row] = widen<T>(uint16_t(from.b[i] >> 16 * half));
      }
    }
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 16; k++)
        for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++)
        static_cast<float*>(g.result[lane])[i] += c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
}

inline uint32_t to_tf32(float v) {  // to the nearest, and from the middle away from zero
  return std::isfinite(v) ? (as_bits(v) + 0x1000) & ~0x1fffu : as_bits(v);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    const uint32_t *a, *b;
  } operands{a, b};
  sim::collect_warp("mma.m16n8k8", &operands, &d, [](sim::Group& g) {
    const auto number = [](uint32_t bits) { return as_float(bits & ~0x1fffu); };  // the other bits are not read
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; lane++) {
      const auto& from = *static_cast<const Operands*>(g.argument[lane]);
      for (int i = 0; i < 4; i++) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = number(from.a[i]);
      for (int i = 0; i < 2; i++) b[lane % 4 + i * 4][lane / 4] = number(from.b[i]);
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        float sum = 0.0f;
        for (int k = 0; k < 8; k++) sum += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
        static_cast<float*>(g.result[lane])[i] += sum;
      }
  });
}

inline void cp_async_16(uint32_t to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(from) % 16) sim::fail("cp.async: the source is not aligned to 16 bytes");
  const sim::Copy copy{sim::shared_at(to, 16, 16), inside ? from : nullptr, sim::thread->committed};
  if (sim::copies_land_at_once()) return sim::land(copy);
  sim::thread->copies.push_back(copy);
}

inline void cp_async_commit() { ++sim::thread->committed; }

template <int N>
void cp_async_wait(sim::Here here = sim::Here::current()) {
  if (!sim::wanted("cp.async.wait_group", here)) return;
  auto& copies = sim::thread->copies;
  const int landed = sim::thread->committed - N;
  for (const sim::Copy& copy : copies)
    if (copy.group < landed) sim::land(copy);
  copies.erase(std::remove_if(copies.begin(), copies.end(), [=](const sim::Copy& c) { return c.group < landed; }),
               copies.end());
}

// The approximate instructions flush what is below a normal number to zero.
inline float flushed(float v) { return std::fabs(v) < 0x1p-126f ? 0.0f : v; }
inline float exp2(float v) { return flushed(std::exp2(flushed(v))); }
inline float reciprocal(float v) { return flushed(1.0f / flushed(v)); }

// ---- Hopper ---------------------------------------------------------------------------------------------------------

// A matrix as the copy engine sees it; always boxes of 64 x 64 and the 128-byte swizzle.
struct TensorMap {
  const uint16_t* base = nullptr;
  int rows = 0, depth = 0;
  int64_t pitch = 0;
};
constexpr int kBoxBytes = 64 * 128;

namespace detail {
inline sim::Barrier& barrier_at(uint32_t address) {
  sim::shared_at(address, 8, 8);
  const auto found = sim::block->barriers.find(address);
  if (found == sim::block->barriers.end()) sim::fail("a barrier is used before it is made");
  return found->second;
}

inline void end_phase_if_complete(sim::Barrier& b) {
  if (b.bytes < 0) sim::fail("a barrier was told of more bytes than it expects");
  if (b.missing || b.bytes) return;
  b.missing = b.expected;
  ++b.phase;
}

inline void arrive(sim::Barrier& b) {
  if (!b.published) sim::fail("a barrier is used before it is published");
  if (b.missing == 0) sim::fail("more arrivals at a barrier than it expects");
  --b.missing;
  end_phase_if_complete(b);
}

inline void named(const char* what, int id, int threads, bool wait) {
  sim::Group& group = sim::block->named[id];
  if (group.arrived && int(group.size) != threads)
    sim::fail(std::string(what) + ": threads disagree on how many they are");
  group.size = threads;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.generation;
  } else if (wait) {
    sim::sleep_on(group.generation);
  }
}

inline sim::WarpGroup& warp_group() { return sim::block->warp_groups.at(sim::thread->warp / 4); }
inline sim::Products& products_of_warp() { return sim::block->products[sim::thread->warp]; }

template <class Compute>
void collect_group(const char* what, Compute compute) {
  sim::collect(warp_group().group, what, sim::thread->index % 128, nullptr, nullptr, compute);
}

// Where the 128-byte swizzle puts what would lie at an address.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Eight numbers at a shared address, where the swizzle has put them.
template <Dtype T>
void read_eight(uint32_t address, float* to, int stride) {
  uint16_t eight[8];
  std::memcpy(eight, sim::shared_at(swizzled(address), 16, 16), 16);
  for (int i = 0; i < 8; i++) to[i * stride] = widen<T>(eight[i]);
}

inline void check_alignment(const TensorMap& map) {
  if (reinterpret_cast<uintptr_t>(map.base) % 16 || map.pitch % 8) sim::fail("a tensor map is not aligned to 16 bytes");
}

// What a descriptor of shared memory says, of which only the 128-byte swizzle is modelled.
struct Operand {
  uint32_t start, leading, stride;
  explicit Operand(uint64_t d)
      : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4) {
    if (d >> 49 != uint64_t(1) << 13) sim::fail("wgmma: only the 128-byte swizzle without an offset is modelled");
  }
  // ROWS x 16 numbers from row `first` on, of which the 16 of a row lie side by side.
  template <Dtype T, int ROWS>
  void rows(int first, float (*to)[16]) const {
    for (int i = 0; i < ROWS; i++)
      for (int k = 0, r = first + i; k < 16; k += 8)
        read_eight<T>(start + r / 8 * stride + r % 8 * 128 + k * 2, to[i] + k, 1);
  }
  // 16 x N numbers from column `first` on, of which the N of a row lie side by side, 64 of them in 128 bytes; to[n][k].
  template <Dtype T, int N>
  void columns(int first, float (*to)[16]) const {
    for (int k = 0; k < 16; k++)
      for (int i = 0, n = first; i < N; i += 8, n += 8)
        read_eight<T>(start + n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2, to[i] + k, 16);
  }
};

// What a thread gives to a product of its warpgroup.
struct Product {
  const uint32_t* registers;
  uint64_t a, b;
  bool add;
};

// A warp's 16 rows of a product. Nothing makes it wait for the other three. `fill_a(products, first row, a)` and
// `fill_b(b)` read the operands when the product is done.
template <int N, class FillA, class FillB>
void begin_product(const Product& product, float (&d)[N / 8][4], FillA fill_a, FillB fill_b) {
  sim::collect_warp("wgmma", &product, &d, [=](sim::Group& g) {
    sim::Products& own = products_of_warp();
    if (!own.fenced) sim::fail("wgmma: no fence since the last wait");
    std::vector<Product> products;
    for (const void* argument : g.argument) products.push_back(*static_cast<const Product*>(argument));
    auto& operands = warp_group().operands;
    if (own.begun == operands.size()) operands.push_back({product.a, product.b, product.add});
    for (const Product& p : products)
      if (operands[own.begun] != std::array<uint64_t, 3>{p.a, p.b, p.add})
        sim::fail("wgmma: threads disagree on operands");
    ++own.begun;
    const std::vector<void*> results = g.result;
    const auto multiply = [=, add = product.add, first = int(sim::thread->warp % 4 * 16)] {
      static thread_local float a[16][16], b[N][16];
      fill_a(products, first, a);
      fill_b(b);
      for (int lane = 0; lane < 32; lane++)
        for (int j = 0; j < N / 8; j++)
          for (int i = 0; i < 4; i++) {
            const float *row = a[lane / 4 + i / 2 * 8], *col = b[j * 8 + lane % 4 * 2 + i % 2];
            float sum = 0.0f;
            for (int k = 0; k < 16; k++) sum += row[k] * col[k];
            float& to = static_cast<float (*)[4]>(results[lane])[j][i];
            to = (add ? to : 0.0f) + sum;
          }
    };
    if (sim::products_are_done_at_once())
      multiply();
    else
      own.open.push_back(multiply);
  });
}
}  // namespace detail

inline void barrier_init(uint32_t barrier, int arrivals) {
  sim::shared_at(barrier, 8, 8);
  sim::block->barriers[barrier] = {arrivals, arrivals};
}

inline void barrier_publish(sim::Here here = sim::Here::current()) {
  if (!sim::wanted("fence of barriers", here)) return;
  for (auto& [address, barrier] : sim::block->barriers) barrier.published = true;
}

inline void barrier_arrive(uint32_t barrier, sim::Here here = sim::Here::current()) {
  if (sim::wanted("mbarrier.arrive", here)) detail::arrive(detail::barrier_at(barrier));
}

inline void barrier_arrive_expecting(uint32_t barrier, int bytes, sim::Here here = sim::Here::current()) {
  if (!sim::wanted("mbarrier.arrive.expect_tx", here)) return;
  sim::Barrier& b = detail::barrier_at(barrier);
  b.bytes += bytes;
  detail::arrive(b);
}

inline void barrier_wait(uint32_t barrier, uint32_t parity, sim::Here here = sim::Here::current()) {
  if (!sim::wanted("mbarrier.wait", here)) return;
  sim::Barrier& b = detail::barrier_at(barrier);
  while ((b.phase & 1) == parity) sim::sleep_on(b.phase);
}

inline void copy_box(uint32_t to, const TensorMap& from, uint32_t barrier, int feature, int row) {
  sim::shared_at(to, kBoxBytes, 1024);
  const auto land = [=] {
    for (int r = 0; r < 64; r++)
      for (int c = 0; c < 64; c += 8) {
        unsigned char* piece = sim::shared_at(detail::swizzled(to + r * 128 + c * 2), 16, 16);
        for (int i = 0; i < 8; i++) {
          const bool inside = row + r < from.rows && feature + c + i < from.depth;
          const uint16_t v = inside ? from.base[(row + r) * from.pitch + feature + c + i] : 0;
          std::memcpy(piece + i * 2, &v, 2);
        }
      }
    sim::show_to_copies(to, kBoxBytes);
    sim::Barrier& b = detail::barrier_at(barrier);
    b.bytes -= kBoxBytes;
    detail::end_phase_if_complete(b);
  };
  detail::check_alignment(from);
  if (!detail::barrier_at(barrier).published) sim::fail("a copy is to tell a barrier that is not published");
  if (sim::copies_land_at_once())
    land();
  else
    sim::block->landing.push_back(land);
}

inline void store_fence(sim::Here here = sim::Here::current()) {
  if (sim::wanted("fence.proxy.async", here)) sim::show_to_copies(0, sim::block->shared_bytes);
}

inline void store_box(const TensorMap& to, uint32_t from, int feature, int row) {
  const unsigned char* box = sim::shared_at(from, kBoxBytes, 1024);
  detail::check_alignment(to);
  if (std::memcmp(box, sim::block->fenced.data() + from, kBoxBytes))
    sim::fail("a box is stored that was written after the last fence");
  const std::vector<unsigned char> bytes(box, box + kBoxBytes);
  const auto land = [=] {
    for (int r = 0; r < 64 && row + r < to.rows; r++)
      for (int c = 0; c < 64 && feature + c < to.depth; c++)
        std::memcpy(const_cast<uint16_t*>(to.base) + (row + r) * to.pitch + feature + c,
                    bytes.data() + detail::swizzled(r * 128 + c / 8 * 16) + c % 8 * 2, 2);
  };
  const bool at_once = sim::copies_land_at_once();
  if (at_once) land();
  sim::thread->stores.push_back({box, bytes, sim::thread->committed_stores, at_once ? [] {} : std::function(land)});
}

inline void store_commit(sim::Here here = sim::Here::current()) {
  if (sim::wanted("cp.async.bulk.commit_group", here)) ++sim::thread->committed_stores;
}

namespace detail {
// All but the last `left` groups have been read from shared memory, and with `land` written.
inline void end_stores(int left, bool land) {
  auto& stores = sim::thread->stores;
  const auto ends = [=](const sim::Store& s) { return s.group < sim::thread->committed_stores - left; };
  for (sim::Store& store : stores) {
    if (!ends(store)) continue;
    if (!store.read && std::memcmp(store.from, store.bytes.data(), kBoxBytes))
      sim::fail("a box was overwritten before its store had read it");
    store.read = true;
    if (land) store.land();
  }
  if (land) stores.erase(std::remove_if(stores.begin(), stores.end(), ends), stores.end());
}
}  // namespace detail

template <int N>
void store_wait_read(sim::Here here = sim::Here::current()) {
  if (sim::wanted("cp.async.bulk.wait_group.read", here)) detail::end_stores(N, false);
}

template <int N>
void store_wait(sim::Here here = sim::Here::current()) {
  if (sim::wanted("cp.async.bulk.wait_group", here)) detail::end_stores(N, true);
}

inline void named_wait(int id, int threads, sim::Here here = sim::Here::current()) {
  if (sim::wanted("bar.sync", here)) detail::named("bar.sync", id, threads, true);
}

inline void named_arrive(int id, int threads, sim::Here here = sim::Here::current()) {
  if (sim::wanted("bar.arrive", here)) detail::named("bar.arrive", id, threads, false);
}

template <int N>
void fewer_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  detail::collect_group("setmaxnreg.dec", [](sim::Group&) {
    sim::WarpGroup& group = detail::warp_group();
    if (N > group.registers) sim::fail("setmaxnreg.dec to more registers than there are");
    sim::block->spare_registers += (group.registers - N) * 128;
    group.registers = N;
    ++sim::block->releases;
  });
}

template <int N>
void more_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  detail::collect_group("setmaxnreg.inc", [](sim::Group&) {
    sim::WarpGroup& group = detail::warp_group();
    if (N < group.registers) sim::fail("setmaxnreg.inc to fewer registers than there are");
    const int more = (N - group.registers) * 128;
    while (sim::block->spare_registers < more) sim::sleep_on(sim::block->releases);
    sim::block->spare_registers -= more;
    group.registers = N;
  });
}

inline void wgmma_fence(sim::Here here = sim::Here::current()) {
  if (sim::wanted("wgmma.fence", here)) detail::products_of_warp().fenced = true;
}

inline void wgmma_commit(sim::Here here = sim::Here::current()) {
  if (!sim::wanted("wgmma.commit_group", here)) return;
  sim::collect_warp("wgmma.commit_group", nullptr, nullptr, [](sim::Group&) {
    sim::Products& own = detail::products_of_warp();
    own.committed.push_back(std::move(own.open));
    own.open.clear();
  });
}

template <int N>
void wgmma_wait(sim::Here here = sim::Here::current()) {
  if (!sim::wanted("wgmma.wait_group", here)) return;
  sim::collect_warp("wgmma.wait_group", nullptr, nullptr, [](sim::Group&) {
    sim::Products& own = detail::products_of_warp();
    for (; own.committed.size() > N; own.committed.erase(own.committed.begin()))
      for (const auto& multiply : own.committed.front()) multiply();
    own.fenced = false;
  });
}

inline uint32_t renewed(uint32_t v) { return v; }

template <int K>
void wgmma_keep(float (&)[K][4]) {}

template <Dtype T, int N, bool COLUMNS_A = false, bool COLUMNS_B = false>
void wgmma_shared(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add) {
  using Products = std::vector<detail::Product>;
  const detail::Operand rows(a), cols(b);
  const auto fill_a = [=](const Products&, int first, float (*to)[16]) {
    COLUMNS_A ? rows.columns<T, 16>(first, to) : rows.rows<T, 16>(first, to);
  };
  detail::begin_product<N>({nullptr, a, b, add}, d, fill_a,
                           [=](float (*to)[16]) { COLUMNS_B ? cols.columns<T, N>(0, to) : cols.rows<T, N>(0, to); });
}

template <Dtype T, int N>
void wgmma_registers(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  const detail::Operand cols(b);
  const auto from_registers = [](const std::vector<detail::Product>& products, int, float (*to)[16]) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++)
          to[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + half] =
              widen<T>(uint16_t(products[lane].registers[i] >> 16 * half));
  };
  detail::begin_product<N>({a, 0, b, add}, d, from_registers, [=](float (*to)[16]) { cols.columns<T, N>(0, to); });
}

}  // namespace fastcl::ptx
