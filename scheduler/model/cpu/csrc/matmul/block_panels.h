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

  // The panel as it is read soonest by so many tiles of rows: opened once in the thread's own memory if they are several.
  static const char* opened(const char* panel, int64_t inputs, int64_t tiles) {
    Reader reader(panel);
    Head head = reader.head();
    if (tiles < 2 || head.is_open) return panel;
    head.is_open = true;
    thread_local Buffer<char> memory;
    char* found = memory.resize(head.panel_bytes(inputs));
    std::memcpy(found, &head, sizeof head);
    OpenGroup* to = reinterpret_cast<OpenGroup*>(found + sizeof head);
    for (int64_t g = 0; g < inputs / kBlockGroup; ++g, ++to) {
      const float *scales, *minimum;
      const uint8_t* numbers = reader.next(scales, minimum);
      std::memcpy(to->scales, scales, sizeof to->scales);
      std::memcpy(to->minimum, minimum, sizeof to->minimum);
      std::memcpy(to->numbers, numbers, sizeof to->numbers);
    }
    return found;
  }

  // A tile has for each group the scales of its rows, their scaled sums, the sums of the integers of the whole group and
  // of either half, and the integers.
  static constexpr int64_t kRowBytes = 5 * sizeof(float) + 2 * kBlockGroup;
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
      float* scales = reinterpret_cast<float*>(tile) + row;
      scales[0] = most / Integers::kMost + sum(nothing);
      int32_t* found = reinterpret_cast<int32_t*>(scales) + 2 * rows;
      found[0] = static_cast<int32_t>(sums[0] + sums[1]);
      found[rows] = static_cast<int32_t>(sums[0]);
      found[2 * rows] = static_cast<int32_t>(sums[1]);
      scales[rows] = scales[0] * static_cast<float>(found[0]);
      char* bytes = tile + rows * 5 * sizeof(float) + row * kBlockGroup;
      Integers::split(integers, bytes, bytes + rows * kBlockGroup);
    }
  }

  // sums[m][0 ... kColumns - 1] for the M rows of a tile.
  template <int M>
  static void multiply(const char* tile, const char* panel, int64_t inputs, Prefetch ahead, float* sums) {
    Vec total[M][2] = {};
    Reader reader(panel);
    const Head head = reader.head();
    const int parts = head.has_half_groups ? 2 : 1, steps = Integers::kSteps / parts;
    for (int64_t g = 0; g < inputs / kBlockGroup; ++g, tile += M * kRowBytes) {
      const float *scales, *minimum;
      const uint8_t* w = reader.next(scales, minimum);
      ahead.fetch(1);
      const float *scale = reinterpret_cast<const float*>(tile), *sum = scale + M;
      const int32_t* zeros = reinterpret_cast<const int32_t*>(sum + M);
      const int32_t *coarse = zeros + 3 * M, *fine = coarse + M * Integers::kSteps;
      for (int part = 0; part < parts; ++part, w += steps * 2 * kVectorBytes, coarse += steps, fine += steps) {
        Ints acc[M][2];
        Integers::multiply<M>(w, steps, coarse, fine, acc);
        const int32_t* of_zeros = zeros + (parts == 1 ? 0 : (1 + part) * M);
        const Vec c0 = load(scales + part * kColumns), c1 = load(scales + part * kColumns + kLanes);
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m) {
          const Ints of_zero = Ints{} + of_zeros[m] * head.zero;
          total[m][0] += __builtin_convertvector(acc[m][0] - of_zero, Vec) * (c0 * scale[m]);
          total[m][1] += __builtin_convertvector(acc[m][1] - of_zero, Vec) * (c1 * scale[m]);
        }
      }
      if (!head.has_minimum) continue;
      const Vec c0 = load(minimum), c1 = load(minimum + kLanes);
#pragma GCC unroll 14
      for (int m = 0; m < M; ++m) {
        total[m][0] += c0 * sum[m];
        total[m][1] += c1 * sum[m];
      }
    }
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m) {
      store(sums + m * kColumns, total[m][0]);
      store(sums + m * kColumns + kLanes, total[m][1]);
    }
  }
};

}  // namespace softbatch
