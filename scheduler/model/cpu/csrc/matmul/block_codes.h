// MXFP4: numbers as codes of four bits (E2M1), scales as powers of two (E8M0).
//
// Twice a number is a whole one, so it is multiplied as the other kinds' are, by half of its scale.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "simd/vector.h"

namespace softbatch {

struct BlockCodes {
  static constexpr int kZero = 12;
  // What each code stands for, doubled, above kZero: 0, 0.5, 1, 1.5, 2, 3, 4 and 6, then the same below it.
  alignas(16) static constexpr uint8_t kNumbers[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

  static INLINE float half_scale(uint8_t exponent) {
    const uint32_t bits = exponent < 2 ? (exponent + 1u) << 21 : (exponent - 1u) << 23;  // subnormal below 2
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return scale;
  }
  static INLINE Vec half_scales(Bits exponents) {
    typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
    const Ints e = (Ints)exponents;
    return (Vec)(e < 2 ? (e + 1) << 21 : (e - 1) << 23);
  }

  // The numbers of a vector of bytes below 16.
  static INLINE Bits numbers(Bits codes) {
#if defined(__AVX512BW__)
    const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kNumbers)));
    return (Bits)_mm512_shuffle_epi8(table, (__m512i)codes);
#elif defined(__AVX2__) && !defined(__AVX512F__)  // whose vectors are of 512 bits
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kNumbers)));
    return (Bits)_mm256_shuffle_epi8(table, (__m256i)codes);
#else
    typedef uint8_t Each __attribute__((vector_size(kLanes * 4)));
    const Each none = {}, zero = none + uint8_t(kZero), each = (Each)codes, size = each & 7;
    const Each twice = size + (size > 4 ? size - 4 : none) + (size > 6 ? none + 2 : none);
    return (Bits)(each > 7 ? zero - twice : zero + twice);
#endif
  }
};

}  // namespace softbatch
