// What attention of one query token computes over a tile of keys: scores, softmax, and the sum of values.

#pragma once

#include <type_traits>

#include "attention/problem.h"
#include "simd/format.h"

namespace softbatch {

template <typename T>
INLINE void prefetch(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T))
    __builtin_prefetch(row + d);
}

// The next tile's keys are prefetched during a tile's scores, its values during the sum of values. Memory is the limit,
// and so is never idle.
template <typename T>
struct NextTile {
  const T* keys;
  const T* values;
  const int64_t* offsets;
};

// A vector of a cache's numbers in the products' format.
template <typename F, typename T>
INLINE auto load_as(const T* p) {
  if constexpr (F::kDepth == 2) {
    return F::lanes(p);
  } else {
    return load(p);
  }
}

// The first `count` numbers, filled up with zeros.
template <typename F, typename T>
INLINE auto take_first(const T* p, int64_t count) {
  T padded[kLanes * F::kDepth] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load_as<F>(padded);
}

// Scores and weights lie by fours: of four keys for one head, then for the next head of a bundle of kHeads.
constexpr int kFour = 4;
constexpr int kFourVecs = kHeads * kFour / kLanes;  // vectors of such a block
static_assert(kFourVecs * kLanes == kHeads * kFour);

// The running softmax of a bundle. A head has kFour lanes. Each holds the head's maximum, and the sum of the lanes'
// totals is the head's total. If a score is NaN the maxima may differ, but the total is NaN too.
struct Bundle {
  Vec top[kFourVecs], total[kFourVecs];
};

// Sums up acc[h][j], the scores of four keys for H heads. Scores of the other heads are zero.
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

// N vectors of acc[h] = acc[h] * decay + sum over i of weight(i) * values[offsets[i]], for H heads. The last four
// values are filled up with zeros, not with other values: those could be infinite, and zero times infinity is NaN.
// take_value(p) loads a vector of a value's numbers from p on.
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

// Turns the scores of `count` keys into weights, filled up with zeros to a multiple of four, and rescales the running
// sums. `decay` is the factor for all earlier keys.
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

}  // namespace softbatch
