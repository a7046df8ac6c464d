// Causal attention behind a prefix that all rows of a batch share, and its gradients, in float32. Soft prompts are
// matched and trained with it.
//
// An item is one sequence and kv head. Its rows are those of the query heads, one head after another: [group * tokens,
// dim]. A row sees the prefix's n keys, and those of its own sequence up to its own token.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "matmul/small_matmul.h"

namespace softbatch {
namespace {

struct Shape {
  int64_t batch, heads, kv_heads, tokens, dim, prefix;

  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return group() * tokens; }
  int64_t keys() const { return prefix + tokens; }
  int64_t visible(int64_t row) const { return prefix + row % tokens + 1; }
};

Shape shape_of(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& keys,
               const at::Tensor& values) {
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && keys.dim() == 3,
              "queries and keys must have four dimensions, the prefix's three");
  const Shape s{query.size(0), query.size(1), key.size(1), query.size(2), query.size(3), keys.size(1)};
  TORCH_CHECK(s.kv_heads > 0 && s.heads % s.kv_heads == 0, "query heads must be a multiple of kv heads");
  for (const at::Tensor& own : {key, value})
    TORCH_CHECK(own.sizes() == at::IntArrayRef({s.batch, s.kv_heads, s.tokens, s.dim}),
                "keys and values must be [batch, kv_heads, tokens, head_dim]");
  for (const at::Tensor& shared : {keys, values})
    TORCH_CHECK(shared.sizes() == at::IntArrayRef({s.kv_heads, s.prefix, s.dim}),
                "those of the prefix must be [kv_heads, n, head_dim]");
  for (const at::Tensor& any : {query, key, value, keys, values})
    TORCH_CHECK(any.is_contiguous() && any.scalar_type() == query.scalar_type(),
                "tensors must be contiguous and of one dtype");
  return s;
}

template <typename T>
void read(const T* from, int64_t count, int64_t dim, SmallMatrix& to, int64_t first = 0, float factor = 1.0f) {
  for (int64_t i = 0; i < count; ++i) {
    float* row = to.row(first + i);
    widen_row(from + i * dim, dim, row);
    for (int64_t k = 0; k < dim; ++k)
      row[k] *= factor;
  }
}

// One sequence's keys or values of one kv head, the prefix's first: [keys, dim].
template <typename T>
void read_keys(const Shape& s, int64_t item, const at::Tensor& shared, const at::Tensor& own, SmallMatrix& to) {
  to.resize(s.keys(), s.dim);
  read(shared.const_data_ptr<T>() + item % s.kv_heads * s.prefix * s.dim, s.prefix, s.dim, to);
  read(own.const_data_ptr<T>() + item * s.tokens * s.dim, s.tokens, s.dim, to, s.prefix);
}

template <typename T>
void read_rows(const Shape& s, int64_t item, const at::Tensor& from, float factor, SmallMatrix& to) {
  to.resize(s.rows(), s.dim);
  read(from.const_data_ptr<T>() + item * s.rows() * s.dim, s.rows(), s.dim, to, 0, factor);
}

// `sums` of columns from `column` on, of a row of `columns`.
template <typename T>
INLINE void write_part(const float* sums, int64_t column, int64_t columns, T* row) {
  narrow_row(sums, std::min<int64_t>(kColumns, columns - column), row + column);
}

void softmax(float* row, int64_t visible, int64_t all) {
  Vec top = fill(-std::numeric_limits<float>::infinity());
  std::fill(row + visible, row + round_up(all, kPad), -std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < all; i += kLanes)
    top = max(top, load(row + i));
  const float most = largest(top);
  Vec total = {};
  for (int64_t i = 0; i < all; i += kLanes) {
    const Vec weight = exp2(load(row + i) - most);
    store(row + i, weight);
    total += weight;
  }
  const float inverse = 1.0f / sum(total);
  for (int64_t i = 0; i < round_up(all, kPad); i += kLanes)
    store(row + i, i < all ? load(row + i) * inverse : Vec{});
}

