// Operations on one row between two products, in float32.

#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "matmul/panels.h"

namespace softbatch {

INLINE void rms_norm(const float* x, const std::vector<float>& weight, float epsilon, float* to) {
  const int64_t size = weight.size();
  Vec squares = {};
  float rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    squares += load(x + i) * load(x + i);
  for (; i < size; ++i)
    rest += x[i] * x[i];
  const float scale = 1.0f / std::sqrt((sum(squares) + rest) / size + epsilon);
  for (i = 0; i + kLanes <= size; i += kLanes)
    store(to + i, load(weight.data() + i) * (load(x + i) * scale));
  for (; i < size; ++i)
    to[i] = weight[i] * (x[i] * scale);
}

// The gradient of the norm's input from that of its output. `to` may be `gradient`.
INLINE void rms_norm_backward(const float* x, const std::vector<float>& weight, float epsilon, const float* gradient,
                              float* to) {
  const int64_t size = weight.size();
  Vec squares = {}, products = {};
  float rest = 0, rest_of_products = 0;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec own = load(x + i);
    squares += own * own;
    products += load(gradient + i) * load(weight.data() + i) * own;
  }
  for (; i < size; ++i) {
    rest += x[i] * x[i];
    rest_of_products += gradient[i] * weight[i] * x[i];
  }
  const float scale = 1.0f / std::sqrt((sum(squares) + rest) / size + epsilon);
  const float along = scale * scale * scale * (sum(products) + rest_of_products) / size;
  for (i = 0; i + kLanes <= size; i += kLanes)
    store(to + i, load(weight.data() + i) * load(gradient + i) * scale - load(x + i) * along);
  for (; i < size; ++i)
    to[i] = weight[i] * gradient[i] * scale - x[i] * along;
}

// Rotates the first 2 * half numbers of one head's vector [dim] by its position. If there is a norm, it comes first.
INLINE void rotate(const float* from, const std::vector<float>& norm, float epsilon, const float* cosine,
                   const float* sine, int64_t half, int64_t dim, float* to) {
  if (!norm.empty()) {
    rms_norm(from, norm, epsilon, to);
    from = to;
  }
  if (from != to) std::copy(from + 2 * half, from + dim, to + 2 * half);
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec low = load(from + i), high = load(from + half + i), c = load(cosine + i), s = load(sine + i);
    store(to + i, low * c - high * s);
    store(to + half + i, high * c + low * s);
  }
  for (; i < half; ++i) {
    const float low = from[i], high = from[half + i];
    to[i] = low * cosine[i] - high * sine[i];
    to[half + i] = high * cosine[i] + low * sine[i];
  }
}

INLINE Vec sigmoid(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x;
  const Vec e = exp2(magnitude * -kLog2e);
  const Vec one = fill(1.0f);
  return (x < 0.0f ? e : one) / (one + e);
}

INLINE Vec swiglu(Vec gate, Vec up) { return gate * sigmoid(gate) * up; }

// GELU's tanh form of the gate, times up: (1 + tanh(x)) / 2 is sigmoid(2 x).
INLINE Vec geglu(Vec gate, Vec up) {
  return gate * sigmoid((gate + gate * gate * gate * 0.044715f) * 1.59576912f) * up;
}

// The gradients of gate and up from that of swiglu(gate, up).
INLINE std::pair<Vec, Vec> swiglu_backward(Vec gate, Vec up, Vec gradient) {
  const Vec s = sigmoid(gate), silu = gate * s;
  return {gradient * up * (s + silu * (1.0f - s)), gradient * silu};
}

// A product's rows in memory, `columns` floats each.
struct Rows {
  float* data;
  int64_t columns;

  template <typename F>
  INLINE void each(int64_t row, int64_t column, const float* sums, const F& f) const {
    float* to = data + row * columns + column;
    if (column + kColumns <= columns) {
      for (int half = 0; half < kColumns; half += kLanes)
        store(to + half, f(load(to + half), load(sums + half)));
    } else {
      for (int64_t i = 0; i < columns - column; ++i)
        to[i] = f(fill(to[i]), fill(sums[i]))[0];
    }
  }
};

// What matmul() does with a product's rows: writes them, or adds them to what is there.
inline auto written_to(const Rows& rows) {
  return [rows](int64_t, int64_t row, int64_t column, const float* sums) {
    rows.each(row, column, sums, [](Vec, Vec sum) { return sum; });
  };
}
inline auto added_to(const Rows& rows) {
  return [rows](int64_t, int64_t row, int64_t column, const float* sums) {
    rows.each(row, column, sums, [](Vec old, Vec sum) { return old + sum; });
  };
}
inline auto added_to(const Rows& rows, float scale) {
  return [rows, scale](int64_t, int64_t row, int64_t column, const float* sums) {
    rows.each(row, column, sums, [scale](Vec old, Vec sum) { return old + sum * scale; });
  };
}

}  // namespace softbatch
