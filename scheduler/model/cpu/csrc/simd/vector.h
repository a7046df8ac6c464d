// float32 vectors, and the loads and stores that convert to and from a cache's dtype.
//
// GCC/Clang vector extensions rather than intrinsics: one source serves AVX-512, AVX2, NEON and plain SSE2.

#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace softbatch {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Short __attribute__((vector_size(kLanes * 2)));

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

// Calls f with each of 0 ... Count - 1 as a constant of its own, so that arrays indexed by it can be registers.
template <typename F, int... I>
INLINE void unrolled(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int Count, typename F>
INLINE void unrolled(const F& f) {
  unrolled(f, std::make_integer_sequence<int, Count>{});
}

INLINE Vec fill(float x) { return Vec{} + x; }

INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE Bits widen(Short v) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32((__m256i)v);  // GCC makes four instructions of the conversion
#else
  return __builtin_convertvector(v, Bits);
#endif
}

INLINE Bits load_shorts(const void* p) {
  Short v;
  std::memcpy(&v, p, sizeof v);
  return widen(v);
}

INLINE Vec load(const at::BFloat16* p) { return (Vec)(load_shorts(p) << 16); }

INLINE Vec load(const at::Half* p) {
  const Bits bits = load_shorts(p);
  const Bits magnitude = (bits & 0x7fff) << 13;
  const Bits sign = (bits & 0x8000) << 16;
  const Vec finite = (Vec)magnitude * 0x1p112f;  // moves the exponent's bias, denormals included
  const Bits special = magnitude | 0x7f800000;   // infinities and NaNs keep the full exponent
  return (Vec)((magnitude >= 0x0f800000 ? special : (Bits)finite) | sign);
}

INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// The nearest bfloat16 numbers, ties to even.
INLINE Short narrow(Vec v) {
#if defined(__AVX512BF16__)
  return (Short)_mm512_cvtneps_pbh((__m512)v);
#else
  const Bits bits = (Bits)v;
  const Bits rounded = v == v ? bits + 0x7fff + ((bits >> 16) & 1) : Bits{} + 0x7fc00000;
  return __builtin_convertvector(rounded >> 16, Short);
#endif
}

INLINE void store(at::BFloat16* p, Vec v) {
  const Short s = narrow(v);
  std::memcpy(p, &s, sizeof s);
}

INLINE void store(at::Half* p, Vec v) {
  for (int i = 0; i < kLanes; ++i)
    p[i] = static_cast<at::Half>(v[i]);
}

template <typename T>
INLINE void widen_row(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(to + i, load(from + i));
  for (; i < count; ++i)
    to[i] = static_cast<float>(from[i]);
}

template <typename T>
INLINE void narrow_row(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(to + i, load(from + i));
  for (; i < count; ++i)
    to[i] = static_cast<T>(from[i]);
}

// b if either is NaN.
INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

INLINE bool same(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmpneq_ps_mask((__m512)a, (__m512)b) == 0;
#else
  bool all = true;
  for (int i = 0; i < kLanes; ++i)
    all &= a[i] == b[i];
  return all;
#endif
}

// Lanes of a and b picked by index: 0 ... kLanes - 1 are a's, the rest b's.
template <typename F, int... I>
INLINE Vec pick(Vec a, Vec b, F index, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index(I)...);
#else
  return __builtin_shuffle(a, b, Bits{static_cast<uint32_t>(index(I))...});
#endif
}

// Adds up lanes whose indices differ in bit W: of a if that bit is 0, of b if it is 1.
template <int W>
INLINE Vec fold(Vec a, Vec b) {
  if constexpr (W >= kLanes) {
    return a;
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
    return pick(
               a, b, [](int i) { return i & W ? (i ^ W) + kLanes : i; }, lanes) +
           pick(
               a, b, [](int i) { return i & W ? i + kLanes : i ^ W; }, lanes);
  }
}

// Exchanges rows and columns of a square, by ever larger blocks.
template <int W = 1>
INLINE void transpose(Vec* rows) {
  if constexpr (W < kLanes) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & W) continue;
      const Vec a = rows[i], b = rows[i | W];
      rows[i] = pick(
          a, b, [](int i) { return i & W ? (i ^ W) + kLanes : i; }, lanes);
      rows[i | W] = pick(
          a, b, [](int i) { return i & W ? i + kLanes : i ^ W; }, lanes);
    }
    transpose<2 * W>(rows);
  }
}

INLINE float sum(Vec v) {
  v = fold<2>(fold<1>(v, v), fold<1>(v, v));
  return fold<8>(fold<4>(v, v), fold<4>(v, v))[0];
}

template <int W>
INLINE Vec swapped(Vec v) {
  return pick(
      v, v, [](int i) { return i ^ W; }, std::make_integer_sequence<int, kLanes>{});
}

INLINE float largest(Vec v) {
  if constexpr (kLanes > 8) v = max(v, swapped<8>(v));
  if constexpr (kLanes > 4) v = max(v, swapped<4>(v));
  v = max(v, swapped<2>(v));
  return max(v, swapped<1>(v))[0];
}

INLINE Vec magnitude(Vec v) { return (Vec)((Bits)v & 0x7fffffffu); }

// exp2 requires x <= 0, and rounding may end up above. NaN stays NaN.
INLINE Vec min_zero(Vec x) { return x > 0.0f ? Vec{} : x; }

// 2^x for x <= 0 to about 1 ulp, and exactly 0 from -127 down, so that a masked key has no weight. NaN stays NaN.
INLINE Vec exp2(Vec x) {
  x = max(fill(-127.0f), x);
  const Vec shifted = x + 0x1.8p23f;  // its low mantissa bits hold round(x)
  const Vec r = x - (shifted - 0x1.8p23f);
  Vec y = fill(1.54035304e-4f);  // ln(2)^k / k!
  y = y * r + 1.33335581e-3f;
  y = y * r + 9.61812911e-3f;
  y = y * r + 5.55041087e-2f;
  y = y * r + 2.40226507e-1f;
  y = y * r + 6.93147181e-1f;
  y = y * r + 1.0f;
  return y * (Vec)(((Bits)shifted << 23) + (127u << 23));
}

INLINE Vec tanh(Vec x) {
  const Vec size = magnitude(x), e = exp2(size * -2.88539008f);  // 2 log2(e)
  const Vec whole = (fill(1.0f) - e) / (fill(1.0f) + e);
  const Vec square = x * x;  // near 0 the difference above would lose digits
  Vec y = fill(62.0f / 2835.0f);
  y = y * square - 17.0f / 315.0f;
  y = y * square + 2.0f / 15.0f;
  y = y * square - 1.0f / 3.0f;
  y = x + x * square * y;
  return size < 0.3f ? y : x < 0.0f ? -whole : whole;
}

// Tells the processor that this thread waits in a loop.
inline void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace softbatch
