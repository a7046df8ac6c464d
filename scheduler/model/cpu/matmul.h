// Products of a step's activations with packed weights: y = x W^T, summed in float32.

#pragma once

#include <array>
#include <utility>
#include <vector>

#include "layout.h"
#include "memory.h"
#include "team.h"

namespace softbatch {

constexpr int kTilesTogether = 8;  // of one item: 112 rows with AVX-512, whose activations stay in the L2 cache

// A weight matrix [outputs, inputs], in panels.
template <typename W>
struct Packed {
  int64_t outputs = 0, inputs = 0;
  char* data = nullptr;
  std::vector<float> bias;  // one per output, or empty

  int64_t panels() const { return (outputs + kColumns - 1) / kColumns; }
  const char* panel(int64_t p) const { return data + p * Layout<W>::panel_bytes(inputs); }

  // row(i, buffer): the weights of output i, float32 [inputs], perhaps in the buffer, or null for zeros.
  template <typename F>
  void pack(Arena& arena, int64_t new_outputs, int64_t new_inputs, const F& row) {
    outputs = new_outputs;
    inputs = new_inputs;
    const int64_t bytes = Layout<W>::panel_bytes(inputs);
    data = arena.allocate<char>(panels() * bytes);
    at::parallel_for(0, panels(), 1, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(inputs);
      for (int64_t i = begin * kColumns; i < end * kColumns; ++i)
        Layout<W>::pack(i < outputs ? row(i, buffer.data()) : nullptr, inputs, i % kColumns, data + i / kColumns * bytes);
    });
  }
};

// A step's activations [rows, inputs], in tiles of about the same size.
template <typename W>
struct Activations {
  int64_t rows = 0, inputs = 0, tiles = 0;
  Buffer<char> data;

  void resize(int64_t new_rows, int64_t new_inputs) {
    rows = new_rows;
    inputs = new_inputs;
    tiles = (rows + kTile - 1) / kTile;
    data.resize(rows * Layout<W>::row_bytes(inputs));
  }
  int64_t first(int64_t tile) const { return rows * tile / tiles; }
  char* tile(int64_t t) const { return data.data() + first(t) * Layout<W>::row_bytes(inputs); }
  INLINE void put(int64_t t, int64_t row, const float* values) {
    Layout<W>::put(values, inputs, row - first(t), first(t + 1) - first(t), tile(t));
  }
  INLINE void put_part(int64_t t, int64_t row, int64_t column, const float* values) {
    Layout<W>::put_part(values, inputs, column, row - first(t), first(t + 1) - first(t), tile(t));
  }
};

using TileKernel = void (*)(const char*, const char*, int64_t, Ahead, float*);

template <typename W, int... M>
constexpr std::array<TileKernel, sizeof...(M)> tile_kernels(std::integer_sequence<int, M...>) {
  return {Layout<W>::template multiply<M + 1>...};
}

// Calls done(tile, row, first column, sums [kColumns]) for every row and panel, on any member of the team.
template <typename W, typename F>
void matmul(Team& team, const Packed<W>& weights, const Activations<W>& x, const F& done) {
  static constexpr auto kernels = tile_kernels<W>(std::make_integer_sequence<int, kTile>{});
  const int64_t parts = (x.tiles + kTilesTogether - 1) / kTilesTogether;
  const int64_t bytes = Layout<W>::panel_bytes(weights.inputs);
  alignas(64) float sums[kTile * kColumns];
  team.for_each_ahead(weights.panels() * parts, false, [&](int64_t item, int64_t after) {
    const int64_t panel = item / parts, first_tile = item % parts * kTilesTogether;
    const int64_t panel_after = std::min(after / parts, weights.panels() - 1);
    const int64_t tiles = std::min<int64_t>(x.tiles - first_tile, kTilesTogether);
    const char* next = weights.panel(panel_after);
    for (int64_t t = first_tile; t < first_tile + tiles; ++t) {
      const Ahead ahead = panel_after == panel ? Ahead::none(next) : Ahead::share(next, bytes, t - first_tile, tiles);
      const int64_t first = x.first(t), rows = x.first(t + 1) - first;
      kernels[rows - 1](x.tile(t), weights.panel(panel), weights.inputs, ahead, sums);
      for (int64_t row = 0; row < rows; ++row) {
        float* s = sums + row * kColumns;
        if (!weights.bias.empty())
          for (int64_t i = 0; i < std::min<int64_t>(kColumns, weights.outputs - panel * kColumns); ++i)
            s[i] += weights.bias[panel * kColumns + i];
        done(t, first + row, panel * kColumns, s);
      }
    }
  });
}

}  // namespace softbatch
