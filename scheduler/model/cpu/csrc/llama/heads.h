// Rows of several heads, in the order in which attention with gradients has them.

#pragma once

#include <ATen/core/Tensor.h>

#include "simd/vector.h"

namespace softbatch {

// [batch, heads, tokens, dim].
template <typename T>
struct Heads {
  T* data;
  int64_t heads, tokens, dim;

  Heads(const at::Tensor& tensor, int64_t dim)
      : data(tensor.data_ptr<T>()), heads(tensor.size(1)), tokens(tensor.size(2)), dim(dim) {}
  INLINE T* at(int64_t row, int64_t head) const {
    return data + ((row / tokens * heads + head) * tokens + row % tokens) * dim;
  }
  INLINE void read(int64_t row, float* to) const {
    for (int64_t h = 0; h < heads; ++h)
      widen_row(at(row, h), dim, to + h * dim);
  }
  INLINE void write(int64_t row, const float* from) const {
    for (int64_t h = 0; h < heads; ++h)
      narrow_row(from + h * dim, dim, at(row, h));
  }
};

}  // namespace softbatch
