// Decode attention: one query token per sequence. Memory is the limit, so keys and values are read once and prefetched.

#pragma once

#include "attention/decode_products.h"

namespace softbatch {

// A thread's memory for one item.
template <typename T>
struct DotMemory {
  using F = FormatOf<T>;
  using Element = typename F::Element;
  static constexpr int64_t kBlock = kKeyTile * kHeads;  // of scores

  int64_t bundles;   // of a kv head
  T *keys, *values;  // a tile of a packed cache
  Bundle* softmax;
  float *acc, *scores, *decay;
  Element *weights, *query;

  INLINE DotMemory(const Problem<T>& p, const Group& g) : bundles((p.group + kHeads - 1) / kHeads) {
    const int64_t stride = p.padded_dim, key_stride = p.padded_key_dim, kv_heads = g.heads / p.group;
    const int64_t unpacked_keys = p.keys.packed() ? kKeyTile * key_stride : 0;
    const int64_t unpacked = unpacked_keys + (p.keys.packed() ? kKeyTile * stride : 0);
    const int64_t bundle_floats = kv_heads * bundles * int64_t(sizeof(Bundle) / sizeof(float));
    float* memory = scratch(unpacked + bundle_floats + g.rows * (stride + key_stride) + 2 * kBlock + kHeads * kFour);
    keys = reinterpret_cast<T*>(memory);  // first, so that rows begin at cache lines
    values = reinterpret_cast<T*>(memory + unpacked_keys);
    softmax = reinterpret_cast<Bundle*>(memory + unpacked);
    acc = memory + unpacked + bundle_floats;
    scores = acc + g.rows * stride;
    decay = scores + kBlock;
    weights = reinterpret_cast<Element*>(decay + kHeads * kFour);
    query = weights + kBlock;
    for (int64_t i = 0; i < kv_heads * bundles; ++i)
      for (int v = 0; v < kFourVecs; ++v)
        softmax[i].top[v] = fill(kLowest), softmax[i].total[v] = Vec{};
    std::fill(acc, scores, 0.0f);
    std::memset(query, 0, g.rows * key_stride / F::kDepth * sizeof *query);
    for (int64_t row = 0; row < g.rows; ++row)
      p.template take_query<F>(g, row, query + row * key_stride / F::kDepth);
  }

  INLINE void finish(const Problem<T>& p, const Group& g, int64_t split) const {
    for (int64_t row = 0; row < g.rows; ++row) {
      const int64_t h = row % p.group, lane = h % kHeads * kFour;
      const Bundle& bundle = softmax[row / p.group * bundles + h / kHeads];
      const float* top = reinterpret_cast<const float*>(bundle.top);
      const float* total = reinterpret_cast<const float*>(bundle.total);
      float sum = 0;
      for (int i = 0; i < kFour; ++i)
        sum += total[lane + i];
      p.finish(g, split, row, top[lane], sum, acc + row * p.padded_dim);
    }
  }
};

// The offsets of a tile's keys, filled up with the first once more. Returns how many there are.
template <typename T>
INLINE int64_t locate_tile(const Problem<T>& p, const Group& g, int64_t begin, int64_t end, int64_t* offsets) {
  const int64_t count = std::min<int64_t>(kKeyTile, end - begin);
  p.locate(g.sequence, begin, count, offsets);
  std::fill(offsets + count, offsets + kKeyTile, offsets[0]);
  return count;
}

// `next` is this thread's next item, or null: its first keys and values are fetched at the end. D is the dimension of
// the heads, or 0 for any; KD is then 0 too, or what a score is a product of.
template <typename T, int D, int KD>
void dot_item(const Problem<T>& p, const Group& g, int64_t split, const Group* next, int64_t next_split) {
  using F = FormatOf<T>;
  const DotMemory<T> my(p, g);
  const int64_t stride = p.padded_dim, kv_heads = g.heads / p.group, dim = D ? D : p.dim;
  const int64_t key_stride = p.padded_key_dim, key_dim = KD ? KD : p.key_dim;
  const int64_t first = g.key_begin + split * kDotSplit, end = std::min<int64_t>(g.key_end, first + kDotSplit);
  int64_t buffers[2][kKeyTile], keys_in_order[kKeyTile], values_in_order[kKeyTile];
  for (int64_t i = 0; i < kKeyTile; ++i)
    keys_in_order[i] = i * key_stride, values_in_order[i] = i * stride;
  int64_t *offsets = buffers[0], *next_offsets = buffers[1];
  int64_t count = locate_tile(p, g, first, end, offsets), next_count = 0;
  for (int64_t begin = first; begin < end; begin += kKeyTile, count = next_count) {
    const int64_t fours = round_up(count, kFour);
    const bool is_last_tile = begin + kKeyTile >= end;
    int64_t next_kv_head = g.kv_head;
    p.put_position_keys(begin, fours, key_stride, my.keys);  // unpacking leaves them as they are
    if (!is_last_tile) {
      next_count = locate_tile(p, g, begin + kKeyTile, end, next_offsets);
    } else if (next) {
      locate_tile(p, *next, next->key_begin + next_split * kDotSplit, next->key_end, next_offsets);
      next_kv_head = next->kv_head;
    }
    for (int64_t n = 0; n < kv_heads; ++n) {
      const bool is_last_head = n + 1 == kv_heads;
      const int64_t head = (g.kv_head + n) * p.head_stride;
      const int64_t next_head = (is_last_head ? next_kv_head : g.kv_head + n + 1) * p.head_stride;
      const int64_t* ahead_offsets = !is_last_head ? offsets : !is_last_tile || next ? next_offsets : nullptr;
      const T *keys = my.keys, *values = my.values;
      const int64_t *key_places = keys_in_order, *value_places = values_in_order;
      NextTile<T> tile{};
      if (p.keys.packed()) {
        p.keys.unpack(head, offsets, fours, dim, key_stride, my.keys, next_head, ahead_offsets);
        p.values.unpack(head, offsets, count, dim, stride, my.values, next_head, ahead_offsets);
      } else {
        keys = p.keys.numbers + head;
        values = p.values.numbers + head;
        key_places = value_places = offsets;
        tile = {p.keys.numbers + next_head, p.values.numbers + next_head, ahead_offsets};
      }
      by_heads(p.group, [&](auto H, int64_t h) ALWAYS_INLINE {
        const int64_t row = n * p.group + h, bundle = n * my.bundles + h / kHeads;
        const NextTile<T>* ahead = h == 0 && tile.offsets ? &tile : nullptr;
        const auto* query = my.query + row * key_stride / F::kDepth;
        dot_keys<H.value, KD, F>(query, key_stride, keys, key_places, fours, key_dim, p.scale, ahead, my.scores);
        if (p.softcap > 0) cap_scores(my.scores, fours * kHeads, 1.0f, p.softcap);
        softmax_update<H.value, F>(my.scores, count, my.softmax[bundle], my.decay, my.weights);
        accumulate_values<H.value, D, F>(my.weights, my.decay, values, value_places, count, dim, ahead,
                                         my.acc + row * stride, stride);
      });
    }
    std::swap(offsets, next_offsets);
  }
  my.finish(p, g, split);
}

}  // namespace softbatch
