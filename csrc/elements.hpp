// Numbers of 16 bits, which the compiler need not know. Bodies are static, as kernels.hpp asks.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fastcl {

#define FASTCL_INLINE static inline __attribute__((always_inline))

FASTCL_INLINE float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

FASTCL_INLINE uint32_t as_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

FASTCL_INLINE float from_bf16(uint16_t v) { return as_float(uint32_t(v) << 16); }

FASTCL_INLINE float from_f16(uint16_t v) {
  // Shifted into place the exponent is 112 too small; a product with 2^112 mends it, subnormal numbers included.
  const uint32_t bits = uint32_t(v & 0x7fff) << 13;
  const bool finite = bits < 0x0f800000;
  const float f = finite ? as_float(bits) * 0x1p112f : as_float(bits | 0x7f800000);
  return v & 0x8000 ? -f : f;
}

// To the nearest, ties to even. A carry out of the mantissa enters the exponent, as it should.
FASTCL_INLINE uint16_t to_bf16(float f) {
  const uint32_t bits = as_bits(f);
  if (f != f) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

FASTCL_INLINE uint16_t to_f16(float f) {
  const uint32_t sign = as_bits(f) >> 16 & 0x8000, bits = as_bits(f) & 0x7fffffff;
  if (f != f) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // from 65,520 on
  // Below 2^-14 there is one spacing, 2^-24, which is that of fp32 at 1/2: the sum rounds, and its low bits
  // are the result.
  if (bits < 0x38800000) return uint16_t(sign | (as_bits(as_float(bits) + 0.5f) - as_bits(0.5f)));
  return uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

}  // namespace fastcl
