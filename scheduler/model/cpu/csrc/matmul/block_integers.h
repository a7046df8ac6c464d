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
  static constexpr int kSteps = kBlockGroup / 4, kVectorBytes = BlockGroups::kVectorBytes;
  static constexpr float kMost = 127 * 256 + 127, kLeast = 1e-30f;

  static INLINE Bits bits_at(const uint8_t* p) { return BlockGroups::bits_at(p); }

  static INLINE uint32_t sum_of(Bits v) {
    if constexpr (kLanes > 8) v += (Bits)swapped<8>((Vec)v);
    if constexpr (kLanes > 4) v += (Bits)swapped<4>((Vec)v);
    v += (Bits)swapped<2>((Vec)v);
    v += (Bits)swapped<1>((Vec)v);
    return v[0];
  }

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  static constexpr int kShift = 8;  // of the first integers' sums against the others'

  static INLINE void split(const int32_t* integers, char* coarse, char* fine) {
    for (int i = 0; i < kBlockGroup; i += kLanes) {
      Ints all;
      std::memcpy(&all, integers + i, sizeof all);
      const Ints low = all << 24 >> 24;
      const Bytes of_low = (Bytes)_mm512_cvtepi32_epi8((__m512i)low);
      const Bytes of_high = (Bytes)_mm512_cvtepi32_epi8((__m512i)((all - low) >> 8));
      std::memcpy(fine + i, &of_low, sizeof of_low);
      std::memcpy(coarse + i, &of_high, sizeof of_high);
    }
  }
  static INLINE Ints add_first(Ints sum, Bits w, int32_t x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
  }
  static INLINE Ints add_other(Ints sum, Bits w, int32_t x) { return add_first(sum, w, x); }
#else
  static constexpr int kShift = 0;

  // Of every four integers the first and the third, then the others.
  static INLINE void split(const int32_t* integers, char* even, char* odd) {
    for (int i = 0; i < kBlockGroup; i += 2) {
      const int16_t pair[2] = {static_cast<int16_t>(integers[i]), static_cast<int16_t>(integers[i + 1])};
      std::memcpy(even + i, pair, sizeof pair[0]);
      std::memcpy(odd + i, pair + 1, sizeof pair[1]);
    }
  }
  // Bytes 0 and 2 of every lane times a pair of integers.
  static INLINE Ints add_first(Ints sum, Bits w, int32_t x) {
    const Bits numbers = w & 0x00ff00ffu;
#if defined(__AVX512BW__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)numbers, _mm512_set1_epi32(x));
#elif defined(__AVX2__) && !defined(__AVX512F__)  // whose vectors are of 512 bits
    return sum + (Ints)_mm256_madd_epi16((__m256i)numbers, _mm256_set1_epi32(x));
#else
    return sum + (Ints)(numbers & 0xffffu) * static_cast<int32_t>(static_cast<int16_t>(x)) + (Ints)(numbers >> 16) * (x >> 16);
#endif
  }
  static INLINE Ints add_other(Ints sum, Bits w, int32_t x) { return add_first(sum, w >> 8, x); }
#endif

  // acc[m]: the sums of bytes times integers, exactly. With few rows both kinds of integers are summed side by side.
  template <int M>
  static INLINE void multiply(const uint8_t* w, int steps, const int32_t* first, const int32_t* other,
                                       Ints (&acc)[M][2]) {
    constexpr bool kTogether = 2 * M <= kTile;
    Ints rest[kTogether ? M : 1][2] = {};
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m)
      acc[m][0] = acc[m][1] = Ints{};
    for (int k = 0; k < steps; ++k) {
      const Bits w0 = bits_at(w + 2 * k * kVectorBytes), w1 = bits_at(w + (2 * k + 1) * kVectorBytes);
#pragma GCC unroll 14
      for (int m = 0; m < M; ++m) {
        acc[m][0] = add_first(acc[m][0], w0, first[m * kSteps + k]);
        acc[m][1] = add_first(acc[m][1], w1, first[m * kSteps + k]);
        if constexpr (kTogether) {
          rest[m][0] = add_other(rest[m][0], w0, other[m * kSteps + k]);
          rest[m][1] = add_other(rest[m][1], w1, other[m * kSteps + k]);
        }
      }
    }
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m) {
      acc[m][0] <<= kShift;
      acc[m][1] <<= kShift;
      if constexpr (kTogether) {
        acc[m][0] += rest[m][0];
        acc[m][1] += rest[m][1];
      }
    }
    if constexpr (kTogether) return;
    for (int k = 0; k < steps; ++k) {
      const Bits w0 = bits_at(w + 2 * k * kVectorBytes), w1 = bits_at(w + (2 * k + 1) * kVectorBytes);
#pragma GCC unroll 14
      for (int m = 0; m < M; ++m) {
        acc[m][0] = add_other(acc[m][0], w0, other[m * kSteps + k]);
        acc[m][1] = add_other(acc[m][1], w1, other[m * kSteps + k]);
      }
    }
  }
};

}  // namespace softbatch
