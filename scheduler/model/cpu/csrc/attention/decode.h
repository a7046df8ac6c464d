// Attention at query length 1, bound by memory: keys and values are read once, in order, and fetched ahead.

#pragma once

#include <type_traits>

#include "simd/format.h"
#include "attention/problem.h"

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
INLINE auto load_as(const T* p) {
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
  return load_as<F>(padded);
}

// Scores and weights of keys lie by fours: those of four keys for a head, then for the next of a bundle of kHeads.
constexpr int kFour = 4;
constexpr int kFourVecs = kHeads * kFour / kLanes;  // vectors of such a block
static_assert(kFourVecs * kLanes == kHeads * kFour);

// A bundle's running softmax. A head has kFour lanes: its maximum is in each of them (unless a score is NaN, and then its
// total is too), its total the sum of them.
struct Bundle {
  Vec top[kFourVecs], total[kFourVecs];
};

// The scores of four keys, of which acc[h][j] is to be summed up, for H heads; the other heads' are zeros.
template <int H>
INLINE void fold_four(const Vec (&acc)[H][kFour], Vec* to) {
  constexpr int kTogether = kLanes / kFour;  // heads in a vector
  Vec quads[kHeads] = {};
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h)
    quads[h] = fold<2>(fold<1>(acc[h][0], acc[h][1]), fold<1>(acc[h][2], acc[h][3]));
#pragma GCC unroll 4
  for (int v = 0; v < kFourVecs; ++v) {
    const Vec* q = quads + v * kTogether;
    if constexpr (kTogether == 4) {
      to[v] = fold<8>(fold<4>(q[0], q[1]), fold<4>(q[2], q[3]));
    } else if constexpr (kTogether == 2) {
      to[v] = fold<4>(q[0], q[1]);
    } else {
      to[v] = q[0];
    }
  }
}

// Scores of so many keys, a multiple of four: scale * (query[h] . keys[offsets[i]]) for H heads.
template <int H, int D, typename F, typename T>
INLINE void dot_keys(const typename F::Element* query, int64_t stride, const T* keys, const int64_t* offsets,
                     int64_t count, int64_t any_dim, float scale, const NextTile<T>* ahead, float* scores) {
  constexpr int64_t kWidth = kLanes * F::kDepth;
  const int64_t dim = D ? D : any_dim, row = stride / F::kDepth;
  for (int64_t i = 0; i < count; i += kFour) {
    Vec acc[H][kFour] = {};
    const auto step = [&](int64_t d, auto take_key) ALWAYS_INLINE {
      decltype(load_as<F>(keys)) key[kFour];
#pragma GCC unroll 4
      for (int j = 0; j < kFour; ++j)
        key[j] = take_key(keys + offsets[i + j] + d);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        const auto q = F::lanes(query + h * row + d / F::kDepth);
#pragma GCC unroll 4
        for (int j = 0; j < kFour; ++j)
          acc[h][j] = F::dot(acc[h][j], key[j], q);
      }
    };
    if (ahead)
#pragma GCC unroll 4
      for (int j = 0; j < kFour; ++j)
        prefetch(ahead->keys + ahead->offsets[i + j], dim);
    int64_t d = 0;
#pragma GCC unroll 8
    for (; d + kWidth <= dim; d += kWidth)
      step(d, [](const T* p) { return load_as<F>(p); });
    if (d < dim) step(d, [&](const T* p) { return take_first<F>(p, dim - d); });
    Vec four[kFourVecs];
    fold_four<H>(acc, four);
    for (int v = 0; v < kFourVecs; ++v)
      store(scores + i * kHeads + v * kLanes, four[v] * scale);
  }
}

