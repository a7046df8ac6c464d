// Products of a step's activations with packed weights: y = x W^T, accumulated in float32 (int32 for int8).
//
// Weights lie in panels of kColumns outputs, in the order in which the kernel reads them; activations in tiles of up
// to kTile rows, interleaved. While one panel is multiplied, the next is fetched into the cache: a small batch is bound
// by memory. Each output is summed in the order of its inputs, whatever the batch, so a row's result does not depend
// on who shares its step.

#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "format.h"
#include "memory.h"
#include "team.h"
#include "vector.h"
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
constexpr int kTilesTogether = 8;  // rows of one item: 112 with AVX-512, whose activations stay in the L2 cache

// A weight matrix [outputs, inputs] in panels: [panel][inputs / kDepth][kColumns][kDepth].
template <typename W>
struct Packed {
  int64_t outputs = 0, inputs = 0;
  W* data = nullptr;
  std::vector<float> bias;   // one per output, or empty
  std::vector<float> scale;  // of each column, int8 only; by panel and column
  std::vector<float> shift;  // what an activation's zero adds to each column, int8 only

  int64_t panels() const { return (outputs + kColumns - 1) / kColumns; }
  int64_t depth() const { return inputs / Format<W>::kDepth; }
  const W* panel(int64_t p) const { return data + p * inputs * kColumns; }

  // row(i): where column i of the panels comes from, float32 [inputs], or null for a column of zeros.
  template <typename F>
  void pack(Arena& arena, int64_t columns, int64_t from_inputs, const F& row) {
    constexpr int kDepth = Format<W>::kDepth;
    outputs = columns;
    inputs = from_inputs;
    W* to = data = arena.allocate<W>(panels() * inputs * kColumns);
    if constexpr (std::is_same_v<W, int8_t>) {
      scale.assign(panels() * kColumns, 0.0f);
      shift.assign(panels() * kColumns, 0.0f);
    }
    at::parallel_for(0, panels(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t column = begin * kColumns; column < end * kColumns; ++column) {
        const float* from = column < outputs ? row(column) : nullptr;
        W* base = to + column / kColumns * inputs * kColumns + column % kColumns * kDepth;
        float inverse = 1.0f;
        if constexpr (std::is_same_v<W, int8_t>) {
          float largest = 0;
          for (int64_t k = 0; from && k < inputs; ++k)
            largest = std::max(largest, std::abs(from[k]));
          scale[column] = largest / 127;
          inverse = largest > 0 ? 127 / largest : 0;
        }
        int64_t sum = 0;
        for (int64_t k = 0; k < inputs; ++k) {
          W& w = base[k / kDepth * kColumns * kDepth + k % kDepth];
          if constexpr (std::is_same_v<W, int8_t>) {
            w = from ? static_cast<int8_t>(std::nearbyint(from[k] * inverse)) : 0;
            sum += w;
          } else {
            w = from ? static_cast<W>(from[k]) : W(0);
          }
        }
        if constexpr (std::is_same_v<W, int8_t>) shift[column] = static_cast<float>(sum * Format<int8_t>::kZero);
      }
    });
  }
};

// A step's activations in tiles of rows: [tile][inputs / kDepth][rows of the tile].
template <typename W>
struct Activations {
  using Element = typename Format<W>::Element;
  int64_t rows = 0, depth = 0, tiles = 0;
  Buffer<Element> data;
  Buffer<float> scale;  // of each row, int8 only

  void resize(int64_t new_rows, int64_t inputs) {
    rows = new_rows;
    depth = inputs / Format<W>::kDepth;
    tiles = (rows + kTile - 1) / kTile;
    data.resize(rows * depth);
    scale.resize(rows);
  }
  int64_t first(int64_t tile) const { return rows * tile / tiles; }
  const Element* tile(int64_t t) const { return data.data() + first(t) * depth; }

