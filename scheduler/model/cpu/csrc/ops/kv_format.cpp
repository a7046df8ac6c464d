// Packs the keys and values of soft prompts, which no step computes.

#include "attention/kv_format.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace softbatch {
namespace {

std::tuple<int64_t, int64_t> packed_row_bytes(int64_t format, int64_t dim) {
  const KvPacking<float> rows(kv_format_of(format), dim);
  return {rows.keys.bytes, rows.values.bytes};
}

// float32 rows [..., dim] as uint8 [..., bytes]; keys are turned first.
at::Tensor pack_rows(const at::Tensor& rows, int64_t format, bool are_keys) {
  TORCH_CHECK(rows.device().is_cpu() && rows.scalar_type() == at::kFloat && rows.dim() > 0,
              "rows must be float32 [..., head_dim], on the cpu");
  const int64_t dim = rows.size(-1);
  const KvPacking<float> packings(kv_format_of(format), dim);
  TORCH_CHECK(packings, "there is nothing to do for a cache that is not packed");
  const RowCodec<float>& codec = are_keys ? packings.keys : packings.values;
  std::vector<int64_t> sizes = rows.sizes().vec();
  sizes.back() = codec.bytes;
  const at::Tensor from = rows.contiguous(), to = at::empty(sizes, rows.options().dtype(at::kByte));
  std::vector<float> row(dim);
  for (int64_t i = 0; i < from.numel() / dim; ++i) {
    std::memcpy(row.data(), from.const_data_ptr<float>() + i * dim, dim * sizeof(float));
    if (are_keys) hadamard_rotate(row.data(), dim);
    codec.encode(row.data(), dim, to.data_ptr<uint8_t>() + i * codec.bytes);
  }
  return to;
}

}  // namespace
}  // namespace softbatch

TORCH_LIBRARY_FRAGMENT(softbatch, m) {
  m.def("packed_row_bytes(int format, int head_dim) -> (int, int)", &softbatch::packed_row_bytes);
  m.def("pack_rows(Tensor rows, int format, bool are_keys) -> Tensor", &softbatch::pack_rows);
}