// Returns attention's result in the query's shape, and its weights, float32 [batch * kv_heads, rows, padded keys].
template <typename T>
std::vector<at::Tensor> forward(const Shape& s, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                const at::Tensor& keys, const at::Tensor& values, double scale) {
  const int64_t padded = round_up(s.keys(), kPad), items = s.batch * s.kv_heads;
  const std::vector<at::Tensor> out = {at::empty_like(query), at::empty({items, s.rows(), padded}, at::kFloat)};
  T* attended = out[0].data_ptr<T>();
  float* weights = out[1].data_ptr<float>();
  Team::run([&](Team& team) {
    SmallMatrix rows, all_keys, all_values, turned, scores;
    Buffer<char> scratch;
    team.for_each(items, [&](int64_t item) {
      read_rows<T>(s, item, query, static_cast<float>(scale) * kLog2e, rows);
      read_keys<T>(s, item, keys, key, all_keys);
      read_keys<T>(s, item, values, value, all_values);
      all_keys.transpose_into(turned);
      scores.resize(s.rows(), s.keys());
      multiply_small(rows, turned, scratch, [&](int64_t row, int64_t column, const float* sums) {
        std::memcpy(scores.row(row) + column, sums, kColumns * sizeof(float));
      });
      for (int64_t row = 0; row < s.rows(); ++row) {
        softmax(scores.row(row), s.visible(row), s.keys());
        std::memcpy(weights + (item * s.rows() + row) * padded, scores.row(row), padded * sizeof(float));
      }
      multiply_small(scores, all_values, scratch, [&](int64_t row, int64_t column, const float* sums) {
        write_part(sums, column, s.dim, attended + (item * s.rows() + row) * s.dim);
      });
    });
  });
  return out;
}

// Turns `change`, the gradient of the weights, into that of the scores: weight * (change - sum of weight * change).
void softmax_backward(const SmallMatrix& weight, SmallMatrix& change) {
  for (int64_t row = 0; row < change.rows; ++row) {
    float *to = change.row(row), *own = weight.row(row);
    Vec mean = {};
    for (int64_t i = 0; i < change.stride; i += kLanes)
      mean += load(own + i) * load(to + i);
    const float along = sum(mean);
    for (int64_t i = 0; i < change.stride; i += kLanes)
      store(to + i, load(own + i) * (load(to + i) - along));
  }
}

// The gradients, and what each sequence adds to the prefix's keys and values: [batch, kv_heads, n, dim] each.
template <typename T>
struct Gradients {
  T *query, *key, *value, *keys, *values;
  float *keys_parts, *values_parts;
};

// One thread's way from the gradient of what attention gives to those of its inputs.
template <typename T>
class Backward {
 public:
  Backward(const Shape& shape, double scale, const Gradients<T>& to)
      : s_(shape), scale_(static_cast<float>(scale)), to_(to) {}

  void run(int64_t item, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
           const at::Tensor& keys, const at::Tensor& values, const at::Tensor& weights, const at::Tensor& gradient) {
    read_rows<T>(s_, item, query, scale_, rows_);
    read_rows<T>(s_, item, gradient, 1.0f, above_);
    read_keys<T>(s_, item, keys, key, keys_);
    read_keys<T>(s_, item, values, value, values_);
    weight_.resize(s_.rows(), s_.keys());
    const int64_t count = s_.rows() * weight_.stride;
    std::memcpy(weight_.row(0), weights.const_data_ptr<float>() + item * count, count * sizeof(float));
    values_.transpose_into(turned_);
    change_.resize(s_.rows(), s_.keys());
    multiply_small(above_, turned_, scratch_, [&](int64_t row, int64_t column, const float* sums) {
      std::memcpy(change_.row(row) + column, sums, kColumns * sizeof(float));
    });
    softmax_backward(weight_, change_);
    to_query(item);
    to_keys(item, change_, rows_, to_.key, to_.keys_parts);
    to_keys(item, weight_, above_, to_.value, to_.values_parts);
  }

 private:
  void to_query(int64_t item) {
    multiply_small(change_, keys_, scratch_, [&](int64_t row, int64_t column, const float* sums) {
      float scaled[kColumns];
      for (int i = 0; i < kColumns; ++i)
        scaled[i] = sums[i] * scale_;
      write_part(scaled, column, s_.dim, to_.query + (item * s_.rows() + row) * s_.dim);
    });
  }

  // Keys, or values, of the sequence's own tokens, and its part of the prefix's.
  void to_keys(int64_t item, const SmallMatrix& of_rows, const SmallMatrix& by, T* own, float* parts) {
    of_rows.transpose_into(turned_change_);
    multiply_small(turned_change_, by, scratch_, [&](int64_t row, int64_t column, const float* sums) {
      if (row < s_.prefix) {
        write_part(sums, column, s_.dim, parts + (item * s_.prefix + row) * s_.dim);
      } else {
        write_part(sums, column, s_.dim, own + (item * s_.tokens + row - s_.prefix) * s_.dim);
      }
    });
  }

