// Attention over a paged KV cache on CPUs, for float32, bfloat16 and float16. Sums and softmax are in float32.
//
// One layer's attention as an operator of its own, for models that run through transformers' modelling code.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "attention/attention.h"
#include "attention/check_batch.h"
#include "threads/team.h"

namespace softbatch {
namespace {

template <typename T>
void write_cache(const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_cache,
                 const at::Tensor& value_cache, const at::Tensor& slot_mapping) {
  const int64_t kv_heads = key.size(1), dim = key.size(2), block_size = key_cache.size(2);
  const int64_t block_stride = key_cache.stride(0), head_stride = key_cache.stride(1);
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  const auto copy = [&](const at::Tensor& from, const at::Tensor& to, int64_t t) {
    const T* source = from.const_data_ptr<T>() + t * from.stride(0);
    T* target = to.data_ptr<T>() + slots[t] / block_size * block_stride + slots[t] % block_size * dim;
    for (int64_t h = 0; h < kv_heads; ++h)
      std::memcpy(target + h * head_stride, source + h * from.stride(1), dim * sizeof(T));
  };
  at::parallel_for(0, key.size(0), 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      copy(key, key_cache, t);
      copy(value, value_cache, t);
    }
  });
}

void check(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
           const at::Tensor& key_cache, const at::Tensor& value_cache, const at::Tensor& query_start,
           const at::Tensor& context_len, const at::Tensor& block_table, const at::Tensor& slot_mapping) {
  for (const at::Tensor& t : {query, key, value, key_cache, value_cache}) {
    TORCH_CHECK(t.device().is_cpu(), "query, key, value and caches must be on the cpu, not on ", t.device());
    TORCH_CHECK(t.scalar_type() == query.scalar_type(),
                "query, key, value and caches must share one dtype, not ", query.scalar_type(), " and ",
                t.scalar_type());
  }
  TORCH_CHECK(query.dim() == 3 && key.dim() == 3,
              "query must be [T, heads, head_dim], key [T, kv_heads, head_dim]");
  TORCH_CHECK(key.sizes() == value.sizes(), "key and value must have one shape");
  TORCH_CHECK(key_cache.dim() == 4, "caches must be [num_blocks, kv_heads, block_size, head_dim]");
  TORCH_CHECK(key_cache.sizes() == value_cache.sizes() && key_cache.strides() == value_cache.strides(),
              "key_cache and value_cache must have one shape and layout");
  const int64_t tokens = query.size(0), heads = query.size(1), dim = query.size(2), kv_heads = key.size(1);
  TORCH_CHECK(key.size(0) == tokens && key.size(2) == dim, "key must have query's tokens and head_dim");
  TORCH_CHECK(dim > 0, "head_dim must be positive");
  TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "heads (", heads, ") must be a multiple of kv_heads (",
              kv_heads, ")");
  TORCH_CHECK(key_cache.size(1) == kv_heads && key_cache.size(3) == dim,
              "caches must have key's kv_heads and head_dim");
  TORCH_CHECK(key_cache.size(2) > 0, "block_size must be positive");
  TORCH_CHECK(key_cache.stride(3) == 1 && key_cache.stride(2) == dim,
              "each block of a cache must be contiguous");

  check_batch(query_start, context_len, block_table, slot_mapping, tokens, key_cache);
}

at::Tensor dense_rows(const at::Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           at::Tensor key_cache, at::Tensor value_cache, const at::Tensor& query_start,
                           const at::Tensor& context_len, const at::Tensor& block_table,
                           const at::Tensor& slot_mapping, double scale, int64_t window, double softcap,
                           const std::optional<at::Tensor>& sinks, const std::optional<at::Tensor>& decodes,
                           bool joins_ranges) {
  check(query, key, value, key_cache, value_cache, query_start, context_len, block_table, slot_mapping);
  TORCH_CHECK(window >= 0 && softcap >= 0, "a window and a softcap must not be negative");
  TORCH_CHECK(!sinks || (sinks->is_cpu() && sinks->numel() == query.size(1)), "sinks must be one number for each head");
  const at::Tensor sink = sinks ? sinks->to(at::kFloat).contiguous() : at::Tensor();
  const at::Tensor q = dense_rows(query), k = dense_rows(key), v = dense_rows(value);
  at::Tensor out = at::empty(query.sizes(), query.options().memory_format(at::MemoryFormat::Contiguous));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    write_cache<T>(k, v, key_cache, value_cache, slot_mapping);
    Problem<T> p{};
    p.query = q.const_data_ptr<T>();
    p.query_stride = q.stride(0);
    p.query_head_stride = q.stride(1);
    p.keys.numbers = key_cache.data_ptr<T>();
    p.values.numbers = value_cache.data_ptr<T>();
    p.block_stride = key_cache.stride(0);
    p.head_stride = key_cache.stride(1);
    p.slot_stride = query.size(2);
    p.block_size = key_cache.size(2);
    p.query_start = query_start.const_data_ptr<int32_t>();
    p.context_len = context_len.const_data_ptr<int32_t>();
    p.block_table = block_table.const_data_ptr<int32_t>();
    p.table_stride = block_table.stride(0);
    p.decodes = check_decodes(decodes, context_len.size(0));
    p.joins_ranges = joins_ranges;
    p.out = out.data_ptr<T>();
    p.heads = q.size(1);
    p.group = q.size(1) / k.size(1);
    p.dim = q.size(2);
    p.key_dim = p.dim;
    p.padded_dim = p.padded_key_dim = round_up(p.dim, kPanel);
    p.scale = static_cast<float>(scale) * kLog2e;
    p.window = window;
    p.softcap = static_cast<float>(softcap) * kLog2e;
    p.sinks = sinks ? sink.const_data_ptr<float>() : nullptr;
    const Plan plan(p, context_len.size(0), k.size(1));
    const at::Tensor partials = at::empty({plan.partials, p.padded_dim + 2}, at::kFloat);
    p.partials = partials.data_ptr<float>();
    Team::run([&](Team& team) {
      attend(plan, p, [&](int64_t count, const auto& f) { team.for_each_ahead(count, true, f); });
    });
  };
  AT_DISPATCH_SWITCH(query.scalar_type(), "paged_attention",
                     AT_DISPATCH_CASE(at::kFloat, [&] { run(scalar_t{}); })
                         AT_DISPATCH_CASE(at::kBFloat16, [&] { run(scalar_t{}); })
                             AT_DISPATCH_CASE(at::kHalf, [&] { run(scalar_t{}); }));
  return out;
}

at::Tensor paged_attention_meta(const at::Tensor& query, const at::Tensor&, const at::Tensor&, at::Tensor,
                                at::Tensor, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const at::Tensor&, double, int64_t, double, const std::optional<at::Tensor>&,
                                const std::optional<at::Tensor>&, bool) {
  return at::empty_symint(query.sym_sizes(), query.options().memory_format(at::MemoryFormat::Contiguous));
}

}  // namespace
}  // namespace softbatch

TORCH_LIBRARY(softbatch, m) {
  m.def(
      "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor query_start, Tensor context_len, Tensor block_table, Tensor slot_mapping, float scale, int window=0, "
      "float softcap=0, Tensor? sinks=None, Tensor? decodes=None, bool joins_ranges=True) -> Tensor");
}
TORCH_LIBRARY_IMPL(softbatch, CPU, m) { m.impl("paged_attention", softbatch::paged_attention); }
TORCH_LIBRARY_IMPL(softbatch, Meta, m) { m.impl("paged_attention", softbatch::paged_attention_meta); }
