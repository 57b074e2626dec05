// What the wrappers of cuda/ptx.cuh do, on the simulator. The layouts of fragments are those of the PTX ISA, sections on
// ldmatrix and mma.m16n8k16.
#pragma once

#include "../elements.hpp"
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

}  // namespace fastcl::ptx
