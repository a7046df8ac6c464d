// Attention at query length 1, bound by memory: keys and values are read once, in order, and fetched ahead.

#pragma once

#include <type_traits>

#include "format.h"
#include "work.h"

namespace softbatch {

template <typename T>
INLINE void prefetch(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T))
    __builtin_prefetch(row + d);
}

// Memory is the limit: while a tile's keys are dotted those of the next are fetched, while its values are weighed the
// values, so that it never rests.
template <typename T>
struct NextTile {
  const T* keys;
  const T* values;
  const int64_t* offsets;
};

// A vector of a cache's numbers as the products take it.
template <typename F, typename T>
INLINE auto take(const T* p) {
  if constexpr (F::kDepth == 2) {
    return F::lanes(p);
  } else {
    return load(p);
  }
}

// The same of the first `count` numbers, the rest zero.
template <typename F, typename T>
INLINE auto take_first(const T* p, int64_t count) {
  T padded[kLanes * F::kDepth] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return take<F>(padded);
}

// scores[h][i] = scale * (query[h] . keys[offsets[i]]) for H heads; count is a multiple of 4.
template <int H, typename F, typename T>
INLINE void dot_keys(const typename F::Element* query, int64_t stride, const T* keys, const int64_t* offsets,
                     int64_t count, int64_t dim, float scale, const NextTile<T>* ahead, float* scores) {
  constexpr int64_t kWidth = kLanes * F::kDepth;
  for (int64_t i = 0; i < count; i += 4) {
    Vec acc[H][4] = {};
    const auto step = [&](int64_t d, auto take_key) ALWAYS_INLINE {
      decltype(take<F>(keys)) key[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        key[j] = take_key(keys + offsets[i + j] + d);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        const auto q = F::lanes(query + (h * stride + d) / F::kDepth);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          acc[h][j] = F::dot(acc[h][j], key[j], q);
      }
    };
    for (int64_t j = i; ahead && j < i + 4; ++j)
      prefetch(ahead->keys + ahead->offsets[j], dim);
    int64_t d = 0;
    for (; d + kWidth <= dim; d += kWidth)
      step(d, [](const T* p) { return take<F>(p); });
    if (d < dim) step(d, [&](const T* p) { return take_first<F>(p, dim - d); });
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const Vec four = sums(acc[h][0], acc[h][1], acc[h][2], acc[h][3]) * scale;
      std::memcpy(scores + h * kKeyTile + i, &four, 4 * sizeof(float));
    }
  }
}

