// Weights as they were loaded, before they are packed.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "vector.h"

namespace softbatch {

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

}  // namespace softbatch