  const Shape& s_;
  const float scale_;
  const Gradients<T>& to_;
  SmallMatrix rows_, above_, keys_, values_, turned_, weight_, change_, turned_change_;
  Buffer<char> scratch_;
};

// The sum of all sequences' parts of one kv head.
template <typename T>
void sum_parts(const Shape& s, int64_t head, const float* parts, T* to) {
  const int64_t part = s.prefix * s.dim;
  std::vector<float> total(part);
  for (int64_t item = head; item < s.batch * s.kv_heads; item += s.kv_heads)
    for (int64_t k = 0; k < part; ++k)
      total[k] += parts[item * part + k];
  narrow_row(total.data(), part, to + head * part);
}

// Gradients of query, key, value, keys and values.
template <typename T>
std::vector<at::Tensor> backward(const Shape& s, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const at::Tensor& keys, const at::Tensor& values, double scale,
                                 const at::Tensor& weights, const at::Tensor& gradient) {
  const std::vector<at::Tensor> out = {at::empty_like(query), at::empty_like(key), at::empty_like(value),
                                       at::empty_like(keys), at::empty_like(values)};
  const int64_t items = s.batch * s.kv_heads, floats = items * s.prefix * s.dim;
  Buffer<float> memory;
  float* parts = memory.resize(2 * floats);
  const Gradients<T> to{out[0].data_ptr<T>(), out[1].data_ptr<T>(), out[2].data_ptr<T>(), out[3].data_ptr<T>(),
                        out[4].data_ptr<T>(), parts, parts + floats};
  Team::run([&](Team& team) {
    Backward<T> thread(s, scale, to);
    team.for_each(items, [&](int64_t item) { thread.run(item, query, key, value, keys, values, weights, gradient); });
    team.for_each(2 * s.kv_heads, [&](int64_t i) {
      if (i % 2 == 0) {
        sum_parts(s, i / 2, to.keys_parts, to.keys);
      } else {
        sum_parts(s, i / 2, to.values_parts, to.values);
      }
    });
  });
  return out;
}

std::vector<at::Tensor> prefix_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                         const at::Tensor& keys, const at::Tensor& values, double scale) {
  const Shape s = shape_of(query, key, value, keys, values);
  if (query.scalar_type() == at::kFloat) return forward<float>(s, query, key, value, keys, values, scale);
  TORCH_CHECK(query.scalar_type() == at::kBFloat16, "tensors must be float32 or bfloat16");
  return forward<at::BFloat16>(s, query, key, value, keys, values, scale);
}

std::vector<at::Tensor> prefix_attention_backward(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& value, const at::Tensor& keys,
                                                  const at::Tensor& values, double scale, const at::Tensor& weights,
                                                  const at::Tensor& gradient) {
  const Shape s = shape_of(query, key, value, keys, values);
  TORCH_CHECK(weights.is_contiguous() && weights.scalar_type() == at::kFloat &&
                  weights.sizes() == at::IntArrayRef({s.batch * s.kv_heads, s.rows(), round_up(s.keys(), kPad)}),
              "weights must be those that were returned");
  TORCH_CHECK(gradient.is_contiguous() && gradient.sizes() == query.sizes() &&
                  gradient.scalar_type() == query.scalar_type(),
              "the gradient must be contiguous, as the query");
  if (query.scalar_type() == at::kFloat)
    return backward<float>(s, query, key, value, keys, values, scale, weights, gradient);
  TORCH_CHECK(query.scalar_type() == at::kBFloat16, "tensors must be float32 or bfloat16");
  return backward<at::BFloat16>(s, query, key, value, keys, values, scale, weights, gradient);
}

}  // namespace
}  // namespace softbatch

TORCH_LIBRARY_FRAGMENT(softbatch, m) {
  m.def("prefix_attention(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, float scale) -> Tensor[]");
  m.def(
      "prefix_attention_backward(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, float scale, "
      "Tensor weights, Tensor gradient) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(softbatch, CPU, m) {
  m.impl("prefix_attention", softbatch::prefix_attention);
  m.impl("prefix_attention_backward", softbatch::prefix_attention_backward);
}
