// GGUF's blocks by themselves: which kinds there are, their values, and a product with them.

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "matmul/row_ops.h"
#include "matmul/weights.h"

namespace softbatch {
namespace {

LoadedMatrix matrix_of(const at::Tensor& data, int64_t kind) {
  LoadedMatrix found{data, &block_format_of(kind)};
  found.check();
  return found;
}

// By name, for the test that compares them with Python's.
c10::Dict<std::string, int64_t> block_kinds() {
  c10::Dict<std::string, int64_t> kinds;
  for (const BlockFormat& format : kBlockFormats)
    kinds.insert(format.name, format.kind);
  return kinds;
}

// Bytes [rows, bytes of a row] as float32 [rows, inputs].
at::Tensor dequantize_blocks(const at::Tensor& data, int64_t kind) {
  const LoadedMatrix matrix = matrix_of(data, kind);
  const at::Tensor to = at::empty({matrix.outputs(), matrix.inputs()}, data.options().dtype(at::kFloat));
  float* values = to.data_ptr<float>();
  at::parallel_for(0, matrix.outputs(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      dequantize_row(matrix.row(i).data, *matrix.blocks, matrix.inputs(), values + i * matrix.inputs());
  });
  return to;
}

// Float32 [rows, inputs] times each of the matrices, whose outputs lie one behind another.
at::Tensor multiply_blocks(const at::Tensor& x, const std::vector<at::Tensor>& data, const std::vector<int64_t>& kinds) {
  TORCH_CHECK(!data.empty() && data.size() == kinds.size(), "each matrix must have its kind");
  std::vector<LoadedMatrix> matrices;
  for (size_t i = 0; i < data.size(); ++i)
    matrices.push_back(matrix_of(data[i], kinds[i]));
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat, "rows must be float32 [rows, inputs]");
  for (const LoadedMatrix& matrix : matrices)
    check_shape(matrix, matrix.outputs(), x.size(1));
  Arena arena;
  Packed<Blocks> packed;
  stack(arena, packed, matrices, std::vector<OptionalTensor>(matrices.size()));
  const at::Tensor from = x.contiguous(), to = at::empty({x.size(0), packed.outputs}, x.options());
  Activations<Blocks> inputs;
  inputs.resize(x.size(0), x.size(1));
  Team::run([&](Team& team) {
    inputs.fill(team, [&](int64_t row) { return from.const_data_ptr<float>() + row * x.size(1); });
    matmul(team, packed, inputs, written_to({to.data_ptr<float>(), packed.outputs}));
  });
  return to;
}

}  // namespace
}  // namespace softbatch

TORCH_LIBRARY_FRAGMENT(softbatch, m) {
  m.def("block_kinds() -> Dict(str, int)", &softbatch::block_kinds);
  m.def("dequantize_blocks(Tensor data, int kind) -> Tensor", &softbatch::dequantize_blocks);
  m.def("multiply_blocks(Tensor x, Tensor[] data, int[] kinds) -> Tensor", &softbatch::multiply_blocks);
}
