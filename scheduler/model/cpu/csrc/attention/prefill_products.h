// Register-blocked products of a tile of keys and values: S^T = K Q^T and O^T += V^T P^T.
//
// Query rows lie in the lanes of vectors. Neither K nor V is transposed then, and the online softmax never sums across
// lanes.

#pragma once

#include "attention/problem.h"
#include "simd/amx.h"
#include "simd/format.h"

namespace softbatch {

// Keys of a tile are filled up to a multiple of this, as a row of matrix tiles takes pairs of weights.
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

// Value rows for matrix tiles: [stride][kKeyTile / 2], each row the pairs of one dimension.
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
  float* query;     // [padded_key_dim / kDepth][kPanel], in the products' format
  float* acc;       // [padded_dim][kPanel]
  float* last_key;  // position of the last key that each row sees
  float* top;
  float* total;
};

// A tile of keys and values in the products' format. Its first key is at `position`. The rows of zeros that fill it up
// count as keys after the last one that any row sees, and are masked like later keys.
template <typename T>
struct Keys {
  using F = FormatOf<T>;
  const typename F::Element *keys, *values;
  int64_t stride, key_stride, position, dim, key_dim;
  int64_t padded;  // keys, the rows of zeros among them

  // scores[key][row of the panel]
  INLINE void score(const Panel& panel, float* scores) const {
    if (uses_matrix_tiles<T>()) {
      for (int64_t i = 0; i < padded; i += 2 * kMatrixRows)
        multiply_tiles<false>(keys + i * (key_stride / F::kDepth), key_stride / F::kDepth, panel.query, key_stride,
                              scores + i * kPanel);
    } else {
      for (int64_t i = 0; i < padded; i += kTileRows)
        multiply<F>(keys + i * (key_stride / F::kDepth), key_stride / F::kDepth, 1, panel.query,
                    (key_dim + F::kDepth - 1) / F::kDepth, nullptr, scores + i * kPanel);
    }
  }

  // Turns scores into weights in the products' format. decay[half of the panel] is the factor for all earlier keys.
  // A row sees no more than `window` keys.
  INLINE void weigh(const Panel& panel, float scale, float window, float* scores, Vec* decay) const {
    for (int half = 0; half < 2; ++half) {
      float* s = scores + half * kLanes;
      float *top = panel.top + half * kLanes, *total = panel.total + half * kLanes;
      const Vec last = load(panel.last_key + half * kLanes), too_early = last - window, old_top = load(top);
      Vec new_top = old_top, weights = {};
      const auto go = [&](auto mask) ALWAYS_INLINE {
        const auto if_seen = [&](int64_t i, Vec x, float otherwise) ALWAYS_INLINE {
          if constexpr (decltype(mask)::value == kNone) return x;
          const Vec key = fill(static_cast<float>(position + i));
          x = key > last ? fill(otherwise) : x;
          if constexpr (decltype(mask)::value == kLaterAndEarlier) x = key <= too_early ? fill(otherwise) : x;
          return x;
        };
        for (int64_t i = 0; i < padded; ++i)
          new_top = max(new_top, if_seen(i, load(s + i * kPanel) * scale, -kInfinity));
        for (int64_t i = 0; i < padded; i += F::kDepth) {
          Vec weight[F::kDepth];
          for (int j = 0; j < F::kDepth; ++j) {
            const Vec above = load(s + (i + j) * kPanel) * scale - new_top;  // at most 0, except for rounding
            weight[j] = if_seen(i + j, exp2(min_zero(above)), 0.0f);
            weights += weight[j];
          }
          store(s + i / F::kDepth * kPanel, F::interleave(weight));
        }
      };
      // The first row sees the fewest keys, the last row's window begins last. Results of lanes without a row are never
      // read.
      if (static_cast<float>(position) <= largest(too_early)) {
        go(std::integral_constant<Mask, kLaterAndEarlier>{});
      } else if (static_cast<float>(position + padded - 1) > panel.last_key[half * kLanes]) {
        go(std::integral_constant<Mask, kLater>{});
      } else {
        go(std::integral_constant<Mask, kNone>{});
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
  enum Mask { kNone, kLater, kLaterAndEarlier };  // which keys of a tile some row does not see

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

}  // namespace softbatch