// N vectors of acc[h] = acc[h] * its decay + sum over i of its weight of i * values[offsets[i]], for H heads. What the
// last values may lack to four is zeros: another's, even weighed with zero, could be infinite, and the sum NaN.
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
      a[h][n] = load(acc + h * stride + n * kLanes) * decay[h * kFour];
  const auto four = [&](int64_t i, auto valid) ALWAYS_INLINE {
    if (ahead)
#pragma GCC unroll 4
      for (int j = 0; j < kFour; ++j)
        prefetch(ahead->values + ahead->offsets[i + j], dim);
#pragma GCC unroll 4
    for (int j = 0; j < kFour; j += kDepth)
#pragma GCC unroll 4
      for (int n = 0; n < N; n += kDepth) {
        decltype(load_as<F>(values)) rows[kDepth];
        for (int k = 0; k < kDepth; ++k)
          rows[k] = j + k < valid ? take_value(values + offsets[i + j + k] + n * kLanes) : decltype(load_as<F>(values)){};
        F::zip(rows);
#pragma GCC unroll 2
        for (int k = 0; k < kDepth; ++k)
#pragma GCC unroll 4
          for (int h = 0; h < H; ++h)
            a[h][n + k] = F::add(a[h][n + k], rows[k], weights[(h * kFour + j) / kDepth]);
      }
    weights += kHeads * kFour / kDepth;
  };
  int64_t i = 0;
  for (; i + kFour <= count; i += kFour)
    four(i, std::integral_constant<int, kFour>{});
  if (i < count) four(i, static_cast<int>(count - i));
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      store(acc + h * stride + n * kLanes, a[h][n]);
}

template <int H, int D, typename F, typename T>
INLINE void accumulate_values(const typename F::Element* weights, const float* decay, const T* values,
                         const int64_t* offsets, int64_t count, int64_t any_dim, const NextTile<T>* ahead, float* acc,
                         int64_t stride) {
  constexpr int64_t kWidth = kLanes * F::kDepth;
  const int64_t dim = D ? D : any_dim;
  const auto whole = [](const T* p) { return load_as<F>(p); };
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

// Turns the scores of `count` keys into weights, zeros up to a multiple of four, and rescales the running sums; `decay` is
// of what came before.
template <int H, typename F>
INLINE void softmax_update(float* scores, int64_t count, Bundle& bundle, float* decay, typename F::Element* weights) {
  constexpr int kVecs = (H * kFour + kLanes - 1) / kLanes;  // those that hold a head
  const int64_t fours = round_up(count, kFour), floats = fours * kHeads;
  for (int64_t i = count; i < fours; ++i)
    for (int h = 0; h < H; ++h)
      scores[i / kFour * kHeads * kFour + h * kFour + i % kFour] = -kInfinity;
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    Vec top = bundle.top[v], total = {};
    for (int64_t i = v * kLanes; i < floats; i += kFourVecs * kLanes)
      top = max(top, load(scores + i));
    top = max(top, swapped<1>(top));
    top = max(top, swapped<2>(top));
    for (int64_t i = v * kLanes; i < floats; i += kFourVecs * kLanes) {
      const Vec weight = exp2(load(scores + i) - top);
      total += weight;
      float lanes[kLanes];
      store(lanes, weight);
      F::elements(lanes, kLanes, weights + i / F::kDepth);
    }
    const Vec left = exp2(bundle.top[v] - top);
    store(decay + v * kLanes, left);
    bundle.total[v] = bundle.total[v] * left + total;
    bundle.top[v] = top;
  }
}

// Calls f(number of heads as a constant, first head) until all heads are done.
template <typename F>
INLINE void by_heads(int64_t heads, const F& f) {
  int64_t h = 0;
  for (; h + kHeads <= heads; h += kHeads)
    f(std::integral_constant<int, kHeads>{}, h);
  if constexpr (kHeads > 2) {
    if (heads - h == 3) return f(std::integral_constant<int, 3>{}, h);
    if (heads - h == 2) return f(std::integral_constant<int, 2>{}, h);
  }
  if (heads - h == 1) f(std::integral_constant<int, 1>{}, h);
}

