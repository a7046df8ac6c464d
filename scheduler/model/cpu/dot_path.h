// Attention at query length 1, bound by memory: keys and values are read once, in order, and fetched ahead.

#pragma once

#include <type_traits>

#include "work.h"

namespace softbatch {

template <typename T>
INLINE void prefetch(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T))
    __builtin_prefetch(row + d);
}

// Memory is the limit: while keys are dotted, their values and the keys of the next tile are fetched.
template <typename T>
struct NextTile {
  const T* values;
  const T* keys;
  const int64_t* key_offsets;
};

// scores[h][i] = query[h] . keys[offsets[i]] for H heads; count is a multiple of 4.
template <int H, typename T>
INLINE void dot_keys(const float* query, int64_t stride, const T* keys, const int64_t* offsets, int64_t count,
                     int64_t dim, const NextTile<T>* ahead, float* scores) {
  for (int64_t i = 0; i < count; i += 4) {
    Vec acc[H][4] = {};
    const auto step = [&](int64_t d, auto load_key) ALWAYS_INLINE {
      Vec key[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        key[j] = load_key(keys + offsets[i + j] + d);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        const Vec q = load(query + h * stride + d);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          acc[h][j] += key[j] * q;
      }
    };
    for (int64_t j = i; ahead && j < i + 4; ++j) {
      prefetch(ahead->values + offsets[j], dim);
      prefetch(ahead->keys + ahead->key_offsets[j], dim);
    }
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes)
      step(d, [](const T* p) { return load(p); });
    if (d < dim) step(d, [&](const T* p) { return load_first(p, dim - d); });
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const Vec four = sums(acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
      std::memcpy(scores + h * kKeyTile + i, &four, 4 * sizeof(float));
    }
  }
}

// N vectors of acc[h] = acc[h] * decay[h] + sum over i of weights[h][i] * values[offsets[i]], for H heads.
template <int H, int N, typename T, typename F>
INLINE void weigh_part(const float* weights, const float* decay, const T* values, const int64_t* offsets,
                       int64_t count, float* acc, int64_t stride, const F& load_value) {
  Vec a[H][N];
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      a[h][n] = load(acc + h * stride + n * kLanes) * decay[h];
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Vec v = load_value(values + offsets[i] + n * kLanes);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h)
        a[h][n] += v * weights[h * kKeyTile + i];
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      store(acc + h * stride + n * kLanes, a[h][n]);
}

template <int H, typename T>
INLINE void weigh_values(const float* weights, const float* decay, const T* values, const int64_t* offsets,
                         int64_t count, int64_t dim, float* acc, int64_t stride) {
  const auto whole = [](const T* p) { return load(p); };
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes)
    weigh_part<H, 4>(weights, decay, values + d, offsets, count, acc + d, stride, whole);
  for (; d + kLanes <= dim; d += kLanes)
    weigh_part<H, 1>(weights, decay, values + d, offsets, count, acc + d, stride, whole);
  if (d < dim)
    weigh_part<H, 1>(weights, decay, values + d, offsets, count, acc + d, stride,
                     [&](const T* p) { return load_first(p, dim - d); });
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

template <typename T>
void dot_item(const Problem<T>& p, const Group& g, int64_t split) {
  const int64_t stride = p.padded_dim, kv_heads = g.heads / p.group;
  float* query = scratch(g.rows * (2 * stride + 3) + p.group * kKeyTile);
  float* acc = query + g.rows * stride;
  float* scores = acc + g.rows * stride;
  float* top = scores + p.group * kKeyTile;
  float* total = top + g.rows;
  float* decay = total + g.rows;
  std::fill(query, scores, 0.0f);
  std::fill(top, total, kLowest);
  std::fill(total, decay, 0.0f);
  for (int64_t row = 0; row < g.rows; ++row)
    p.read_query(g, row, p.scale, query + row * stride);

  const int64_t end = std::min<int64_t>(g.key_end, (split + 1) * kDotSplit);
  const auto length = [&](int64_t begin) { return std::clamp<int64_t>(end - begin, 0, kKeyTile); };
  int64_t buffers[2][kKeyTile];
  int64_t *offsets = buffers[0], *next_offsets = buffers[1];
  p.locate(g.sequence, split * kDotSplit, length(split * kDotSplit), offsets);
  for (int64_t begin = split * kDotSplit; begin < end; begin += kKeyTile) {
    const int64_t count = length(begin), fours = round_up(count, 4), next_count = length(begin + kKeyTile);
    std::fill(offsets + count, offsets + fours, offsets[0]);
    p.locate(g.sequence, begin + kKeyTile, next_count, next_offsets);
    std::fill(next_offsets + next_count, next_offsets + kKeyTile, offsets[0]);
    for (int64_t n = 0; n < kv_heads; ++n) {
      const int64_t h0 = n * p.group;
      const T* keys = p.key_cache + (g.kv_head + n) * p.head_stride;
      const T* values = p.value_cache + (g.kv_head + n) * p.head_stride;
      const bool last = n + 1 == kv_heads;
      const NextTile<T> ahead{values, last ? p.key_cache + g.kv_head * p.head_stride : keys + p.head_stride,
                           last ? next_offsets : offsets};
      by_heads(p.group, [&](auto H, int64_t h) ALWAYS_INLINE {
        dot_keys<H.value>(query + (h0 + h) * stride, stride, keys, offsets, fours, p.dim,
                          h == 0 ? &ahead : nullptr, scores + h * kKeyTile);
      });
      for (int64_t h = 0; h < p.group; ++h) {
        float* s = scores + h * kKeyTile;
        std::fill(s + count, s + kKeyTile, -kInfinity);
        decay[h0 + h] = soften(s, top[h0 + h], total[h0 + h]);
      }
      by_heads(p.group, [&](auto H, int64_t h) ALWAYS_INLINE {
        weigh_values<H.value>(scores + h * kKeyTile, decay + h0 + h, values, offsets, count, p.dim,
                              acc + (h0 + h) * stride, stride);
      });
    }
    std::swap(offsets, next_offsets);
  }
  for (int64_t row = 0; row < g.rows; ++row)
    p.finish(g, split, row, top[row], total[row], acc + row * stride);
}

}  // namespace softbatch
