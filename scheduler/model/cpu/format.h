// The inner step of a product in float32 or bfloat16: lanes of one operand times one element of the other.

#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vector.h"

namespace softbatch {

// How numbers of type W are multiplied: kDepth of them at once in each 32-bit lane, against one Element for all lanes.
template <typename W>
struct Format;

template <>
struct Format<float> {
  static constexpr int kDepth = 1;
  using Element = float;
  // `count` numbers as elements, in `to`.
  static INLINE void elements(const float* x, int64_t count, Element* to) { std::memcpy(to, x, count * sizeof *to); }
  static INLINE Vec lanes(const void* p) { return load(static_cast<const float*>(p)); }
  static INLINE Vec interleave(const Vec* rows) { return rows[0]; }
  static INLINE Vec add(Vec sum, Vec lanes, Element x) { return sum + lanes * x; }
};

template <>
struct Format<at::BFloat16> {
  static constexpr int kDepth = 2;
  static INLINE Bits lanes(const void* p) {
    Bits v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
#if defined(__AVX512BF16__)
  using Element = uint32_t;
  static INLINE void elements(const float* x, int64_t count, Element* to) {
    narrow_row(x, count, reinterpret_cast<at::BFloat16*>(to));
  }
  // Two rows of float32 as one of pairs.
  static INLINE Vec interleave(const Vec* rows) {
    return (Vec)(rounded(rows[0]) >> 16 | (rounded(rows[1]) & 0xffff0000u));
  }
  static INLINE Vec add(Vec sum, Bits lanes, Element x) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lanes, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)));
  }
#else
  struct Element {
    float low, high;
  };
  static INLINE void elements(const float* x, int64_t count, Element* to) {
    for (int64_t i = 0; i < count; i += 2)
      to[i / 2] = {static_cast<float>(at::BFloat16(x[i])), static_cast<float>(at::BFloat16(x[i + 1]))};
  }
  static INLINE Vec add(Vec sum, Bits lanes, Element x) {
    return sum + (Vec)(lanes << 16) * x.low + (Vec)(lanes & 0xffff0000u) * x.high;
  }
#endif
};

}  // namespace softbatch
