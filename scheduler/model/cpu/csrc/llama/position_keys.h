// Keys in a packed cache lack an offset: a vector that is the same for all keys of a head before they are turned by
// their positions, such as the bias of their product. Its size would cost all other numbers their precision.
//
// With R(j) the turn by position j, q the turned query and b the offset, a score is q . R(j) k = q . R(j) (k - b) +
// q . R(j) b. The last product is, over pairs of dimensions (m, n) that turn by the angle a:
//
//   cos(a) * (q[m] b[m] + q[n] b[n]) + sin(a) * (q[n] b[m] - q[m] b[n])
//
// The left factors depend on the position alone, for all layers and heads with one rotary scheme. They stand behind each
// key as more of its dimensions, the right factors behind the query. What does not turn is the product with 1.

#pragma once

#include <cmath>
#include <vector>

#include "simd/vector.h"

namespace softbatch {

// A rotary scheme: the first 2 * half dimensions of a head turn.
struct RotaryScheme {
  const float* frequencies;  // [half]
  float scale;
  int64_t half;

  INLINE void turn(float position, float* cosine, float* sine) const {
    for (int64_t i = 0; i < half; ++i) {
      const float angle = position * frequencies[i];
      cosine[i] = std::cos(angle) * scale;
      sine[i] = std::sin(angle) * scale;
    }
  }
};

// The left factors, [position, dim]: cosines, sines, and 1 if there is room for it.
template <typename T>
class PositionKeys {
 public:
  PositionKeys(const RotaryScheme& scheme, int64_t dim) : scheme_(scheme), dim_(dim) {}

  // Computes those of at least `count` positions.
  void cover(int64_t count) {
    const int64_t known = rows_.size() / dim_;
    if (count <= known) return;
    rows_.resize(std::max(count, 2 * known) * dim_, T(0.0f));
    std::vector<float> row(dim_);
    for (int64_t position = known; position < int64_t(rows_.size()) / dim_; ++position) {
      scheme_.turn(static_cast<float>(position), row.data(), row.data() + scheme_.half);
      if (2 * scheme_.half < dim_) row[2 * scheme_.half] = 1.0f;
      narrow_row(row.data(), dim_, rows_.data() + position * dim_);
    }
  }
  // Valid until more are covered.
  const T* rows() const { return rows_.data(); }

 private:
  const RotaryScheme scheme_;
  const int64_t dim_;
  std::vector<T> rows_;
};

// The right factors of a turned query [dim].
INLINE void offset_factors(const float* query, const float* offset, int64_t half, int64_t dim, float* to) {
  for (int64_t m = 0; m < half; ++m) {
    const int64_t n = half + m;
    to[m] = query[m] * offset[m] + query[n] * offset[n];
    to[n] = query[n] * offset[m] - query[m] * offset[n];
  }
  std::fill(to + 2 * half, to + dim, 0.0f);
  for (int64_t i = 2 * half; i < dim; ++i)
    to[2 * half] += query[i] * offset[i];
}

}  // namespace softbatch