// N vectors of acc[h] = acc[h] * decay[h] + sum over i of weights[h][i] * values[offsets[i]], for H heads. What the
// last value may lack to a pair is zeros: another's, even weighed with zero, could be infinite, and the sum NaN.
// take_value(p) gives the vector of a value's numbers from p on.
template <int H, int N, typename F, typename T, typename G>
INLINE void weigh_part(const typename F::Element* weights, const float* decay, const T* values, const int64_t* offsets,
                       int64_t count, const NextTile<T>* ahead, int64_t dim, float* acc, int64_t stride,
                       const G& take_value) {
  constexpr int kDepth = F::kDepth;
  Vec a[H][N];
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      a[h][n] = load(acc + h * stride + n * kLanes) * decay[h];
  for (int64_t i = 0; i < count; i += kDepth) {
    for (int64_t j = i; ahead && j < i + kDepth; ++j)
      prefetch(ahead->values + ahead->offsets[j], dim);
#pragma GCC unroll 4
    for (int n = 0; n < N; n += kDepth) {
      decltype(take<F>(values)) rows[kDepth];
      for (int j = 0; j < kDepth; ++j)
        rows[j] = i + j < count ? take_value(values + offsets[i + j] + n * kLanes) : decltype(take<F>(values)){};
      F::zip(rows);
#pragma GCC unroll 2
      for (int j = 0; j < kDepth; ++j)
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h)
          a[h][n + j] = F::add(a[h][n + j], rows[j], weights[(h * kKeyTile + i) / kDepth]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      store(acc + h * stride + n * kLanes, a[h][n]);
}

template <int H, typename F, typename T>
INLINE void weigh_values(const typename F::Element* weights, const float* decay, const T* values,
                         const int64_t* offsets, int64_t count, int64_t dim, const NextTile<T>* ahead, float* acc,
                         int64_t stride) {
  constexpr int64_t kWidth = kLanes * F::kDepth;
  const auto whole = [](const T* p) { return take<F>(p); };
  const auto part = [&](auto N, int64_t d, const auto& take_value) ALWAYS_INLINE {
    weigh_part<H, N.value, F>(weights, decay, values + d, offsets, count, d == 0 ? ahead : nullptr, dim, acc + d,
                              stride, take_value);
  };
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes)
    part(std::integral_constant<int, 4>{}, d, whole);
  for (; d + kWidth <= dim; d += kWidth)
    part(std::integral_constant<int, F::kDepth>{}, d, whole);
  if (d < dim)
    part(std::integral_constant<int, F::kDepth>{}, d, [&](const T* p) { return take_first<F>(p, dim - d); });
}

// Turns kKeyTile scores into weights and rescales the running sums; returns the decay of what came before.
INLINE float soften(float* scores, float& top, float& total) {
  Vec highest = fill(top), weights = {};
  for (int i = 0; i < kKeyTile; i += kLanes)
    highest = max(highest, load(scores + i));
  float new_top = top;
  for (int i = 0; i < kLanes; ++i)
    new_top = std::max(new_top, highest[i]);
  for (int i = 0; i < kKeyTile; i += kLanes) {
    const Vec weight = exp2(load(scores + i) - new_top);
    weights += weight;
    store(scores + i, weight);
  }
  const float decay = exp2(fill(top - new_top))[0];
  total = total * decay + sum(weights);
  top = new_top;
  return decay;
}

// Calls f(number of heads as a constant, first head) until all heads are done.
template <typename F>
INLINE void by_heads(int64_t heads, const F& f) {
  int64_t h = 0;
  for (; h + kHeads <= heads; h += kHeads)
    f(std::integral_constant<int, kHeads>{}, h);
  switch (heads - h) {
    case 3:
      return f(std::integral_constant<int, 3>{}, h);
    case 2:
      return f(std::integral_constant<int, 2>{}, h);
    case 1:
      return f(std::integral_constant<int, 1>{}, h);
  }
}

// `next`, if there is one, is what this thread does next: its first keys and values are fetched at the end.
template <typename T>
void dot_item(const Problem<T>& p, const Group& g, int64_t split, const Group* next, int64_t next_split) {
  using F = FormatOf<T>;
  using Element = typename F::Element;
  const int64_t stride = p.padded_dim, kv_heads = g.heads / p.group, tile = p.group * kKeyTile;
  const int64_t unpacked = p.keys.packed() ? kKeyTile * stride : 0;
  float* memory = scratch(2 * unpacked + g.rows * (2 * stride + 3) + 2 * tile + stride);
  T* unpacked_keys = reinterpret_cast<T*>(memory);  // first, where lines of the cache begin
  T* unpacked_values = reinterpret_cast<T*>(memory + unpacked);
  float* acc = memory + 2 * unpacked;
  float* scores = acc + g.rows * stride;
  float* top = scores + tile;
  float* total = top + g.rows;
  float* decay = total + g.rows;
  float* row_buffer = decay + g.rows;
  Element* weights = reinterpret_cast<Element*>(row_buffer + stride);
  Element* query = weights + tile;
  std::fill(acc, scores, 0.0f);
  std::fill(top, total, kLowest);
  std::fill(total, decay, 0.0f);
  std::fill(row_buffer, row_buffer + stride, 0.0f);
  for (int64_t row = 0; row < g.rows; ++row) {
    p.read_query(g, row, row_buffer);
    F::elements(row_buffer, stride, query + row * stride / F::kDepth);
  }

  const auto first_key = [](const Group& group, int64_t n) { return group.key_begin + n * kDotSplit; };
  const int64_t end = std::min<int64_t>(g.key_end, first_key(g, split + 1));
  // The offsets of a tile; those that fill it up are its first once more.
  const auto locate = [&](const Group& group, int64_t begin, int64_t limit, int64_t* offsets) {
    const int64_t count = std::min<int64_t>(kKeyTile, limit - begin);
    p.locate(group.sequence, begin, count, offsets);
    std::fill(offsets + count, offsets + kKeyTile, offsets[0]);
    return count;
  };
  int64_t buffers[2][kKeyTile], in_order[kKeyTile];
  for (int64_t i = 0; i < kKeyTile; ++i)
    in_order[i] = i * stride;
  int64_t *offsets = buffers[0], *next_offsets = buffers[1];
  int64_t count = locate(g, first_key(g, split), end, offsets), next_count = 0;
  for (int64_t begin = first_key(g, split); begin < end; begin += kKeyTile, count = next_count) {
    const int64_t fours = round_up(count, 4);
    int64_t next_kv_head = g.kv_head;
    if (begin + kKeyTile < end) {
      next_count = locate(g, begin + kKeyTile, end, next_offsets);
    } else if (next) {
      locate(*next, first_key(*next, next_split), next->key_end, next_offsets);
      next_kv_head = next->kv_head;
    }
    for (int64_t n = 0; n < kv_heads; ++n) {
      const int64_t h0 = n * p.group;
      const int64_t head = (g.kv_head + n) * p.head_stride;
      const bool last = n + 1 == kv_heads;
      const int64_t next_head = (last ? next_kv_head : g.kv_head + n + 1) * p.head_stride;
      const bool more = begin + kKeyTile < end || next;
      const int64_t* ahead_offsets = !last ? offsets : more ? next_offsets : nullptr;
      const T *keys = unpacked_keys, *values = unpacked_values;
      const int64_t* places = in_order;
      NextTile<T> tile{};
      if (p.keys.packed()) {
        p.keys.unpack(head, offsets, fours, p.dim, stride, unpacked_keys, next_head, ahead_offsets);
        p.values.unpack(head, offsets, count, p.dim, stride, unpacked_values, next_head, ahead_offsets);
      } else {
        keys = p.keys.numbers + head;
        values = p.values.numbers + head;
        places = offsets;
        tile = {p.keys.numbers + next_head, p.values.numbers + next_head, ahead_offsets};
      }
      const NextTile<T>* ahead = tile.offsets ? &tile : nullptr;
      by_heads(p.group, [&](auto H, int64_t h) ALWAYS_INLINE {
        dot_keys<H.value, F>(query + (h0 + h) * stride / F::kDepth, stride, keys, places, fours, p.dim, p.scale,
                             h == 0 ? ahead : nullptr, scores + h * kKeyTile);
      });
      for (int64_t h = 0; h < p.group; ++h) {
        float* s = scores + h * kKeyTile;
        std::fill(s + count, s + kKeyTile, -kInfinity);
        decay[h0 + h] = soften(s, top[h0 + h], total[h0 + h]);
        F::elements(s, kKeyTile, weights + h * kKeyTile / F::kDepth);
      }
      by_heads(p.group, [&](auto H, int64_t h) ALWAYS_INLINE {
        weigh_values<H.value, F>(weights + h * kKeyTile / F::kDepth, decay + h0 + h, values, places, count, p.dim,
                                 h == 0 ? ahead : nullptr, acc + (h0 + h) * stride, stride);
      });
    }
    std::swap(offsets, next_offsets);
  }
  for (int64_t row = 0; row < g.rows; ++row)
    p.finish(g, split, row, top[row], total[row], acc + row * stride);
}

}  // namespace softbatch
