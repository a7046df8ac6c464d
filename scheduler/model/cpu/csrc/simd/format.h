// The inner step of a product in float32 or bfloat16: lanes of one operand times one element of the other.

#pragma once

#include <type_traits>

#include "simd/vector.h"

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
  static INLINE void zip(Vec*) {}
  static INLINE Vec add(Vec sum, Vec lanes, Element x) { return sum + lanes * x; }
  static INLINE Vec dot(Vec sum, Vec a, Vec b) { return sum + a * b; }
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
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);  // the second operand's come first
    return (Vec)braided((Halves)both, std::make_integer_sequence<int, 2 * kLanes>{});
  }
  // Two rows of bfloat16 numbers as pairs of one of each: those of the first half of the columns, then the others.
  static INLINE void zip(Bits* rows) {
    const Bits a = rows[0], b = rows[1];
    rows[0] = zipped<0>(a, b, std::make_integer_sequence<int, 2 * kLanes>{});
    rows[1] = zipped<kLanes>(a, b, std::make_integer_sequence<int, 2 * kLanes>{});
  }
  static INLINE Vec dot(Vec sum, Bits a, Bits b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static INLINE Vec add(Vec sum, Bits lanes, Element x) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lanes, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)));
  }

 private:
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 4)));

  template <int... I>
  static INLINE Bits braided(Halves v, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return (Bits)__builtin_shufflevector(v, v, (I / 2 + I % 2 * kLanes)...);
#else
    return (Bits)__builtin_shuffle(v, Halves{uint16_t(I / 2 + I % 2 * kLanes)...});
#endif
  }

  template <int First, int... I>
  static INLINE Bits zipped(Bits a, Bits b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return (Bits)__builtin_shufflevector((Halves)a, (Halves)b, (First + I / 2 + I % 2 * 2 * kLanes)...);
#else
    return (Bits)__builtin_shuffle((Halves)a, (Halves)b, Halves{uint16_t(First + I / 2 + I % 2 * 2 * kLanes)...});
#endif
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

// How attention multiplies numbers of a cache: bfloat16 directly if the processor can, everything else as float32.
#if defined(__AVX512BF16__)
template <typename T>
using FormatOf = Format<std::conditional_t<std::is_same_v<T, at::BFloat16>, at::BFloat16, float>>;
#else
template <typename T>
using FormatOf = Format<float>;
#endif

}  // namespace softbatch
