// A step's metadata, checked before anything is written: a wrong block would be another sequence's.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace softbatch {

inline void check_metadata(const at::Tensor& t, at::ScalarType dtype, int64_t dim, const char* name) {
  TORCH_CHECK(t.device().is_cpu(), name, " must be on the cpu, not on ", t.device());
  TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", dtype, ", not ", t.scalar_type());
  TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimension(s), not ", t.dim());
  TORCH_CHECK(t.size(-1) <= 1 || t.stride(-1) == 1, name, " must be contiguous in its last dimension");
}

// int64 [count], each from 0 to below `end`.
inline void check_rows(const at::Tensor& t, int64_t count, int64_t end, const char* name) {
  check_metadata(t, at::kLong, 1, name);
  TORCH_CHECK(t.size(0) == count, name, " must have ", count, " entries");
  const int64_t* values = t.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK(values[i] >= 0 && values[i] < end, name, "[", i, "] is ", values[i], ", not from 0 to below ", end);
}

// bool [count], or nothing.
inline const bool* check_flags(const std::optional<at::Tensor>& flags, int64_t count, const char* name) {
  if (!flags) return nullptr;
  check_metadata(*flags, at::kBool, 1, name);
  TORCH_CHECK(flags->size(0) == count, name, " must have ", count, " entries");
  return flags->const_data_ptr<bool>();
}

inline const bool* check_decodes(const std::optional<at::Tensor>& decodes, int64_t sequences) {
  return check_flags(decodes, sequences, "decodes");
}

inline void check_batch(const at::Tensor& query_start, const at::Tensor& context_len, const at::Tensor& block_table,
                        const at::Tensor& slot_mapping, int64_t tokens, const at::Tensor& cache) {
  const int64_t blocks = cache.size(0), block_size = cache.size(2);
  check_metadata(query_start, at::kInt, 1, "query_start");
  check_metadata(context_len, at::kInt, 1, "context_len");
  check_metadata(block_table, at::kInt, 2, "block_table");
  const int64_t sequences = context_len.size(0), columns = block_table.size(1), row = block_table.stride(0);
  TORCH_CHECK(query_start.size(0) == sequences + 1, "query_start must have one entry more than context_len");
  TORCH_CHECK(block_table.size(0) == sequences, "block_table must have one row per sequence");
  const int32_t* start = query_start.const_data_ptr<int32_t>();
  const int32_t* context = context_len.const_data_ptr<int32_t>();
  const int32_t* table = block_table.const_data_ptr<int32_t>();
  TORCH_CHECK(start[0] == 0 && start[sequences] == tokens, "query_start must begin with 0 and end with ",
              tokens);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t length = int64_t(start[s + 1]) - start[s];
    TORCH_CHECK(length >= 0, "query_start must not decrease");
    TORCH_CHECK(context[s] >= length, "context_len of sequence ", s, " is shorter than its query");
    TORCH_CHECK(context[s] <= columns * block_size, "context_len of sequence ", s,
                " exceeds its block table");
    for (int64_t b = 0; b * block_size < context[s]; ++b)
      TORCH_CHECK(table[s * row + b] >= 0 && table[s * row + b] < blocks, "block_table of sequence ", s,
                  " names block ", table[s * row + b], " of ", blocks);
  }
  check_rows(slot_mapping, tokens, blocks * block_size, "slot_mapping");
}

}  // namespace softbatch
