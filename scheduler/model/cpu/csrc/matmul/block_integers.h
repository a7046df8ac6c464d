// Activations as 16-bit integers with a scale for every 32, and their products with bytes, which are exact.
//
// Where bytes are multiplied by bytes (VNNI), an activation is two of them, 256 * coarse + fine; elsewhere 16-bit
// integers are multiplied in pairs.

#pragma once

#include "matmul/block_groups.h"

namespace softbatch {

struct BlockIntegers {
  using Ints = BlockGroups::Ints;
  using Bytes = BlockGroups::Bytes;
  static constexpr int kSteps = kBlockGroup / 4;  // of four inputs
  static constexpr float kMost = 127 * 256 + 127, kLeast = 1e-30f;

  // A row's group of 32. `minus` are the sums of its integers, negative: of all, and of either half.
  struct Row {
    float scale, scaled_sum;
    int32_t minus[3];
    int32_t first[kSteps], other[kSteps];
  };

  static INLINE uint32_t sum_of(Bits v) {
    if constexpr (kLanes > 8) v += (Bits)swapped<8>((Vec)v);
    if constexpr (kLanes > 4) v += (Bits)swapped<4>((Vec)v);
    v += (Bits)swapped<2>((Vec)v);
    v += (Bits)swapped<1>((Vec)v);
    return v[0];
  }

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  static constexpr int kShift = 8;  // of the first integers' sums against the others'
  static constexpr bool kTakesApart = false;

  static INLINE void split(const int32_t* integers, Row& to) {
    for (int i = 0; i < kBlockGroup; i += kLanes) {
      Ints all;
      std::memcpy(&all, integers + i, sizeof all);
      const Ints low = all << 24 >> 24;
      const Bytes fine = (Bytes)_mm512_cvtepi32_epi8((__m512i)low);
      const Bytes coarse = (Bytes)_mm512_cvtepi32_epi8((__m512i)((all - low) >> 8));
      std::memcpy(reinterpret_cast<char*>(to.first) + i, &coarse, sizeof coarse);
      std::memcpy(reinterpret_cast<char*>(to.other) + i, &fine, sizeof fine);
    }
  }

  // A vector of bytes as what the first and the other integers are multiplied by.
  static INLINE Bits first_of(Bits bytes) { return bytes; }
  static INLINE Bits other_of(Bits bytes) { return bytes; }

  static INLINE Ints add(Ints sum, Bits w, int32_t x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
  }
#else
  static constexpr int kShift = 0;
  static constexpr bool kTakesApart = true;  // bytes are not multiplied as they are

  // Of every four integers the first and the third, then the others.
  static INLINE void split(const int32_t* integers, Row& to) {
    int16_t first[2 * kSteps], other[2 * kSteps];
    for (int i = 0; i < 2 * kSteps; ++i) {
      first[i] = static_cast<int16_t>(integers[2 * i]);
      other[i] = static_cast<int16_t>(integers[2 * i + 1]);
    }
    std::memcpy(to.first, first, sizeof first);
    std::memcpy(to.other, other, sizeof other);
  }

  // Every other byte as a 16-bit integer.
  static INLINE Bits first_of(Bits bytes) { return bytes & 0x00ff00ffu; }
  static INLINE Bits other_of(Bits bytes) { return bytes >> 8 & 0x00ff00ffu; }

  static INLINE Ints add(Ints sum, Bits w, int32_t x) {
#if defined(__AVX512BW__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__) && !defined(__AVX512F__)  // whose vectors are of 512 bits
    return sum + (Ints)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
#else
    return sum + (Ints)(w & 0xffffu) * static_cast<int32_t>(static_cast<int16_t>(x)) + (Ints)(w >> 16) * (x >> 16);
#endif
  }
#endif

  // Half `kPart` of `kParts` of a group times a row's integers, less `kZero` times each integer: exact.
  template <int kPart, int kParts, int kZero>
  static INLINE void multiply(const Bits (&numbers)[2 * kSteps], const Row& row, Ints (&found)[2]) {
    constexpr int kFirst = kPart * kSteps / kParts;
    Ints first[2] = {}, other[2] = {};
    if constexpr (kZero > 0) other[0] = other[1] = (Ints{} + row.minus[kParts == 1 ? 0 : 1 + kPart]) * kZero;
    unrolled<kSteps / kParts>([&](auto i) ALWAYS_INLINE {
      constexpr int k = kFirst + i;
      first[0] = add(first[0], first_of(numbers[2 * k]), row.first[k]);
      first[1] = add(first[1], first_of(numbers[2 * k + 1]), row.first[k]);
      other[0] = add(other[0], other_of(numbers[2 * k]), row.other[k]);
      other[1] = add(other[1], other_of(numbers[2 * k + 1]), row.other[k]);
    });
    found[0] = (first[0] << kShift) + other[0];
    found[1] = (first[1] << kShift) + other[1];
  }
};

}  // namespace softbatch
