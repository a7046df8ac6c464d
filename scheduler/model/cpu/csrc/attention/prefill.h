// Attention of longer chunks and of keys that many sequences share, bound by arithmetic: register-blocked products
// S^T = K Q^T and O^T += V^T P^T.
//
// Query rows lie in the vectors' lanes. Neither K nor V is transposed then, and the online softmax never sums
// across lanes. A tile of keys and values is brought into the products' format once for all the item's rows.

#pragma once

#include "simd/amx.h"
#include "simd/format.h"
#include "attention/shared_prefix.h"
#include "attention/problem.h"

namespace softbatch {

// Keys of a tile are filled up to a multiple of this: a row of matrix tiles takes pairs of 32 weights at once.
template <typename T>
int64_t key_rows() {
  return uses_matrix_tiles<T>() ? kMatrixDepth : kTileRows;
}
static_assert(kKeyTile % kMatrixDepth == 0 && kMatrixDepth % kTileRows == 0);

// out[r][column] = decay[column] * out[r][column] + sum over k of a[r * row_step + k * depth_step] * b[k][column]
// for kTileRows rows r and one panel of columns; without decay, out starts from zero.
template <typename F>
INLINE void multiply(const typename F::Element* a, int64_t row_step, int64_t depth_step, const float* b,
                     int64_t depth, const Vec* decay, float* out) {
  Vec acc[kTileRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    acc[r][0] = decay ? load(out + r * kPanel) * decay[0] : Vec{};
    acc[r][1] = decay ? load(out + r * kPanel + kLanes) * decay[1] : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const auto b0 = F::lanes(b + k * kPanel), b1 = F::lanes(b + k * kPanel + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const auto x = a[r * row_step + k * depth_step];
      acc[r][0] = F::add(acc[r][0], b0, x);
      acc[r][1] = F::add(acc[r][1], b1, x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    store(out + r * kPanel, acc[r][0]);
    store(out + r * kPanel + kLanes, acc[r][1]);
  }
}

// Key rows [count][stride / kDepth], filled up with rows of zeros to a multiple of key_rows.
template <typename F, typename T>
void take_keys(const T* cache, const int64_t* offsets, int64_t count, int64_t dim, int64_t stride,
               typename F::Element* out) {
  const int64_t step = stride / F::kDepth, padded = round_up(count, key_rows<T>());
  std::memset(out, 0, padded * step * sizeof *out);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (F::kDepth == 2) {
      std::memcpy(out + i * step, cache + offsets[i], dim * sizeof(T));
    } else {
      widen_row(cache + offsets[i], dim, out + i * step);
    }
  }
}

// Value rows [count / kDepth][stride], kDepth rows interleaved, filled up like the keys.
template <typename F, typename T>
void take_values(const T* cache, const int64_t* offsets, int64_t count, int64_t dim, int64_t stride,
                 typename F::Element* out) {
  if constexpr (F::kDepth == 2) {
    std::memset(out, 0, round_up(count, kTileRows) / 2 * stride * sizeof *out);
    for (int64_t i = 0; i < count; i += 2) {
      const T *low = cache + offsets[i], *high = i + 1 < count ? cache + offsets[i + 1] : nullptr;
      for (int64_t d = 0; d < dim; ++d)
        out[i / 2 * stride + d] = low[d].x | (high ? uint32_t{high[d].x} << 16 : 0);
    }
  } else {
    take_keys<F>(cache, offsets, count, dim, stride, out);
  }
}

// The same for matrix tiles: [stride][kKeyTile / 2], each row one dimension's pairs.
INLINE void take_values_across(const at::BFloat16* cache, const int64_t* offsets, int64_t count, int64_t dim,
                               int64_t stride, uint32_t* out) {
  const auto row = [&](int64_t i, int64_t d) {
    if (i >= count || d >= dim) return Bits{};
    const at::BFloat16* from = cache + offsets[i] + d;
    if (d + kLanes <= dim) return load_shorts(from);
    at::BFloat16 some[kLanes] = {};
    std::memcpy(some, from, (dim - d) * sizeof *from);
    return load_shorts(some);
  };
  for (int64_t i = 0; i < round_up(count, kMatrixDepth); i += 2 * kLanes)
    for (int64_t d = 0; d < stride; d += kLanes) {
      Vec pairs[kLanes];
      for (int j = 0; j < kLanes; ++j)
        pairs[j] = (Vec)(row(i + 2 * j, d) | row(i + 2 * j + 1, d) << 16);
      transpose(pairs);
      for (int j = 0; j < kLanes; ++j)
        store(reinterpret_cast<float*>(out + (d + j) * (kKeyTile / 2) + i / 2), pairs[j]);
    }
}

// A panel of query rows, stored lane by lane.
struct Panel {
  float* query;     // [padded_dim / kDepth][kPanel], in the products' format
  float* acc;       // [padded_dim][kPanel]
  float* last_key;  // position of the last key that each row sees
  float* top;
  float* total;
};

// A tile of keys and values, the first of which stands at `position`, brought into the products' format. The rows of
// zeros that fill it up lie after the last key that any row sees, and are masked like later keys.
template <typename T>
struct Keys {
  using F = FormatOf<T>;
  const typename F::Element *keys, *values;
  int64_t stride, position, dim;
  int64_t padded;  // keys, the rows of zeros among them

  // scores[key][row of the panel]
  INLINE void score(const Panel& panel, float* scores) const {
    if (uses_matrix_tiles<T>()) {
      for (int64_t i = 0; i < padded; i += 2 * kMatrixRows)
        multiply_tiles<false>(keys + i * (stride / F::kDepth), stride / F::kDepth, panel.query, stride,
                              scores + i * kPanel);
    } else {
      for (int64_t i = 0; i < padded; i += kTileRows)
        multiply<F>(keys + i * (stride / F::kDepth), stride / F::kDepth, 1, panel.query,
                    (dim + F::kDepth - 1) / F::kDepth, nullptr, scores + i * kPanel);
    }
  }

  // Makes of scores what the values weigh, in the products' format; decay[half of the panel] is for what came before.
  INLINE void weigh(const Panel& panel, float scale, float* scores, Vec* decay) const {
    for (int half = 0; half < 2; ++half) {
      float* s = scores + half * kLanes;
      float *top = panel.top + half * kLanes, *total = panel.total + half * kLanes;
      const Vec last = load(panel.last_key + half * kLanes), old_top = load(top);
      Vec new_top = old_top, weights = {};
      const auto go = [&](auto masked) ALWAYS_INLINE {
        const auto unless_later = [&](int64_t i, Vec x, float otherwise) ALWAYS_INLINE {
          if constexpr (!decltype(masked)::value) return x;
          return fill(static_cast<float>(position + i)) > last ? fill(otherwise) : x;
        };
        for (int64_t i = 0; i < padded; ++i)
          new_top = max(new_top, unless_later(i, load(s + i * kPanel) * scale, -kInfinity));
        for (int64_t i = 0; i < padded; i += F::kDepth) {
          Vec weight[F::kDepth];
          for (int j = 0; j < F::kDepth; ++j) {
            const Vec above = load(s + (i + j) * kPanel) * scale - new_top;  // 0 at the most, but for how it is rounded
            weight[j] = unless_later(i + j, exp2(min_zero(above)), 0.0f);
            weights += weight[j];
          }
          store(s + i / F::kDepth * kPanel, F::interleave(weight));
        }
      };
      // Of rows the first sees least; what comes of lanes that hold none is never read.
      if (static_cast<float>(position + padded - 1) > panel.last_key[half * kLanes]) {
        go(std::true_type{});
      } else {
        go(std::false_type{});
      }
      decay[half] = exp2(old_top - new_top);
      store(total, load(total) * decay[half] + weights);
      store(top, new_top);
    }
  }

  INLINE void add_values(const Panel& panel, const float* weights, const Vec* decay) const {
    if (uses_matrix_tiles<T>()) {
      const bool decays = !same(decay[0], fill(1.0f)) || !same(decay[1], fill(1.0f));
      for (int64_t i = 0; decays && i < stride * kPanel; i += kPanel) {
        store(panel.acc + i, load(panel.acc + i) * decay[0]);
        store(panel.acc + i + kLanes, load(panel.acc + i + kLanes) * decay[1]);
      }
      for (int64_t d = 0; d < stride; d += 2 * kMatrixRows)
        multiply_tiles<true>(values + d * (kKeyTile / 2), kKeyTile / 2, weights, padded, panel.acc + d * kPanel);
    } else {
      for (int64_t d = 0; d < dim; d += kTileRows)
        multiply<F>(values + d, 1, stride, weights, padded / F::kDepth, decay, panel.acc + d * kPanel);
    }
  }

 private:
  // Two times sixteen rows of a matrix, `apart` elements from one to the next, times a panel's columns.
  template <bool kAdd>
  static INLINE void multiply_tiles(const typename F::Element* rows, int64_t apart, const float* b, int64_t depth,
                                    float* out) {
    const int64_t bytes = apart * sizeof *rows;
    const auto step = [b](int64_t i) { return reinterpret_cast<const char*>(b) + i * kMatrixStep; };
    multiply_matrix_tiles<true, kAdd>({rows, bytes, kMatrixBytes}, {rows + kMatrixRows * apart, bytes, kMatrixBytes},
                                      step, depth / kMatrixDepth, out, [] {});
  }
};

template <typename T>
void tile_item(const Problem<T>& p, const Group& g, int64_t split) {
  using F = FormatOf<T>;
  using Element = typename F::Element;
  static_assert(sizeof(Element) == sizeof(float));
  const int64_t stride = p.padded_dim, square = stride * kPanel, panel_size = 2 * square + 3 * kPanel;
  const int64_t padded_rows = round_up(g.rows, kPanel);
  // Rows whose products follow each other: vectors and matrix tiles wait long for what the other has just written.
  const int64_t together = uses_matrix_tiles<T>() ? kMaxRows : kPanel;
  Vec decay[kMaxRows / kPanel][2];
  float* memory = scratch(2 * kKeyTile * stride + kKeyTile * together + padded_rows / kPanel * panel_size +
                          (kLanes + (p.keys.packed() ? kKeyTile : 0)) * stride);
  Element* keys = reinterpret_cast<Element*>(memory);
  Element* values = keys + kKeyTile * stride;
  float* scores = memory + 2 * kKeyTile * stride;
  float* panels = scores + kKeyTile * together;
  // As many as a vector has lanes: queries as elements first, results last.
  float* rows = panels + padded_rows / kPanel * panel_size;
  Element* elements = reinterpret_cast<Element*>(rows);
  T* unpacked = reinterpret_cast<T*>(rows + kLanes * stride);
  const auto panel = [&](int64_t row) {
    float* base = panels + row / kPanel * panel_size;
    float* tail = base + 2 * square;
    return Panel{base, base + square, tail, tail + kPanel, tail + 2 * kPanel};
  };
  std::fill(panels, rows + kLanes * stride, 0.0f);
  const int64_t first_position = p.context_len[g.sequence] - p.query_length(g.sequence);
  for (int64_t first = 0; first < padded_rows; first += kLanes) {
    const Panel to = panel(first);
    const int64_t lane = first % kPanel;
    store(to.top + lane, fill(kLowest));
    for (int64_t row = first; row < std::min(first + kLanes, g.rows); ++row) {
      // What several sequences share lies before all of their tokens.
      to.last_key[row % kPanel] =
          static_cast<float>(g.members ? g.key_end - 1 : first_position + (g.first + row) / g.heads);
      p.template take_query<F>(g, row, elements + (row - first) * stride / F::kDepth);
    }
    for (int64_t k = 0; k < stride / F::kDepth; k += kLanes) {
      Vec lanes[kLanes];
      for (int i = 0; i < kLanes; ++i)
        std::memcpy(&lanes[i], elements + i * stride / F::kDepth + k, sizeof(Vec));
      transpose(lanes);
      for (int i = 0; i < kLanes; ++i)
        store(to.query + (k + i) * kPanel + lane, lanes[i]);
    }
  }

  const int64_t keys_of_split = g.members ? kSharedSplit : kTileSplit, first_key = g.key_begin + split * keys_of_split;
  const int64_t end = std::min<int64_t>(g.key_end, first_key + keys_of_split);
  int64_t offsets[kKeyTile], in_order[kKeyTile];
  for (int64_t i = 0; i < kKeyTile; ++i)
    in_order[i] = i * stride;
  for (int64_t begin = first_key; begin < end; begin += kKeyTile) {
    const int64_t count = std::min<int64_t>(kKeyTile, end - begin);
    p.locate(g.sequence, begin, count, offsets);
    const int64_t head = g.kv_head * p.head_stride;
    const auto take_value_rows = [&](const T* cache, const int64_t* places) {
      if constexpr (std::is_same_v<T, at::BFloat16> && F::kDepth == 2)
        if (uses_matrix_tiles<T>()) return take_values_across(cache, places, count, p.dim, stride, values);
      take_values<F>(cache, places, count, p.dim, stride, values);
    };
    if (p.keys.packed()) {
      p.keys.unpack(head, offsets, count, p.dim, stride, unpacked);
      take_keys<F>(unpacked, in_order, count, p.dim, stride, keys);
      p.values.unpack(head, offsets, count, p.dim, stride, unpacked);
      take_value_rows(unpacked, in_order);
    } else {
      take_keys<F>(p.keys.numbers + head, offsets, count, p.dim, stride, keys);
      take_value_rows(p.values.numbers + head, offsets);
    }
    const Keys<T> tile{keys, values, stride, begin, p.dim, round_up(count, key_rows<T>())};
    for (int64_t first = 0; first < padded_rows; first += together) {
      const auto each_panel = [&](const auto& f) ALWAYS_INLINE {
        for (int64_t row = first; row < std::min(first + together, padded_rows); row += kPanel)
          f(panel(row), scores + (row - first) * kKeyTile, decay[(row - first) / kPanel]);
      };
      each_panel([&](const Panel& of, float* s, Vec*) ALWAYS_INLINE { tile.score(of, s); });
      each_panel([&](const Panel& of, float* s, Vec* d) ALWAYS_INLINE { tile.weigh(of, p.scale, s, d); });
      each_panel([&](const Panel& of, float* s, Vec* d) ALWAYS_INLINE { tile.add_values(of, s, d); });
    }
  }
  for (int64_t first = 0; first < g.rows; first += kLanes) {
    const Panel from = panel(first);
    const int64_t lane = first % kPanel;
    for (int64_t d = 0; d < stride; d += kLanes) {
      Vec lanes[kLanes];
      for (int i = 0; i < kLanes; ++i)
        lanes[i] = load(from.acc + (d + i) * kPanel + lane);
      transpose(lanes);
      for (int i = 0; i < kLanes; ++i)
        store(rows + i * stride + d, lanes[i]);
    }
    for (int64_t row = first; row < std::min(first + kLanes, g.rows); ++row)
      p.finish(g, split, row, from.top[row % kPanel], from.total[row % kPanel], rows + (row - first) * stride);
  }
}

}  // namespace softbatch
