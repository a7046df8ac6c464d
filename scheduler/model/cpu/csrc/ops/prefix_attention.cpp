// Causal attention behind a prefix that all rows of a batch share, in float32, and its gradients: what soft prompts are
// matched and trained with.
//
// Of each sequence and kv head, the rows are those of its query heads, one after another: [group * tokens, dim]. They see
// the prefix's n keys and of their own tokens those up to their own.

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
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && keys.dim() == 3, "queries and keys must have four dimensions, the prefix's three");
  const Shape s{query.size(0), query.size(1), key.size(1), query.size(2), query.size(3), keys.size(1)};
  TORCH_CHECK(s.kv_heads > 0 && s.heads % s.kv_heads == 0, "query heads must be a multiple of kv heads");
  for (const at::Tensor& own : {key, value})
    TORCH_CHECK(own.sizes() == at::IntArrayRef({s.batch, s.kv_heads, s.tokens, s.dim}),
                "keys and values must be [batch, kv_heads, tokens, head_dim]");
  for (const at::Tensor& shared : {keys, values})
    TORCH_CHECK(shared.sizes() == at::IntArrayRef({s.kv_heads, s.prefix, s.dim}),
                "those of the prefix must be [kv_heads, n, head_dim]");
  for (const at::Tensor& any : {query, key, value, keys, values})
    TORCH_CHECK(any.is_contiguous() && any.scalar_type() == query.scalar_type(), "tensors must be contiguous and of one dtype");
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

// Returns what attention gives, as the query, and its weights float32 [batch * kv_heads, rows, padded keys].
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

// Gradients of query, key, value, keys and values.
template <typename T>
std::vector<at::Tensor> backward(const Shape& s, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const at::Tensor& keys, const at::Tensor& values, double scale,
                                 const at::Tensor& weights, const at::Tensor& gradient) {
  const int64_t padded = round_up(s.keys(), kPad), items = s.batch * s.kv_heads;
  const std::vector<at::Tensor> out = {at::empty_like(query), at::empty_like(key), at::empty_like(value),
                                       at::empty_like(keys), at::empty_like(values)};
  // What every sequence gives to the prefix's keys, then values: [batch, kv_heads, n, dim] each.
  const int64_t part = s.prefix * s.dim;
  Buffer<float> memory;
  float* parts[2] = {memory.resize(2 * items * part), memory.data() + items * part};
  Team::run([&](Team& team) {
    SmallMatrix rows, above, all_keys, all_values, turned, weight, change, turned_change;
    Buffer<char> scratch;
    team.for_each(items, [&](int64_t item) {
      read_rows<T>(s, item, query, static_cast<float>(scale), rows);
      read_rows<T>(s, item, gradient, 1.0f, above);
      read_keys<T>(s, item, keys, key, all_keys);
      read_keys<T>(s, item, values, value, all_values);
      weight.resize(s.rows(), s.keys());
      std::memcpy(weight.row(0), weights.const_data_ptr<float>() + item * s.rows() * padded,
                  s.rows() * padded * sizeof(float));
      all_values.transpose_into(turned);
      change.resize(s.rows(), s.keys());
      multiply_small(above, turned, scratch, [&](int64_t row, int64_t column, const float* sums) {
        std::memcpy(change.row(row) + column, sums, kColumns * sizeof(float));
      });
      for (int64_t row = 0; row < s.rows(); ++row) {
        float *to = change.row(row), *own = weight.row(row);
        Vec mean = {};
        for (int64_t i = 0; i < padded; i += kLanes)
          mean += load(own + i) * load(to + i);
        const float along = sum(mean);
        for (int64_t i = 0; i < padded; i += kLanes)
          store(to + i, load(own + i) * (load(to + i) - along));
      }
      multiply_small(change, all_keys, scratch, [&](int64_t row, int64_t column, const float* sums) {
        float scaled[kColumns];
        for (int i = 0; i < kColumns; ++i)
          scaled[i] = sums[i] * static_cast<float>(scale);
        write_part(scaled, column, s.dim, out[0].data_ptr<T>() + (item * s.rows() + row) * s.dim);
      });
      const auto to_keys = [&](const SmallMatrix& of_rows, const SmallMatrix& by, T* own, float* shared) {
        of_rows.transpose_into(turned_change);
        multiply_small(turned_change, by, scratch, [&](int64_t row, int64_t column, const float* sums) {
          if (row < s.prefix) {
            write_part(sums, column, s.dim, shared + item * part + row * s.dim);
          } else {
            write_part(sums, column, s.dim, own + (item * s.tokens + row - s.prefix) * s.dim);
          }
        });
      };
      to_keys(change, rows, out[1].data_ptr<T>(), parts[0]);
      to_keys(weight, above, out[2].data_ptr<T>(), parts[1]);
    });
    team.for_each(2 * s.kv_heads, [&](int64_t i) {
      const int64_t head = i / 2;
      std::vector<float> total(part);
      for (int64_t item = head; item < items; item += s.kv_heads)
        for (int64_t k = 0; k < part; ++k)
          total[k] += parts[i % 2][item * part + k];
      narrow_row(total.data(), part, out[3 + i % 2].data_ptr<T>() + head * part);
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
