// How weights and activations lie in memory for a product, and the kernel that multiplies them so.
//
// A panel holds kColumns outputs of a weight matrix in the order in which the kernel reads them; a tile holds up to
// kTile rows of activations, interleaved. Each output is summed in the order of its inputs, whatever the batch, so a
// row's result does not depend on who shares its step.

#pragma once

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>

#include "format.h"
#include "work.h"

namespace softbatch {

constexpr int kColumns = 2 * kLanes;
#if defined(__AVX512F__)
constexpr int kTile = 14;  // 28 accumulators, two vectors of weights and one activation fill 32 registers
#elif defined(__aarch64__)
constexpr int kTile = 12;
#else
constexpr int kTile = 6;  // 16 registers
#endif

// While one panel is multiplied, the next is fetched into the cache: a small batch is bound by memory.
struct Ahead {
  const char* next;
  int64_t step;  // 0: nothing to fetch

  INLINE void fetch(int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64)
      __builtin_prefetch(next + line, 0, 2);
    next += step ? bytes : 0;
  }
};

template <typename W>
struct Layout {
  using F = Format<W>;
  using Element = typename F::Element;
  static constexpr int64_t kInputs = F::kDepth;  // the number of inputs must be a multiple of this

  static int64_t panel_bytes(int64_t inputs) { return inputs * kColumns * sizeof(W); }
  static int64_t row_bytes(int64_t inputs) { return inputs / F::kDepth * sizeof(Element); }

  // Writes column `column` of a panel: float32 weights [inputs], or null for zeros.
  static void pack(const float* from, int64_t inputs, int64_t column, char* panel) {
    W* to = reinterpret_cast<W*>(panel) + column * F::kDepth;
    for (int64_t k = 0; k < inputs; ++k)
      to[k / F::kDepth * kColumns * F::kDepth + k % F::kDepth] = from ? static_cast<W>(from[k]) : W(0);
  }

  // Writes row `row` of a tile of `rows`: float32 values [inputs].
  static INLINE void put(const float* values, int64_t inputs, int64_t row, int64_t rows, char* tile) {
    const int64_t depth = inputs / F::kDepth;
    Element* elements = reinterpret_cast<Element*>(scratch(row_bytes(inputs) / sizeof(float)));
    F::elements(values, inputs, elements);
    Element* to = reinterpret_cast<Element*>(tile) + row;
    for (int64_t k = 0; k < depth; ++k)
      to[k * rows] = elements[k];
  }

  // sums[m][0 ... kColumns - 1] for the M rows of a tile.
  template <int M>
  static void multiply(const char* tile, const char* panel, int64_t inputs, Ahead ahead, float* sums) {
    constexpr int64_t kStep = kColumns * F::kDepth * sizeof(W);
    const Element* x = reinterpret_cast<const Element*>(tile);
    Vec acc[M][2] = {};
    for (int64_t k = 0; k < inputs / F::kDepth; ++k, panel += kStep, x += M) {
      const auto w0 = F::lanes(panel), w1 = F::lanes(panel + kStep / 2);
      ahead.fetch(kStep);
#pragma GCC unroll 14
      for (int m = 0; m < M; ++m) {
        acc[m][0] = F::add(acc[m][0], w0, x[m]);
        acc[m][1] = F::add(acc[m][1], w1, x[m]);
      }
    }
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m) {
      store(sums + m * kColumns, acc[m][0]);
      store(sums + m * kColumns + kLanes, acc[m][1]);
    }
  }
};

// 8-bit integers with a scale for every kGroup inputs, of each weight row and of each activation row alike: one scale
// a row would drown most activations in the few large ones. Weights are stored from 0 to 255, as the processors'
// instruction wants one operand; each group of a tile says what that adds to its sums.
template <>
struct Layout<int8_t> {
  static constexpr int64_t kInputs = 32;
  static constexpr int kGroup = 32;
  static constexpr int kZero = 128;
  static constexpr int64_t kStep = 4 * kColumns;                                   // four inputs of a panel
  static constexpr int64_t kGroupBytes = kGroup * kColumns + kColumns * sizeof(float);  // with its scales, first
  static constexpr int64_t kRowBytes = kGroup + 2 * sizeof(float);  // a row's share of a tile's group, the same
  typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

  static int64_t panel_bytes(int64_t inputs) { return inputs / kGroup * kGroupBytes; }
  static int64_t row_bytes(int64_t inputs) { return inputs / kGroup * kRowBytes; }

