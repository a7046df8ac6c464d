// Products of a step's activations with packed weights: y = x W^T, summed in float32.

#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "simd/amx.h"
#include "matmul/bf16_12bit.h"
#include "matmul/block_panels.h"
#include "matmul/memory.h"
#include "threads/team.h"

namespace softbatch {

// Activations of one item, so few that they stay in the L2 cache.
constexpr int kTilesTogether = 8;  // of kTile rows
constexpr int64_t kBytesTogether = 768 << 10;  // on matrix tiles, as their processors have larger caches
constexpr int64_t kItemsEach = 4;              // per thread at least, so that no thread waits long for the last one
// From so many matrix tiles per thread on, each thread multiplies rows of its own by every panel.
constexpr int kTilesOfThread = 12;

// Rows of a tile of activations for vectors. A layout may know better.
template <typename W>
constexpr int tile_rows() {
  if constexpr (requires { Layout<W>::kTileRows; }) return Layout<W>::kTileRows;
  return kTile;
}

// A weight matrix [outputs, inputs], in panels.
template <typename W>
struct Packed {
  int64_t outputs = 0, inputs = 0;
  char* data = nullptr;
  std::vector<float> bias;  // one per output, or empty

  int64_t panels() const { return (outputs + kColumns - 1) / kColumns; }
  const char* panel(int64_t p) const { return data + p * Layout<W>::panel_bytes(inputs); }
  // One of `shares` parts of a panel, to be fetched while another is multiplied.
  Prefetch part_of(int64_t p, int64_t share, int64_t shares) const {
    return Prefetch::share(panel(p), Layout<W>::panel_bytes(inputs), Layout<W>::kStep, share, shares);
  }

  // row(i, buffer): the weights of output i, float32 [inputs], perhaps in the buffer, or null for zeros.
  template <typename F>
  void pack(Arena& arena, int64_t new_outputs, int64_t new_inputs, const F& row) {
    outputs = new_outputs;
    inputs = new_inputs;
    const int64_t bytes = Layout<W>::panel_bytes(inputs);
    data = arena.allocate<char>(panels() * bytes);
    at::parallel_for(0, panels(), 1, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(inputs);
      for (int64_t p = begin; p < end; ++p) {
        const auto weights = [&](int64_t column) {
          const int64_t i = p * kColumns + column;
          return i < outputs ? row(i, buffer.data()) : nullptr;
        };
        Layout<W>::pack(weights, inputs, data + p * bytes, arena);
      }
    });
  }
};

// One whose panels differ in their kind of blocks, and so in size.
template <>
struct Packed<Blocks> {
  int64_t outputs = 0, inputs = 0;
  std::vector<const char*> starts;  // of the panels, and the end of the last
  std::vector<float> bias;

  int64_t panels() const { return (outputs + kColumns - 1) / kColumns; }
  const char* panel(int64_t p) const { return starts[p]; }
  Prefetch part_of(int64_t p, int64_t share, int64_t shares) const {
    const int64_t bytes = starts[p + 1] - starts[p], groups = inputs / kBlockGroup;
    return Prefetch::share(starts[p], bytes, (bytes + groups - 1) / groups, share, shares);
  }

  // row(i): the blocks of output i.
  template <typename F>
  void pack(Arena& arena, int64_t new_outputs, int64_t new_inputs, const F& row) {
    outputs = new_outputs;
    inputs = new_inputs;
    const auto rows_of = [&](int64_t p) {
      std::array<BlockRow, kColumns> rows;
      for (int64_t i = p * kColumns; i < std::min(outputs, (p + 1) * kColumns); ++i)
        rows[i - p * kColumns] = row(i);
      return rows;
    };
    std::vector<int64_t> ends;
    int64_t end = 0;
    for (int64_t p = 0; p < panels(); ++p)
      ends.push_back(end += Layout<Blocks>::head_of(rows_of(p).data()).panel_bytes(inputs));
    char* data = arena.allocate<char>(end);
    starts.push_back(data);
    for (int64_t each : ends)
      starts.push_back(data + each);
    at::parallel_for(0, panels(), 1, [&](int64_t begin, int64_t last) {
      for (int64_t p = begin; p < last; ++p) {
        const auto rows = rows_of(p);
        Layout<Blocks>::pack(Layout<Blocks>::head_of(rows.data()), rows.data(), inputs, const_cast<char*>(starts[p]));
      }
    });
  }
};