// `next`, if there is one, is what this thread does next: its first keys and values are fetched at the end. D is the heads'
// dimension, or 0 for any.
template <typename T, int D>
void dot_item(const Problem<T>& p, const Group& g, int64_t split, const Group* next, int64_t next_split) {
  using F = FormatOf<T>;
  using Element = typename F::Element;
  constexpr int64_t kBlock = kKeyTile * kHeads;  // of scores
  const int64_t stride = p.padded_dim, kv_heads = g.heads / p.group, dim = D ? D : p.dim;
  const int64_t unpacked = p.keys.packed() ? kKeyTile * stride : 0, bundles = (p.group + kHeads - 1) / kHeads;
  constexpr int64_t kBundle = sizeof(Bundle) / sizeof(float);
  float* memory =
      scratch(2 * unpacked + kv_heads * bundles * kBundle + 2 * g.rows * stride + 2 * kBlock + kHeads * kFour);
  T* unpacked_keys = reinterpret_cast<T*>(memory);  // first, where lines of the cache begin
  T* unpacked_values = reinterpret_cast<T*>(memory + unpacked);
  Bundle* softmax = reinterpret_cast<Bundle*>(memory + 2 * unpacked);
  float* acc = memory + 2 * unpacked + kv_heads * bundles * kBundle;
  float* scores = acc + g.rows * stride;
  float* decay = scores + kBlock;
  Element* weights = reinterpret_cast<Element*>(decay + kHeads * kFour);
  Element* query = weights + kBlock;
  for (int64_t i = 0; i < kv_heads * bundles; ++i)
    for (int v = 0; v < kFourVecs; ++v)
      softmax[i].top[v] = fill(kLowest), softmax[i].total[v] = Vec{};
  std::fill(acc, scores, 0.0f);
  std::memset(query, 0, g.rows * stride / F::kDepth * sizeof *query);
  for (int64_t row = 0; row < g.rows; ++row)
    p.template take_query<F>(g, row, query + row * stride / F::kDepth);

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
    const int64_t fours = round_up(count, kFour);
    int64_t next_kv_head = g.kv_head;
    if (begin + kKeyTile < end) {
      next_count = locate(g, begin + kKeyTile, end, next_offsets);
    } else if (next) {
      locate(*next, first_key(*next, next_split), next->key_end, next_offsets);
      next_kv_head = next->kv_head;
    }
    for (int64_t n = 0; n < kv_heads; ++n) {
      const int64_t head = (g.kv_head + n) * p.head_stride;
      const bool last = n + 1 == kv_heads;
      const int64_t next_head = (last ? next_kv_head : g.kv_head + n + 1) * p.head_stride;
      const bool more = begin + kKeyTile < end || next;
      const int64_t* ahead_offsets = !last ? offsets : more ? next_offsets : nullptr;
      const T *keys = unpacked_keys, *values = unpacked_values;
      const int64_t* places = in_order;
      NextTile<T> tile{};
      if (p.keys.packed()) {
        p.keys.unpack(head, offsets, fours, dim, stride, unpacked_keys, next_head, ahead_offsets);
        p.values.unpack(head, offsets, count, dim, stride, unpacked_values, next_head, ahead_offsets);
      } else {
        keys = p.keys.numbers + head;
        values = p.values.numbers + head;
        places = offsets;
        tile = {p.keys.numbers + next_head, p.values.numbers + next_head, ahead_offsets};
      }
      const NextTile<T>* any_ahead = tile.offsets ? &tile : nullptr;
      by_heads(p.group, [&](auto H, int64_t h) ALWAYS_INLINE {
        const int64_t row = n * p.group + h, bundle = n * bundles + h / kHeads;
        const NextTile<T>* ahead = h == 0 ? any_ahead : nullptr;
        dot_keys<H.value, D, F>(query + row * stride / F::kDepth, stride, keys, places, fours, dim, p.scale, ahead, scores);
        softmax_update<H.value, F>(scores, count, softmax[bundle], decay, weights);
        accumulate_values<H.value, D, F>(weights, decay, values, places, count, dim, ahead, acc + row * stride, stride);
      });
    }
    std::swap(offsets, next_offsets);
  }
  for (int64_t row = 0; row < g.rows; ++row) {
    const int64_t h = row % p.group, lane = h % kHeads * kFour;
    const Bundle& of_row = softmax[row / p.group * bundles + h / kHeads];
    const float *top = reinterpret_cast<const float*>(of_row.top), *total = reinterpret_cast<const float*>(of_row.total);
    float sum = 0;
    for (int i = 0; i < kFour; ++i)
      sum += total[lane + i];
    p.finish(g, split, row, top[lane], sum, acc + row * stride);
  }
}

}  // namespace softbatch
