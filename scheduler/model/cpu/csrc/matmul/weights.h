// From weights as they were loaded to the panels of a product.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "formats.h"
#include "matmul/matmul.h"

namespace softbatch {

using OptionalTensor = std::optional<at::Tensor>;

// make(W, T) for weights that are not quantised and what is computed from them.
template <typename F>
auto in_format(int64_t number, const F& make) {
  const NamedFormat<WeightFormat>& weights = weight_format_of(number);
  if (weights.format == WeightFormat::kFloat32) return make(float{}, float{});
#if defined(SOFTBATCH_COMPACT)
  if (weights.format == WeightFormat::kBfloat16In12Bits) return make(Compact{}, at::BFloat16{});
#endif
  TORCH_CHECK(weights.format == WeightFormat::kBfloat16, "weights cannot be ", weights.name, " here");
  return make(at::BFloat16{}, at::BFloat16{});
}

// A matrix whose rows are read as float32.
class Matrix {
 public:
  explicit Matrix(const at::Tensor& t) : tensor_(t.contiguous()) {
    TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, "weights must be float32 or bfloat16");
  }
  int64_t rows() const { return tensor_.size(0); }
  const float* row(int64_t i, float* buffer) const {
    const int64_t size = tensor_.size(1);
    if (tensor_.scalar_type() == at::kFloat) return tensor_.const_data_ptr<float>() + i * size;
    widen_row(tensor_.const_data_ptr<at::BFloat16>() + i * size, size, buffer);
    return buffer;
  }

 private:
  at::Tensor tensor_;
};

inline std::vector<float> floats(const at::Tensor& t) {
  const at::Tensor f = t.to(at::kFloat).contiguous();
  return {f.const_data_ptr<float>(), f.const_data_ptr<float>() + f.numel()};
}

// Packing reads as much as the shape says, so the shape must be right.
inline void check_shape(const at::Tensor& weight, int64_t outputs, int64_t inputs) {
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == outputs && weight.size(1) == inputs, "a weight must be [", outputs,
              ", ", inputs, "], not ", weight.sizes());
}

template <typename W>
void check_inputs(const at::Tensor& weight) {
  TORCH_CHECK(weight.size(1) % Layout<W>::kInputs == 0, "weights must be [outputs, inputs], inputs a multiple of ",
              Layout<W>::kInputs);
}

// One product with the outputs of several, one behind another.
template <typename W>
void stack(Arena& arena, Packed<W>& packed, const std::vector<at::Tensor>& parts,
           const std::vector<OptionalTensor>& biases) {
  std::vector<Matrix> matrices;
  std::vector<float> bias;
  int64_t outputs = 0;
  bool any = false;
  for (size_t i = 0; i < parts.size(); ++i) {
    matrices.emplace_back(parts[i]);
    outputs += parts[i].size(0);
    const std::vector<float> own = biases[i] ? floats(*biases[i]) : std::vector<float>(parts[i].size(0));
    TORCH_CHECK(int64_t(own.size()) == parts[i].size(0), "a bias must have one number for each output");
    bias.insert(bias.end(), own.begin(), own.end());
    any |= biases[i].has_value();
  }
  check_inputs<W>(parts.front());
  packed.pack(arena, outputs, parts.front().size(1), [&](int64_t row, float* buffer) {
    size_t part = 0;
    while (row >= matrices[part].rows())
      row -= matrices[part++].rows();
    return matrices[part].row(row, buffer);
  });
  if (any) packed.bias = bias;
}

// Every panel holds kLanes outputs of the gate, then the same outputs of the up projection.
template <typename W>
void interleave(Arena& arena, Packed<W>& packed, const at::Tensor& gate, const at::Tensor& up) {
  const Matrix g(gate), u(up);
  check_inputs<W>(gate);
  const auto row_of = [&](int64_t row, float* buffer) -> const float* {
    const int64_t at = row / kColumns * kLanes + row % kLanes;
    return at < g.rows() ? (row % kColumns < kLanes ? g : u).row(at, buffer) : nullptr;
  };
  packed.pack(arena, 2 * round_up(gate.size(0), kLanes), gate.size(1), row_of);
}

}  // namespace softbatch