  // Takes float32 values [inputs] as row `row` of tile `t`.
  INLINE void put(int64_t t, int64_t row, const float* values) {
    const int64_t begin = first(t), step = first(t + 1) - begin;
    Element* to = data.data() + begin * depth + (row - begin);
    float inverse = 1.0f;
    if constexpr (std::is_same_v<W, int8_t>) {
      float largest = 0;
      for (int64_t k = 0; k < depth * Format<W>::kDepth; ++k)
        largest = std::max(largest, std::abs(values[k]));
      scale.data()[row] = largest / 127;
      inverse = largest > 0 ? 127 / largest : 0;
    }
    Element* row_of_elements = reinterpret_cast<Element*>(scratch(depth * sizeof(Element) / sizeof(float)));
    Format<W>::elements(values, depth * Format<W>::kDepth, inverse, row_of_elements);
    for (int64_t k = 0; k < depth; ++k)
      to[k * step] = row_of_elements[k];
  }
};

// sums[m][0 ... kColumns - 1] of M rows with one panel; `ahead` is fetched meanwhile, `ahead_step` bytes an input group.
template <typename W, int M>
void multiply_tile(const typename Format<W>::Element* x, const W* w, int64_t depth, const char* ahead,
                   int64_t ahead_step, float* sums) {
  using F = Format<W>;
  typename F::Sum acc[M][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const auto w0 = F::weights(w), w1 = F::weights(w + kLanes * F::kDepth);
    for (int64_t line = 0; line < 2 * int64_t{sizeof w0}; line += 64)
      __builtin_prefetch(ahead + line, 0, 2);
    ahead += ahead_step;
    w += kColumns * F::kDepth;
#pragma GCC unroll 14
    for (int m = 0; m < M; ++m) {
      acc[m][0] = F::add(acc[m][0], w0, x[m]);
      acc[m][1] = F::add(acc[m][1], w1, x[m]);
    }
    x += M;
  }
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
      store(sums + m * kColumns + half * kLanes, __builtin_convertvector(acc[m][half], Vec));
}

template <typename W>
using TileKernel = void (*)(const typename Format<W>::Element*, const W*, int64_t, const char*, int64_t, float*);

template <typename W, int... M>
constexpr std::array<TileKernel<W>, sizeof...(M)> tile_kernels(std::integer_sequence<int, M...>) {
  return {multiply_tile<W, M + 1>...};
}

// Calls done(row, first column, sums [kColumns]) for every row and panel, on any member of the team.
template <typename W, typename F>
void matmul(Team& team, const Packed<W>& weights, const Activations<W>& x, const F& done) {
  static constexpr auto kernels = tile_kernels<W>(std::make_integer_sequence<int, kTile>{});
  constexpr int64_t kStep = kColumns * Format<W>::kDepth * sizeof(W);
  const int64_t parts = (x.tiles + kTilesTogether - 1) / kTilesTogether;
  alignas(64) float sums[kTile * kColumns];
  team.for_each_ahead(weights.panels() * parts, [&](int64_t item, int64_t after) {
    const int64_t panel = item / parts, part = item % parts;
    const int64_t panel_after = std::min(after / parts, weights.panels() - 1);
    const W* w = weights.panel(panel);
    const int64_t first_tile = part * kTilesTogether, last_tile = std::min(x.tiles, first_tile + kTilesTogether);
    for (int64_t t = first_tile; t < last_tile; ++t) {
      const bool fetch = t == first_tile && panel_after != panel;
      const int64_t first = x.first(t), rows = x.first(t + 1) - first;
      kernels[rows - 1](x.tile(t), w, weights.depth(), reinterpret_cast<const char*>(weights.panel(panel_after)),
                        fetch ? kStep : 0, sums);
      for (int64_t row = 0; row < rows; ++row) {
        float* s = sums + row * kColumns;
        if constexpr (std::is_same_v<W, int8_t>) {
          const float row_scale = x.scale.data()[first + row];
          for (int i = 0; i < kColumns; ++i) {
            const int64_t column = panel * kColumns + i;
            s[i] = (s[i] - weights.shift[column]) * weights.scale[column] * row_scale;
          }
        }
        if (!weights.bias.empty())
          for (int64_t i = 0; i < std::min<int64_t>(kColumns, weights.outputs - panel * kColumns); ++i)
            s[i] += weights.bias[panel * kColumns + i];
        done(first + row, panel * kColumns, s);
      }
    }
  });
}

}  // namespace softbatch
