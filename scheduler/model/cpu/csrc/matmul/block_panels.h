// Panels of GGUF's blocks, and their products.
//
// A panel has the numbers and scales of its rows as the file has them. A group's products with integers are summed
// exactly, and only then scaled. What is rounded are the activations, to 2^-16 of the largest of their group.

#pragma once

#include "matmul/block_groups.h"
#include "matmul/block_integers.h"
#include "matmul/panels.h"

namespace softbatch {

struct Blocks {};

template <>
struct Layout<Blocks> : BlockGroups {
  using Integers = BlockIntegers;
  static constexpr bool kTakesParts = false;  // a scale is for more than the lanes of a vector
  static constexpr int64_t kInputs = kBlockGroup;
  static constexpr int kTileRows = 64;  // whose sums stay in the L1 cache

  // A tile has for each group those of its rows, one behind the other.
  static constexpr int64_t kRowBytes = sizeof(Integers::Row);
  static int64_t row_bytes(int64_t inputs) { return inputs / kBlockGroup * kRowBytes; }

  static INLINE void put(const float* values, int64_t inputs, int64_t row, int64_t rows, char* tile) {
    for (int64_t g = 0; g < inputs / kBlockGroup; ++g, tile += rows * kRowBytes, values += kBlockGroup) {
      Vec top = {}, nothing = {};  // NaN if a value is not finite, so that no finite number comes out
      for (int i = 0; i < kBlockGroup; i += kLanes) {
        top = max(top, magnitude(load(values + i)));
        nothing += load(values + i) * 0.0f;
      }
      const float most = largest(top), inverse = most > Integers::kLeast ? Integers::kMost / most : 0;
      alignas(64) int32_t integers[kBlockGroup];
      uint32_t sums[2];  // arbitrary if a value is not finite
      for (int part = 0; part < 2; ++part) {
        Bits added = {};
        for (int i = part * kBlockGroup / 2; i < (part + 1) * kBlockGroup / 2; i += kLanes) {
          // The low mantissa bits of the sum hold the nearest integer.
          const Bits nearest = (Bits)(load(values + i) * inverse + 0x1.8p23f) - (Bits)fill(0x1.8p23f);
          std::memcpy(integers + i, &nearest, sizeof nearest);
          added += nearest;
        }
        sums[part] = Integers::sum_of(added);
      }
      Integers::Row& to = reinterpret_cast<Integers::Row*>(tile)[row];
      to.scale = most / Integers::kMost + sum(nothing);
      to.minus[0] = static_cast<int32_t>(0u - sums[0] - sums[1]);
      to.minus[1] = static_cast<int32_t>(0u - sums[0]);
      to.minus[2] = static_cast<int32_t>(0u - sums[1]);
      to.scaled_sum = to.scale * static_cast<float>(static_cast<int32_t>(sums[0] + sums[1]));
      Integers::split(integers, to);
    }
  }

  // sums[row][0 ... kColumns - 1] for the rows of a tile. A group is opened once, for all of them.
  static void multiply_rows(const char* tile, int64_t rows, const char* panel, int64_t inputs, Prefetch ahead,
                            float* sums) {
    const Head& head = *reinterpret_cast<const Head*>(panel);
    const auto* groups = reinterpret_cast<const Integers::Row*>(tile);
    with_kind(head, [&](auto kind) { multiply_kind<decltype(kind)>(groups, rows, panel, inputs, ahead, sums); });
  }

 private:
  template <typename K>
  static void multiply_kind(const Integers::Row* x, int64_t rows, const char* panel, int64_t inputs, Prefetch ahead,
                            float* sums) {
    std::memset(sums, 0, rows * kColumns * sizeof(float));
    Reader<K> reader(panel);
    for (int64_t g = 0; g < inputs / kBlockGroup; ++g) {
      Scales<K> scales;
      Bits numbers[kVectors];
      reader.next(scales, [&](auto v, Bits bytes) ALWAYS_INLINE { numbers[v] = bytes; });
      ahead.fetch(1);
      if (Integers::kTakesApart && rows == 1) {  // for more rows compilers do so once, and keep the halves in memory
        add_group(scales, numbers, *x++, sums);
        continue;
      }
      float* to = sums;
      for (int64_t row = 0; row < rows; ++row, ++x, to += kColumns)
        add_group(scales, numbers, *x, to);
    }
  }

  template <typename K>
  static INLINE void add_group(const Scales<K>& scales, const Bits (&numbers)[kVectors], const Integers::Row& row,
                               float* sums) {
    Vec left = load(sums), right = load(sums + kLanes);
    unrolled<K::kParts>([&](auto part) ALWAYS_INLINE {
      Ints found[2];
      Integers::multiply<part, K::kParts, K::kZero>(numbers, row, found);
      left += __builtin_convertvector(found[0], Vec) * (scales.scales[part][0] * row.scale);
      right += __builtin_convertvector(found[1], Vec) * (scales.scales[part][1] * row.scale);
    });
    if constexpr (K::kHasMinimum) {
      left += scales.minimum[0] * row.scaled_sum;
      right += scales.minimum[1] * row.scaled_sum;
    }
    store(sums, left);
    store(sums + kLanes, right);
  }
};

}  // namespace softbatch
