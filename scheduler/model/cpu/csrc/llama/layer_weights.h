// One layer of the Llama family: its weights by name, and how they lie in memory for its products.

#pragma once

#include <ATen/core/Dict.h>

#include <string>
#include <vector>

#include "matmul/weights.h"

namespace softbatch {

// A layer's weights as they were loaded. layer_weights() of llama/decoder.py gives them these names.
struct LayerWeights {
  using Named = c10::Dict<std::string, at::Tensor>;

  at::Tensor input_norm, query, key, value, output, mlp_norm, gate, up, down;
  OptionalTensor query_bias, key_bias, value_bias, output_bias, query_norm, key_norm;

  explicit LayerWeights(const Named& named) {
    size_t known = 0;
    const auto optional = [&](const char* name) {
      const auto found = named.find(name);
      if (found == named.end()) return OptionalTensor();
      ++known;
      return OptionalTensor(found->value());
    };
    const auto required = [&](const char* name) {
      const OptionalTensor found = optional(name);
      TORCH_CHECK(found, "a layer must have the tensor ", name);
      return *found;
    };
    input_norm = required("input_norm");
    query = required("query");
    key = required("key");
    value = required("value");
    output = required("output");
    mlp_norm = required("mlp_norm");
    gate = required("gate");
    up = required("up");
    down = required("down");
    query_bias = optional("query_bias");
    key_bias = optional("key_bias");
    value_bias = optional("value_bias");
    output_bias = optional("output_bias");
    query_norm = optional("query_norm");
    key_norm = optional("key_norm");
    TORCH_CHECK(known == named.size(), "a layer has tensors that these kernels do not know");
  }

  int64_t hidden_size() const { return input_norm.numel(); }
  int64_t intermediate_size() const { return gate.size(0); }

  void check(int64_t heads, int64_t kv_heads, int64_t head_dim) const {
    const int64_t size = hidden_size(), inner = intermediate_size();
    TORCH_CHECK(mlp_norm.numel() == size, "both norms of a layer must have the hidden size");
    check_shape(query, heads * head_dim, size);
    check_shape(key, kv_heads * head_dim, size);
    check_shape(value, kv_heads * head_dim, size);
    check_shape(output, size, heads * head_dim);
    check_shape(gate, inner, size);
    check_shape(up, inner, size);
    check_shape(down, size, inner);
    for (const OptionalTensor& norm : {query_norm, key_norm})
      TORCH_CHECK(!norm || norm->numel() == head_dim, "a head's norm must have its dimensions");
  }
};

// The weights of a layer's four products, in the order in which a step reads them, and its norms.
template <typename W>
struct PackedLayer {
  std::vector<float> input_norm, mlp_norm, query_norm, key_norm;
  Packed<W> qkv, out, gate_up, down;

  PackedLayer(Arena& arena, const LayerWeights& weights)
      : input_norm(floats(weights.input_norm)), mlp_norm(floats(weights.mlp_norm)) {
    if (weights.query_norm) query_norm = floats(*weights.query_norm);
    if (weights.key_norm) key_norm = floats(*weights.key_norm);
    stack(arena, qkv, {weights.query, weights.key, weights.value},
          {weights.query_bias, weights.key_bias, weights.value_bias});
    stack(arena, out, {weights.output}, {weights.output_bias});
    interleave(arena, gate_up, weights.gate, weights.up);
    stack(arena, down, {weights.down}, {std::nullopt});
  }
};

}  // namespace softbatch
