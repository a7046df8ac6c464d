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

#include "simd/amx.h"
#include "simd/format.h"
#include "matmul/memory.h"
#include "attention/problem.h"

namespace softbatch {

constexpr int kColumns = 2 * kLanes;
#if defined(__AVX512F__)
constexpr int kTile = 14;  // 28 accumulators, two vectors of weights and one activation fill 32 registers
#elif defined(__aarch64__)
constexpr int kTile = 12;
#else
constexpr int kTile = 6;  // 16 registers
#endif

// While one panel is multiplied, the next is prefetched, a share of it with every tile of rows. Prefetched all at once,
// it would take longer to arrive than one tile's products take, and memory would be idle during the others'.
struct Prefetch {
  static constexpr int64_t kMost = 4 * kColumns;

  const char* next;
  int64_t step;  // bytes of the next panel for each step of this one, or 0 to fetch nothing

  static Prefetch none(const char* any) { return {any, 0}; }
  // One of `shares` parts of a panel of `bytes` bytes, at most kMost of them in a step.
  static Prefetch share(const char* panel, int64_t bytes, int64_t step, int64_t share, int64_t shares) {
    return {panel + bytes * share / shares, (step + shares - 1) / shares};
  }

  INLINE void fetch() {
    for (int64_t line = 0; line < kMost; line += 64)
      __builtin_prefetch(next + line, 0, 2);
    next += step;
  }

  // As `steps` single fetches, without fetching a line twice.
  INLINE void fetch(int64_t steps) {
    for (int64_t line = 0; line < steps * step; line += 64)
      __builtin_prefetch(next + line, 0, 2);
    next += steps * step;
  }
};

template <typename W>
struct Layout {
  using F = Format<W>;
  using Element = typename F::Element;
  static constexpr int64_t kInputs = F::kDepth;  // the number of inputs must be a multiple of this
  // Elements of a row that lie together in a tile. The last group is filled up with zeros, in the weights too.
  static constexpr int64_t kGroup = 16;
  static constexpr int64_t kStep = kColumns * F::kDepth * sizeof(W);  // a panel's share of an element
  static_assert(kStep <= Prefetch::kMost);

  static int64_t groups(int64_t inputs) { return (inputs / F::kDepth + kGroup - 1) / kGroup; }
  static int64_t panel_bytes(int64_t inputs) { return groups(inputs) * kGroup * kStep; }
  static int64_t row_bytes(int64_t inputs) { return groups(inputs) * kGroup * sizeof(Element); }

  // Writes a panel; weights(column) are its float32 numbers [inputs], or null for zeros.
  template <typename G>
  static void pack(const G& weights, int64_t inputs, char* panel, Arena&) {
    for (int64_t column = 0; column < kColumns; ++column) {
      const float* from = weights(column);
      W* to = reinterpret_cast<W*>(panel) + column * F::kDepth;
      for (int64_t k = 0; k < groups(inputs) * kGroup * F::kDepth; ++k)
        to[k / F::kDepth * kColumns * F::kDepth + k % F::kDepth] = from && k < inputs ? static_cast<W>(from[k]) : W(0);
    }
  }

  // Writes row `row` of a tile of `rows`: float32 values [inputs].
  static INLINE void put(const float* values, int64_t inputs, int64_t row, int64_t rows, char* tile) {
    Element* to = reinterpret_cast<Element*>(tile) + row * kGroup;
    constexpr int64_t kValues = kGroup * F::kDepth;
    int64_t k = 0;
    for (; k + kValues <= inputs; k += kValues, to += rows * kGroup)
      F::elements(values + k, kValues, to);
    if (k == inputs) return;
    float rest[kValues] = {};
    std::memcpy(rest, values + k, (inputs - k) * sizeof(float));
    F::elements(rest, kValues, to);
  }

  // Writes kLanes values of a row from input `first` on, a multiple of kLanes. The row's last values are followed by
  // zeros.
  static constexpr bool kTakesParts = true;
  static INLINE void put_part(const float* values, int64_t inputs, int64_t first, int64_t row, int64_t rows,
                              char* tile) {
    const int64_t end = first + kLanes < inputs ? first + kLanes : groups(inputs) * kGroup * F::kDepth;
    const float zeros[kLanes] = {};
    for (int64_t k = first; k < end; k += kLanes) {
      const int64_t at = k / F::kDepth;
      Element* to = reinterpret_cast<Element*>(tile) + (at / kGroup * rows + row) * kGroup + at % kGroup;
      F::elements(k == first ? values : zeros, kLanes, to);
    }
  }

  // Reads two steps of a panel at a time. A step is two vectors of weights.
  class Reader {
   public:
    INLINE explicit Reader(const char* panel) : panel_(panel) {}
    template <typename S>
    INLINE void two(const S& step) {
      for (int i = 0; i < 2; ++i, panel_ += kStep)
        step(F::lanes(panel_), F::lanes(panel_ + kStep / 2));
    }

   private:
    const char* panel_;
  };

  // A panel's steps for matrix tiles, which read them in place.
  class MatrixPanel {
   public:
    INLINE MatrixPanel(const char* panel, int64_t, bool) : panel_(panel) {}
    INLINE const char* step(int64_t i) const { return panel_ + i * kMatrixStep; }
    INLINE void prepare() {}

   private:
    const char* panel_;
  };

