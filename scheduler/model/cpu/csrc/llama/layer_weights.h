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
  using Kinds = c10::Dict<std::string, int64_t>;  // of those that are GGUF's blocks

  LoadedMatrix query, key, value, output, gate, up, down;
  OptionalTensor query_bias, key_bias, value_bias, output_bias;
  // Of what enters attention and the MLP, of what leaves them, and of queries and keys: of each head, or of all together.
  OptionalTensor input_norm, mlp_norm, attended_norm, mlp_output_norm, query_norm, key_norm;
  OptionalTensor sinks;
  OptionalTensor key_offset;  // what a packed cache's keys lack (position_keys.h)

  explicit LayerWeights(const Named& named, const Kinds& kinds = Kinds()) {
    size_t known = 0, known_kinds = 0;
    const auto optional = [&](const char* name) {
      const auto found = named.find(name);
      if (found == named.end()) return OptionalTensor();
      ++known;
      return OptionalTensor(found->value());
    };
    const auto required = [&](const char* name) {
      const OptionalTensor found = optional(name);
      TORCH_CHECK(found, "a layer must have the tensor ", name);
      const auto kind = kinds.find(name);
      if (kind == kinds.end()) return LoadedMatrix{*found};
      ++known_kinds;
      return LoadedMatrix{*found, &block_format_of(kind->value())};
    };
    query = required("query");
    key = required("key");
    value = required("value");
    output = required("output");
    gate = required("gate");
    up = required("up");
    down = required("down");
    query_bias = optional("query_bias");
    key_bias = optional("key_bias");
    value_bias = optional("value_bias");
    output_bias = optional("output_bias");
    input_norm = optional("input_norm");
    mlp_norm = optional("mlp_norm");
    attended_norm = optional("attended_norm");
    mlp_output_norm = optional("mlp_output_norm");
    sinks = optional("sinks");
    key_offset = optional("key_offset");
    query_norm = optional("query_norm");
    key_norm = optional("key_norm");
    TORCH_CHECK(known == named.size(), "a layer has tensors that these kernels do not know");
    TORCH_CHECK(known_kinds == kinds.size(), "a layer has blocks where these kernels take none");
  }

  int64_t hidden_size() const { return query.inputs(); }
  int64_t intermediate_size() const { return gate.outputs(); }

  void check(int64_t heads, int64_t kv_heads, int64_t head_dim) const {
    const int64_t size = hidden_size(), inner = intermediate_size();
    for (const OptionalTensor& norm : {input_norm, mlp_norm, attended_norm, mlp_output_norm})
      TORCH_CHECK(!norm || norm->numel() == size, "the norms of a layer must have the hidden size");
    TORCH_CHECK(!sinks || sinks->numel() == heads, "sinks must be one number for each head");
    check_shape(query, heads * head_dim, size);
    check_shape(key, kv_heads * head_dim, size);
    check_shape(value, kv_heads * head_dim, size);
    check_shape(output, size, heads * head_dim);
    check_shape(gate, inner, size);
    check_shape(up, inner, size);
    check_shape(down, size, inner);
    TORCH_CHECK(!key_offset || key_offset->numel() == kv_heads * head_dim,
                "a key offset must have the dimensions of all keys");
    TORCH_CHECK(query_norm.has_value() == key_norm.has_value(), "queries and keys have norms, or neither has");
    const bool of_heads = query_norm && query_norm->numel() == head_dim && key_norm->numel() == head_dim;
    const bool of_all = query_norm && query_norm->numel() == query.outputs() && key_norm->numel() == key.outputs();
    TORCH_CHECK(!query_norm || of_heads || of_all, "a norm must have the dimensions of a head, or of all heads");
  }
};

// The weights of a layer's four products, in the order in which a step reads them, and its norms.
template <typename W>
struct PackedLayer {
  // Empty: none.
  std::vector<float> input_norm, mlp_norm, attended_norm, mlp_output_norm, query_norm, key_norm, key_offset;
  Packed<W> qkv, out, gate_up, down;

  PackedLayer(Arena& arena, const LayerWeights& weights)
      : input_norm(of(weights.input_norm)), mlp_norm(of(weights.mlp_norm)), attended_norm(of(weights.attended_norm)),
        mlp_output_norm(of(weights.mlp_output_norm)), query_norm(of(weights.query_norm)),
        key_norm(of(weights.key_norm)), key_offset(of(weights.key_offset)) {
    stack(arena, qkv, {weights.query, weights.key, weights.value},
          {weights.query_bias, weights.key_bias, weights.value_bias});
    stack(arena, out, {weights.output}, {weights.output_bias});
    interleave(arena, gate_up, weights.gate, weights.up);
    stack(arena, down, {weights.down}, {std::nullopt});
  }

 private:
  static std::vector<float> of(const OptionalTensor& row) { return row ? floats(*row) : std::vector<float>(); }
};

}  // namespace softbatch
