// The inner step of every product: lanes of one operand times one element of the other, added to the sums so far.

#pragma once

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstring>

#include "vector.h"

namespace softbatch {

// How numbers of type W are multiplied: kDepth of them at once in each 32-bit lane, against one Element for all lanes.
template <typename W>
struct Format;

template <>
struct Format<float> {
  static constexpr int kDepth = 1;
  using Element = float;
  using Sum = Vec;
  // `count` numbers as elements, in `to`.
  static INLINE void elements(const float* x, int64_t count, float, Element* to) {
    std::memcpy(to, x, count * sizeof *to);
  }
  static INLINE Vec weights(const float* w) { return load(w); }
  static INLINE Vec lanes(const float* words) { return load(words); }
  static INLINE Vec interleave(const Vec* rows) { return rows[0]; }
  static INLINE Vec add(Vec sum, Vec w, Element x) { return sum + w * x; }
};

template <>
struct Format<at::BFloat16> {
  static constexpr int kDepth = 2;
  using Sum = Vec;
  static INLINE Bits weights(const at::BFloat16* w) {
    Bits v;
    std::memcpy(&v, w, sizeof v);
    return v;
  }
#if defined(__AVX512BF16__)
  using Element = uint32_t;
  static INLINE Bits lanes(const float* words) { return (Bits)load(words); }
  // Two rows of float32 as one of pairs.
  static INLINE Vec interleave(const Vec* rows) {
    return (Vec)(rounded(rows[0]) >> 16 | (rounded(rows[1]) & 0xffff0000u));
  }
  static INLINE void elements(const float* x, int64_t count, float, Element* to) {
    narrow_row(x, count, reinterpret_cast<at::BFloat16*>(to));
  }
  static INLINE Vec add(Vec sum, Bits w, Element x) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)));
  }
#else
  struct Element {
    float low, high;
  };
  static INLINE void elements(const float* x, int64_t count, float, Element* to) {
    for (int64_t i = 0; i < count; i += 2)
      to[i / 2] = {static_cast<float>(at::BFloat16(x[i])), static_cast<float>(at::BFloat16(x[i + 1]))};
  }
  static INLINE Vec add(Vec sum, Bits w, Element x) {
    return sum + (Vec)(w << 16) * x.low + (Vec)(w & 0xffff0000u) * x.high;
  }
#endif
};

// Row r of the activations is quantised by its own scale, x = scale[r] * (element - kZero).
template <>
struct Format<int8_t> {
  static constexpr int kDepth = 4;
  static INLINE Bits weights(const int8_t* w) {
    Bits v;
    std::memcpy(&v, w, sizeof v);
    return v;
  }
#if defined(__AVX512VNNI__)
  typedef int32_t Sum __attribute__((vector_size(kLanes * 4)));
  using Element = uint32_t;
  static constexpr int kZero = 128;  // the instruction takes unsigned activations
  static INLINE void elements(const float* x, int64_t count, float inverse, Element* to) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(to);
    for (int64_t i = 0; i < count; ++i)
      bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint(x[i] * inverse)) + kZero);
  }
  static INLINE Sum add(Sum sum, Bits w, Element x) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(static_cast<int>(x)), (__m512i)w);
  }
#else
  using Sum = Vec;
  static constexpr int kZero = 0;
  struct Element {
    float x[4];
  };
  static INLINE void elements(const float* x, int64_t count, float inverse, Element* to) {
    for (int64_t i = 0; i < count; ++i)
      to[i / 4].x[i % 4] = std::nearbyint(x[i] * inverse);
  }
  static INLINE Vec add(Vec sum, Bits w, const Element& x) {
    typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
    for (int i = 0; i < 4; ++i)
      sum += __builtin_convertvector((Ints)(w << (24 - 8 * i)) >> 24, Vec) * x.x[i];
    return sum;
  }
#endif
};

}  // namespace softbatch