  static float largest(const float* x) {
    float found = 0;
    for (int i = 0; i < kGroup; ++i)
      found = std::max(found, std::abs(x[i]));
    return found;
  }

  static void pack(const float* from, int64_t inputs, int64_t column, char* panel) {
    for (int64_t g = 0; g < inputs / kGroup; ++g, panel += kGroupBytes) {
      const float most = from ? largest(from + g * kGroup) : 0.0f, inverse = most > 0 ? 127 / most : 0;
      reinterpret_cast<float*>(panel)[column] = most / 127;
      uint8_t* to = reinterpret_cast<uint8_t*>(panel) + kColumns * sizeof(float) + column * 4;
      for (int k = 0; k < kGroup; ++k) {
        const float scaled = from ? from[g * kGroup + k] * inverse : 0.0f;
        to[k / 4 * kStep + k % 4] = static_cast<uint8_t>(static_cast<int>(std::nearbyint(scaled)) + kZero);
      }
    }
  }

  static INLINE void put(const float* values, int64_t inputs, int64_t row, int64_t rows, char* tile) {
    for (int64_t g = 0; g < inputs / kGroup; ++g, tile += rows * kRowBytes, values += kGroup) {
      const float most = largest(values), inverse = most > 0 ? 127 / most : 0;
      int8_t bytes[kGroup];
      int sum = 0;
      float nothing = 0;  // NaN where a value is not finite, which must not come out looking like a number
      for (int k = 0; k < kGroup; ++k) {
        const float shifted = values[k] * inverse + 0x1.8p23f;  // its low mantissa bits hold the nearest integer
        uint32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        bytes[k] = static_cast<int8_t>(bits);
        sum += bytes[k];
        nothing += values[k] * 0.0f;
      }
      float* scales = reinterpret_cast<float*>(tile);
      int32_t* zeros = reinterpret_cast<int32_t*>(scales + rows);
      scales[row] = most / 127 + nothing;
      zeros[row] = -kZero * sum;
      for (int k = 0; k < kGroup / 4; ++k)
        std::memcpy(zeros + rows * (1 + k) + row, bytes + 4 * k, 4);
    }
  }

  static INLINE Ints add(Ints sum, Bits w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#else
    for (int i = 0; i < 4; ++i)
      sum += (Ints)(w >> 8 * i & 0xff) * static_cast<int32_t>(static_cast<int8_t>(x >> 8 * i));
    return sum;
#endif
  }

  template <int M>
  static void multiply(const char* tile, const char* panel, int64_t inputs, Ahead ahead, float* sums) {
    Vec total[M][2] = {};
    for (int64_t g = 0; g < inputs / kGroup; ++g) {
      const float* scales = reinterpret_cast<const float*>(tile);
      const int32_t* zeros = reinterpret_cast<const int32_t*>(scales + M);
      const int32_t* x = zeros + M;
      const float* columns = reinterpret_cast<const float*>(panel);
      const char* w = panel + kColumns * sizeof(float);
      Ints acc[M][2];
#pragma GCC unroll 14
      for (int m = 0; m < M; ++m)
        acc[m][0] = acc[m][1] = Ints{} + zeros[m];
      ahead.fetch(kColumns * sizeof(float));
      for (int k = 0; k < kGroup / 4; ++k, w += kStep, x += M) {
        const Bits w0 = Format<at::BFloat16>::lanes(w), w1 = Format<at::BFloat16>::lanes(w + kStep / 2);
        ahead.fetch(kStep);
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m) {
          acc[m][0] = add(acc[m][0], w0, x[m]);
          acc[m][1] = add(acc[m][1], w1, x[m]);
        }
      }
      const Vec c0 = load(columns), c1 = load(columns + kLanes);
#pragma GCC unroll 14
      for (int m = 0; m < M; ++m) {
        total[m][0] += __builtin_convertvector(acc[m][0], Vec) * (c0 * scales[m]);
        total[m][1] += __builtin_convertvector(acc[m][1], Vec) * (c1 * scales[m]);
      }
      tile += M * kRowBytes;
      panel += kGroupBytes;
    }
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m) {
      store(sums + m * kColumns, total[m][0]);
      store(sums + m * kColumns + kLanes, total[m][1]);
    }
  }
};

}  // namespace softbatch
