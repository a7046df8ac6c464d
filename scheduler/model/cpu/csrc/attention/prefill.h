// Attention of longer chunks and of keys that many sequences share, bound by arithmetic.
//
// A tile of keys and values is brought into the products' format once for all rows of the item.

#pragma once

#include "attention/prefill_products.h"
#include "attention/shared_prefix.h"

namespace softbatch {

// A thread's memory for one item.
template <typename T>
struct TileMemory {
  using F = FormatOf<T>;
  using Element = typename F::Element;
  static_assert(sizeof(Element) == sizeof(float));

  int64_t stride, key_stride, panel_size, padded_rows;
  int64_t together;  // rows whose products follow each other, as vectors and matrix tiles wait for each other's stores
  Element *keys, *values;
  float *scores, *panels;
  float* rows;  // as many as a vector has lanes: queries as elements first, results last
  T* unpacked;

  INLINE TileMemory(const Problem<T>& p, const Group& g)
      : stride(p.padded_dim), key_stride(p.padded_key_dim), panel_size((key_stride + stride + 3) * kPanel),
        padded_rows(round_up(g.rows, kPanel)), together(uses_matrix_tiles<T>() ? kMaxRows : kPanel) {
    float* memory = scratch(kKeyTile * (key_stride + stride) + kKeyTile * together + padded_rows / kPanel * panel_size +
                            (kLanes + (p.keys.packed() ? kKeyTile : 0)) * key_stride);
    keys = reinterpret_cast<Element*>(memory);
    values = keys + kKeyTile * key_stride;
    scores = memory + kKeyTile * (key_stride + stride);
    panels = scores + kKeyTile * together;
    rows = panels + padded_rows / kPanel * panel_size;
    unpacked = reinterpret_cast<T*>(rows + kLanes * key_stride);
    std::fill(panels, rows + kLanes * key_stride, 0.0f);
  }

  INLINE Panel panel(int64_t row) const {
    float* base = panels + row / kPanel * panel_size;
    float *acc = base + key_stride * kPanel, *tail = acc + stride * kPanel;
    return Panel{base, acc, tail, tail + kPanel, tail + 2 * kPanel};
  }

  void take_queries(const Problem<T>& p, const Group& g) const {
    Element* elements = reinterpret_cast<Element*>(rows);
    const int64_t first_position = p.context_len[g.sequence] - p.query_length(g.sequence);
    for (int64_t first = 0; first < padded_rows; first += kLanes) {
      const Panel to = panel(first);
      const int64_t lane = first % kPanel;
      store(to.top + lane, fill(kLowest));
      for (int64_t row = first; row < std::min(first + kLanes, g.rows); ++row) {
        // What several sequences share lies before all of their tokens.
        to.last_key[row % kPanel] =
            static_cast<float>(g.members ? g.key_end - 1 : first_position + (g.first + row) / g.heads);
        p.template take_query<F>(g, row, elements + (row - first) * key_stride / F::kDepth);
      }
      for (int64_t k = 0; k < key_stride / F::kDepth; k += kLanes) {
        Vec lanes[kLanes];
        for (int i = 0; i < kLanes; ++i)
          std::memcpy(&lanes[i], elements + i * key_stride / F::kDepth + k, sizeof(Vec));
        transpose(lanes);
        for (int i = 0; i < kLanes; ++i)
          store(to.query + (k + i) * kPanel + lane, lanes[i]);
      }
    }
  }

  // Keys begin ... begin + count - 1, and their values.
  Keys<T> take_tile(const Problem<T>& p, const Group& g, int64_t begin, int64_t count) const {
    int64_t offsets[kKeyTile], keys_in_order[kKeyTile], values_in_order[kKeyTile];
    p.locate(g.sequence, begin, count, offsets);
    const int64_t head = g.kv_head * p.head_stride;
    if (p.keys.packed()) {
      for (int64_t i = 0; i < kKeyTile; ++i)
        keys_in_order[i] = i * key_stride, values_in_order[i] = i * stride;
      p.keys.unpack(head, offsets, count, p.dim, key_stride, unpacked);
      p.put_position_keys(begin, count, key_stride, unpacked);
      take_keys<F>(unpacked, keys_in_order, count, p.key_dim, key_stride, keys);
      p.values.unpack(head, offsets, count, p.dim, stride, unpacked);
      take_value_rows(unpacked, values_in_order, count, p.dim);
    } else {
      take_keys<F>(p.keys.numbers + head, offsets, count, p.dim, stride, keys);
      take_value_rows(p.values.numbers + head, offsets, count, p.dim);
    }
    return {keys, values, stride, key_stride, begin, p.dim, p.key_dim, round_up(count, key_rows<T>())};
  }

  void finish(const Problem<T>& p, const Group& g, int64_t split) const {
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

 private:
  INLINE void take_value_rows(const T* cache, const int64_t* places, int64_t count, int64_t dim) const {
    if constexpr (std::is_same_v<T, at::BFloat16> && F::kDepth == 2)
      if (uses_matrix_tiles<T>()) return take_values_across(cache, places, count, dim, stride, values);
    take_values<F>(cache, places, count, dim, stride, values);
  }
};

template <typename T>
void tile_item(const Problem<T>& p, const Group& g, int64_t split) {
  const TileMemory<T> my(p, g);
  my.take_queries(p, g);
  Vec decay[kMaxRows / kPanel][2];
  const int64_t keys_of_split = g.members ? kSharedSplit : kTileSplit, first_key = g.key_begin + split * keys_of_split;
  const int64_t end = std::min<int64_t>(g.key_end, first_key + keys_of_split);
  const float window = p.window > 0 ? static_cast<float>(p.window) : kInfinity;
  // Tiles begin at the same keys for all rows, so that no result depends on the rows beside it.
  const int64_t skipped = std::max<int64_t>(0, g.first_visible - first_key) / kKeyTile * kKeyTile;
  for (int64_t begin = first_key + skipped; begin < end; begin += kKeyTile) {
    const Keys<T> tile = my.take_tile(p, g, begin, std::min<int64_t>(kKeyTile, end - begin));
    for (int64_t first = 0; first < my.padded_rows; first += my.together) {
      const auto each_panel = [&](const auto& f) ALWAYS_INLINE {
        for (int64_t row = first; row < std::min(first + my.together, my.padded_rows); row += kPanel)
          f(my.panel(row), my.scores + (row - first) * kKeyTile, decay[(row - first) / kPanel]);
      };
      each_panel([&](const Panel& of, float* s, Vec*) ALWAYS_INLINE { tile.score(of, s); });
      if (p.softcap > 0)
        each_panel([&](const Panel&, float* s, Vec*) ALWAYS_INLINE {
          cap_scores(s, tile.padded * kPanel, p.scale, p.softcap);
        });
      const float scale = p.softcap > 0 ? 1.0f : p.scale;
      each_panel([&](const Panel& of, float* s, Vec* d) ALWAYS_INLINE { tile.weigh(of, scale, window, s, d); });
      each_panel([&](const Panel& of, float* s, Vec* d) ALWAYS_INLINE { tile.add_values(of, s, d); });
    }
  }
  my.finish(p, g, split);
}

}  // namespace softbatch
