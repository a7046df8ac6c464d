// Attention of longer chunks, bound by arithmetic: register-blocked products S^T = K Q^T and O^T += V^T P^T.
//
// Query rows lie in the vectors' lanes. Neither K nor V is transposed then, and the online softmax never sums
// across lanes. A tile of keys and values is widened to float32 once for all the item's rows.

#pragma once

#include "work.h"

namespace softbatch {

// out[r][column] = decay[column] * out[r][column] + sum over k of a[r * row_step + k * depth_step] * b[k][column]
// for kTileRows rows r and one panel of columns; without decay, out starts from zero.
INLINE void multiply(const float* a, int64_t row_step, int64_t depth_step, const float* b, int64_t depth,
                     const Vec* decay, float* out) {
  Vec acc[kTileRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    acc[r][0] = decay ? load(out + r * kPanel) * decay[0] : Vec{};
    acc[r][1] = decay ? load(out + r * kPanel + kLanes) * decay[1] : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b + k * kPanel), b1 = load(b + k * kPanel + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const float x = a[r * row_step + k * depth_step];
      acc[r][0] += b0 * x;
      acc[r][1] += b1 * x;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    store(out + r * kPanel, acc[r][0]);
    store(out + r * kPanel + kLanes, acc[r][1]);
  }
}

// Cache rows as float32, filled up with rows of zeros to a multiple of kTileRows.
template <typename T>
void widen(const T* cache, const int64_t* offsets, int64_t count, int64_t dim, int64_t stride, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = cache + offsets[i];
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes)
      store(out + i * stride + d, load(row + d));
    if (d < dim) store(out + i * stride + d, load_first(row + d, dim - d));
  }
  std::fill(out + count * stride, out + round_up(count, kTileRows) * stride, 0.0f);
}

// A panel of query rows, stored lane by lane.
struct Panel {
  float* query;     // [padded_dim][kPanel]
  float* acc;       // [padded_dim][kPanel]
  float* last_key;  // position of the last key that each row sees
  float* top;
  float* total;
};

// Attends with one panel over a tile of widened keys and values, the first of which stands at `position`. The
// rows of zeros that fill up the tile lie after the last key that any row sees, and are masked like later keys.
inline void panel_step(const Panel& panel, const float* keys, const float* values, int64_t stride,
                       int64_t position, int64_t count, int64_t dim, float* scores) {
  const int64_t padded = round_up(count, kTileRows);
  for (int64_t i = 0; i < padded; i += kTileRows)
    multiply(keys + i * stride, stride, 1, panel.query, dim, nullptr, scores + i * kPanel);
  Vec decay[2];
  for (int half = 0; half < 2; ++half) {
    float* s = scores + half * kLanes;
    float *top = panel.top + half * kLanes, *total = panel.total + half * kLanes;
    const Vec last = load(panel.last_key + half * kLanes), old_top = load(top);
    Vec new_top = old_top, weights = {};
    for (int64_t i = 0; i < padded; ++i) {
      const Vec score = fill(static_cast<float>(position + i)) > last ? fill(-kInfinity) : load(s + i * kPanel);
      new_top = max(new_top, score);
      store(s + i * kPanel, score);
    }
    for (int64_t i = 0; i < padded; ++i) {
      const Vec weight = exp2(load(s + i * kPanel) - new_top);
      weights += weight;
      store(s + i * kPanel, weight);
    }
    decay[half] = exp2(old_top - new_top);
    store(total, load(total) * decay[half] + weights);
    store(top, new_top);
  }
  for (int64_t d = 0; d < dim; d += kTileRows)
    multiply(values + d, 1, stride, scores, padded, decay, panel.acc + d * kPanel);
}

template <typename T>
void tile_item(const Problem<T>& p, const Group& g, int64_t split) {
  const int64_t stride = p.padded_dim, square = stride * kPanel, panel_size = 2 * square + 3 * kPanel;
  const int64_t padded_rows = round_up(g.rows, kPanel);
  float* keys =
      scratch(2 * kKeyTile * stride + kKeyTile * kPanel + padded_rows / kPanel * panel_size + stride);
  float* values = keys + kKeyTile * stride;
  float* scores = values + kKeyTile * stride;
  float* panels = scores + kKeyTile * kPanel;
  float* row_buffer = panels + padded_rows / kPanel * panel_size;
  const auto panel = [&](int64_t row) {
    float* base = panels + row / kPanel * panel_size;
    float* tail = base + 2 * square;
    return Panel{base, base + square, tail, tail + kPanel, tail + 2 * kPanel};
  };
  std::fill(panels, row_buffer, 0.0f);
  const int64_t first_position = p.context_len[g.sequence] - p.query_length(g.sequence);
  for (int64_t row = 0; row < padded_rows; ++row) {
    const Panel to = panel(row);
    const int64_t lane = row % kPanel;
    to.top[lane] = kLowest;
    if (row >= g.rows) continue;
    to.last_key[lane] = static_cast<float>(first_position + (g.first + row) / g.heads);
    p.read_query(g, row, row_buffer);
    for (int64_t d = 0; d < p.dim; ++d)
      to.query[d * kPanel + lane] = row_buffer[d];
  }

  const int64_t end = std::min<int64_t>(g.key_end, (split + 1) * kTileSplit);
  int64_t offsets[kKeyTile];
  for (int64_t begin = split * kTileSplit; begin < end; begin += kKeyTile) {
    const int64_t count = std::min<int64_t>(kKeyTile, end - begin);
    p.locate(g.sequence, begin, count, offsets);
    widen(p.key_cache + g.kv_head * p.head_stride, offsets, count, p.dim, stride, keys);
    widen(p.value_cache + g.kv_head * p.head_stride, offsets, count, p.dim, stride, values);
    for (int64_t row = 0; row < padded_rows; row += kPanel)
      panel_step(panel(row), keys, values, stride, begin, count, p.dim, scores);
  }
  for (int64_t row = 0; row < g.rows; ++row) {
    const Panel from = panel(row);
    const int64_t lane = row % kPanel;
    for (int64_t d = 0; d < p.dim; ++d)
      row_buffer[d] = from.acc[d * kPanel + lane];
    p.finish(g, split, row, from.top[lane], from.total[lane], row_buffer);
  }
}

}  // namespace softbatch