// A step's activations [rows, inputs], in tiles of about the same size.
template <typename W>
struct Activations {
  int64_t rows = 0, inputs = 0, tiles = 0;
  Buffer<char> data;
  static constexpr int64_t kBehind = kMatrixRows * kMatrixBytes;  // matrix tiles read absent rows too

  void resize(int64_t new_rows, int64_t new_inputs) {
    rows = new_rows;
    inputs = new_inputs;
    const int64_t most = uses_matrix_tiles<W>() ? kMatrixRows : tile_rows<W>();
    tiles = (rows + most - 1) / most;
    starts_.resize(tiles + 1);
    for (int64_t t = 0; t <= tiles; ++t)
      starts_[t] = tiles > 0 ? rows * t / tiles : 0;
    data.resize(rows * Layout<W>::row_bytes(inputs) + kBehind);
  }
  int64_t first(int64_t tile) const { return starts_[tile]; }
  int64_t rows_of(int64_t tile) const { return first(tile + 1) - first(tile); }
  char* tile(int64_t t) const { return data.data() + first(t) * Layout<W>::row_bytes(inputs); }
  INLINE void put(int64_t t, int64_t row, const float* values) {
    Layout<W>::put(values, inputs, row - first(t), rows_of(t), tile(t));
  }
  // Every row: read(row) gives its float32 values.
  template <typename F>
  void fill(Team& team, const F& read) {
    team.for_each(tiles, [&](int64_t t) {
      for (int64_t row = first(t); row < first(t + 1); ++row)
        put(t, row, read(row));
    });
  }
  INLINE void put_part(int64_t t, int64_t row, int64_t column, const float* values) {
    Layout<W>::put_part(values, inputs, column, row - first(t), rows_of(t), tile(t));
  }

 private:
  std::vector<int64_t> starts_;  // looked up for every row of every panel, too often for a division
};

// How a product's rows are divided. Different threads should multiply different groups, each by all panels. A group is
// divided into parts, one per item. Matrix tiles are multiplied two at a time, so parts are made of whole units.
struct Division {
  int64_t tiles, unit, groups, parts;

  int64_t first_tile(int64_t part) const {
    const int64_t units = (tiles + unit - 1) / unit;
    return std::min(tiles, units * part / (groups * parts) * unit);
  }
};

template <typename W>
Division divide(const Activations<W>& x, int64_t panels, int64_t threads) {
  const auto ceil_div = [](int64_t n, int64_t parts) { return (n + parts - 1) / parts; };
  if (!uses_matrix_tiles<W>()) {
    constexpr int64_t kTogether = std::max(kTilesTogether * kTile / tile_rows<W>(), 1);
    return {x.tiles, 1, 1, ceil_div(x.tiles, kTogether)};
  }
  const int64_t groups = std::clamp<int64_t>(x.tiles / kTilesOfThread, 1, threads), tiles = ceil_div(x.tiles, groups);
  const int64_t fitting =
      std::max<int64_t>(kTilesTogether, kBytesTogether / (kMatrixRows * Layout<W>::row_bytes(x.inputs)));
  const int64_t enough = ceil_div(kItemsEach * threads, panels * groups);
  return {x.tiles, 2, groups, std::min(std::max(ceil_div(tiles, fitting), enough), ceil_div(tiles, 2))};
}

using TileKernel = void (*)(const char*, const char*, int64_t, Prefetch, float*);