  // sums[m][0 ... kColumns - 1] for the M rows of a tile.
  template <int M, typename R = Reader>
  static void multiply(const char* tile, const char* panel, int64_t inputs, Prefetch ahead, float* sums) {
    const Element* x = reinterpret_cast<const Element*>(tile);
    Vec acc[M][2] = {};
    R reader(panel);
    for (int64_t g = 0; g < groups(inputs); ++g, x += (M - 1) * kGroup)
      for (int k = 0; k < kGroup; k += 2)
        reader.two([&](const auto& w0, const auto& w1) ALWAYS_INLINE {
          ahead.fetch();
#pragma GCC unroll 14
          for (int m = 0; m < M; ++m) {
            acc[m][0] = F::add(acc[m][0], w0, x[m * kGroup]);
            acc[m][1] = F::add(acc[m][1], w1, x[m * kGroup]);
          }
          ++x;
        });
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m) {
      store(sums + m * kColumns, acc[m][0]);
      store(sums + m * kColumns + kLanes, acc[m][1]);
    }
  }
};

// 8-bit integers with a scale for every kGroup inputs, in weight rows and activation rows alike. With one scale a row,
// outliers would cost all other activations their precision. Weights are stored unsigned, because the processor's
// instruction requires one unsigned operand. Each group of a tile holds the correction of its sums.
template <>
struct Layout<int8_t> {
  static constexpr int64_t kInputs = 32;
  static constexpr bool kTakesParts = false;  // a scale is for more than the lanes of a vector
  static constexpr int kGroup = 32;
  static constexpr int kZero = 128;
  static constexpr float kLeast = 1e-30f;  // smaller values count as zero, so 127 / top stays finite
  static constexpr int64_t kStep = 4 * kColumns;                                   // four inputs of a panel
  static_assert(kStep <= Prefetch::kMost && kColumns * sizeof(float) <= Prefetch::kMost);
  static constexpr int64_t kGroupBytes = kGroup * kColumns + kColumns * sizeof(float);  // with its scales, first
  static constexpr int64_t kRowBytes = kGroup + 2 * sizeof(float);  // a row's share of a tile's group, the same
  typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

  static int64_t panel_bytes(int64_t inputs) { return inputs / kGroup * kGroupBytes; }
  static int64_t row_bytes(int64_t inputs) { return inputs / kGroup * kRowBytes; }

  static INLINE float most(const float* x) {
    Vec found = {};
    for (int i = 0; i < kGroup; i += kLanes)
      found = max(found, magnitude(load(x + i)));
    return largest(found);
  }

  template <typename G>
  static void pack(const G& weights, int64_t inputs, char* panel, Arena&) {
    for (int64_t column = 0; column < kColumns; ++column) {
      const float* from = weights(column);
      for (int64_t g = 0; g < inputs / kGroup; ++g) {
        const float top = from ? most(from + g * kGroup) : 0.0f, inverse = top > kLeast ? 127 / top : 0;
        char* group = panel + g * kGroupBytes;
        reinterpret_cast<float*>(group)[column] = top / 127;
        uint8_t* to = reinterpret_cast<uint8_t*>(group) + kColumns * sizeof(float) + column * 4;
        for (int k = 0; k < kGroup; ++k) {
          const float scaled = from ? from[g * kGroup + k] * inverse : 0.0f;
          to[k / 4 * kStep + k % 4] = static_cast<uint8_t>(static_cast<int>(std::nearbyint(scaled)) + kZero);
        }
      }
    }
  }

  static INLINE void put(const float* values, int64_t inputs, int64_t row, int64_t rows, char* tile) {
    for (int64_t g = 0; g < inputs / kGroup; ++g, tile += rows * kRowBytes, values += kGroup) {
      const float top = most(values), inverse = top > kLeast ? 127 / top : 0;
      typedef int8_t Bytes __attribute__((vector_size(kLanes)));
      int8_t bytes[kGroup];
      Ints sum = {};
      Vec nothing = {};  // NaN if a value is not finite, so that no finite number comes out
      for (int k = 0; k < kGroup; k += kLanes) {
        const Vec value = load(values + k);
        // The low mantissa bits of the sum hold the nearest integer.
        const Ints nearest = (Ints)(value * inverse + 0x1.8p23f) - (Ints)fill(0x1.8p23f);
        const Bytes narrow = __builtin_convertvector(nearest, Bytes);
        std::memcpy(bytes + k, &narrow, sizeof narrow);
        sum += nearest;
        nothing += value * 0.0f;
      }
      uint32_t total = 0;  // arbitrary if a value is not finite
      for (int i = 0; i < kLanes; ++i)
        total += static_cast<uint32_t>(sum[i]);
      float* scales = reinterpret_cast<float*>(tile);
      int32_t* zeros = reinterpret_cast<int32_t*>(scales + rows);
      scales[row] = top / 127 + softbatch::sum(nothing);
      zeros[row] = static_cast<int32_t>(0u - kZero * total);
      std::memcpy(zeros + rows + row * kGroup / 4, bytes, kGroup);
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
  static void multiply(const char* tile, const char* panel, int64_t inputs, Prefetch ahead, float* sums) {
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
      ahead.fetch();
      for (int k = 0; k < kGroup / 4; ++k, w += kStep) {
        const Bits w0 = Format<at::BFloat16>::lanes(w), w1 = Format<at::BFloat16>::lanes(w + kStep / 2);
        ahead.fetch();
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m) {
          acc[m][0] = add(acc[m][0], w0, x[m * kGroup / 4 + k]);
          acc[m][1] = add(acc[m][1], w1, x[m * kGroup / 4 + k]);
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
