// From weights as they were loaded to the panels of a product.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <type_traits>
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

// A matrix as it was loaded: numbers [outputs, inputs], or bytes of GGUF's blocks [outputs, bytes of a row].
struct LoadedMatrix {
  at::Tensor data;
  const BlockFormat* blocks = nullptr;

  int64_t outputs() const { return data.size(0); }
  int64_t inputs() const { return blocks ? data.size(1) / blocks->bytes * blocks->inputs : data.size(1); }

  void check() const {
    TORCH_CHECK(data.dim() == 2, "a weight must have two dimensions, not ", data.dim());
    if (!blocks) return;
    TORCH_CHECK(data.scalar_type() == at::kByte && data.is_contiguous() && data.size(1) % blocks->bytes == 0,
                "rows of ", blocks->name, " must be contiguous bytes, a multiple of ", blocks->bytes);
  }
  BlockRow row(int64_t i) const { return {data.const_data_ptr<uint8_t>() + i * data.size(1), blocks}; }
};

// A matrix whose rows are read as float32.
class Matrix {
 public:
  explicit Matrix(const LoadedMatrix& loaded) : Matrix(loaded.data) {}
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
inline void check_shape(const LoadedMatrix& weight, int64_t outputs, int64_t inputs) {
  weight.check();
  TORCH_CHECK(weight.outputs() == outputs && weight.inputs() == inputs, "a weight must be [", outputs, ", ", inputs,
              "], not [", weight.outputs(), ", ", weight.inputs(), "]");
}

template <typename W>
void check_inputs(const LoadedMatrix& weight) {
  constexpr bool takes_blocks = std::is_same_v<W, Blocks>;
  TORCH_CHECK((weight.blocks != nullptr) == takes_blocks, "weights must be ", takes_blocks ? "blocks" : "numbers");
  TORCH_CHECK(weight.inputs() % Layout<W>::kInputs == 0, "weights must be [outputs, inputs], inputs a multiple of ",
              Layout<W>::kInputs);
}

// One product with the outputs of several, one behind another.
template <typename W>
void stack(Arena& arena, Packed<W>& packed, const std::vector<LoadedMatrix>& parts,
           const std::vector<OptionalTensor>& biases) {
  std::vector<float> bias;
  int64_t outputs = 0;
  bool any = false;
  for (size_t i = 0; i < parts.size(); ++i) {
    check_inputs<W>(parts[i]);
    outputs += parts[i].outputs();
    const std::vector<float> own = biases[i] ? floats(*biases[i]) : std::vector<float>(parts[i].outputs());
    TORCH_CHECK(int64_t(own.size()) == parts[i].outputs(), "a bias must have one number for each output");
    bias.insert(bias.end(), own.begin(), own.end());
    any |= biases[i].has_value();
  }
  const auto find = [&](int64_t row, const auto& found) {
    size_t part = 0;
    while (row >= parts[part].outputs())
      row -= parts[part++].outputs();
    return found(part, row);
  };
  if constexpr (std::is_same_v<W, Blocks>) {
    packed.pack(arena, outputs, parts.front().inputs(), [&](int64_t row) {
      return find(row, [&](size_t part, int64_t i) { return parts[part].row(i); });
    });
  } else {
    const std::vector<Matrix> matrices(parts.begin(), parts.end());
    packed.pack(arena, outputs, parts.front().inputs(), [&](int64_t row, float* buffer) {
      return find(row, [&](size_t part, int64_t i) { return matrices[part].row(i, buffer); });
    });
  }
  if (any) packed.bias = bias;
}

// Every panel holds kLanes outputs of the gate, then the same outputs of the up projection.
template <typename W>
void interleave(Arena& arena, Packed<W>& packed, const LoadedMatrix& gate, const LoadedMatrix& up,
                const OptionalTensor& gate_bias = std::nullopt, const OptionalTensor& up_bias = std::nullopt) {
  check_inputs<W>(gate);
  check_inputs<W>(up);
  const int64_t outputs = 2 * round_up(gate.outputs(), kLanes);
  const auto find = [&](int64_t row, const auto& g, const auto& u, const auto& found) {
    const int64_t at = row / kColumns * kLanes + row % kLanes;
    using Found = decltype(found(g, at));
    return at < gate.outputs() ? found(row % kColumns < kLanes ? g : u, at) : Found{};
  };
  if constexpr (std::is_same_v<W, Blocks>) {
    packed.pack(arena, outputs, gate.inputs(), [&](int64_t row) {
      return find(row, gate, up, [](const LoadedMatrix& of, int64_t i) { return of.row(i); });
    });
  } else {
    const Matrix g(gate), u(up);
    packed.pack(arena, outputs, gate.inputs(), [&](int64_t row, float* buffer) {
      return find(row, g, u, [&](const Matrix& of, int64_t i) { return of.row(i, buffer); });
    });
  }
  if (!gate_bias && !up_bias) return;
  const auto bias_of = [&](const OptionalTensor& bias) {
    const std::vector<float> own = bias ? floats(*bias) : std::vector<float>(gate.outputs());
    TORCH_CHECK(int64_t(own.size()) == gate.outputs(), "a bias must have one number for each output");
    return own;
  };
  const std::vector<float> g = bias_of(gate_bias), u = bias_of(up_bias);
  for (int64_t row = 0; row < outputs; ++row)
    packed.bias.push_back(find(row, g, u, [](const std::vector<float>& of, int64_t i) { return of[i]; }));
}

}  // namespace softbatch