template <typename W, int... M>
constexpr std::array<TileKernel, sizeof...(M)> tile_kernels(std::integer_sequence<int, M...>) {
  return {Layout<W>::template multiply<M + 1>...};
}

// sums[row][0 ... kColumns - 1] for the rows of a tile of vectors.
template <typename W>
INLINE void multiply_tile(const char* tile, int64_t rows, const char* panel, int64_t inputs, Prefetch ahead,
                          float* sums) {
  if constexpr (requires { &Layout<W>::multiply_rows; }) {
    Layout<W>::multiply_rows(tile, rows, panel, inputs, ahead, sums);
  } else {
    static constexpr auto kernels = tile_kernels<W>(std::make_integer_sequence<int, kTile>{});
    kernels[rows - 1](tile, panel, inputs, ahead, sums);
  }
}

// Calls done(tile, row, first column, sums [kColumns]) for every row and panel, on any member of the team.
template <typename W, typename F>
void matmul(Team& team, const Packed<W>& weights, const Activations<W>& x, const F& done) {
  const Division division = divide(x, weights.panels(), team.size());
  const int64_t items_of_group = weights.panels() * division.parts;
  const int64_t items = division.groups * items_of_group;
  alignas(64) float sums[std::max(2 * kMatrixRows, tile_rows<W>()) * kColumns];
  team.for_each_ahead(items, false, [&](int64_t item, int64_t after) {
    const auto panel_of = [&](int64_t item) { return item % items_of_group / division.parts; };
    const int64_t part = item / items_of_group * division.parts + item % division.parts;
    const int64_t panel = panel_of(item), panel_after = after < items ? panel_of(after) : panel;
    const int64_t first_tile = division.first_tile(part), tiles = division.first_tile(part + 1) - first_tile;
    const auto ahead = [&](int64_t share, int64_t shares) {
      return panel_after == panel ? Prefetch::none(weights.panel(panel)) : weights.part_of(panel_after, share, shares);
    };
    const auto finish = [&](int64_t t, float* of_tile) {
      for (int64_t row = 0, rows = x.rows_of(t); row < rows; ++row) {
        float* s = of_tile + row * kColumns;
        if (!weights.bias.empty())
          for (int64_t i = 0; i < std::min<int64_t>(kColumns, weights.outputs - panel * kColumns); ++i)
            s[i] += weights.bias[panel * kColumns + i];
        done(t, x.first(t) + row, panel * kColumns, s);
      }
    };
    if constexpr (kFitsMatrixTiles<W>) {
      if (uses_matrix_tiles<W>()) {
        const int64_t steps = (weights.inputs + kMatrixDepth - 1) / kMatrixDepth;
        typename Layout<W>::MatrixPanel columns(weights.panel(panel), steps, tiles <= 2);
        const auto rows_of = [&](int64_t t) { return MatrixRows{x.tile(t), kMatrixBytes, x.rows_of(t) * kMatrixBytes}; };
        const auto step = [&](int64_t i) ALWAYS_INLINE { return columns.step(i); };
        for (int64_t i = 0; i < tiles; i += 2) {
          const int64_t t = first_tile + i;
          Prefetch share = ahead(i / 2, (tiles + 1) / 2);
          const auto during = [&]() ALWAYS_INLINE {
            columns.prepare();
            share.fetch(kMatrixPairs);
          };
          if (i + 1 < tiles) {
            multiply_matrix_tiles<true, false>(rows_of(t), rows_of(t + 1), step, steps, sums, during);
            finish(t + 1, sums + kMatrixRows * kColumns);
          } else {
            multiply_matrix_tiles<false, false>(rows_of(t), {}, step, steps, sums, during);
          }
          finish(t, sums);
        }
        return;
      }
    }
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t t = first_tile + i;
      multiply_tile<W>(x.tile(t), x.rows_of(t), weights.panel(panel), weights.inputs, ahead(i, tiles), sums);
      finish(t, sums);
    }
  });
}

}  // namespace softbatch
