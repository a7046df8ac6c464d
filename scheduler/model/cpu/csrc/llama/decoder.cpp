// A whole decoder of the Llama family in one call: RMSNorm, rotary positions, attention over the paged cache, SwiGLU.
//
// The residual stream, norms, softmax and all sums are float32; what enters a product is rounded to the weights' dtype.
// W is the weights' dtype, T what attention reads and writes, and what the KV cache holds unless it is packed.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "attention/attention.h"
#include "attention/check_batch.h"
#include "attention/kv_format.h"
#include "matmul/matmul.h"
#include "matmul/weights.h"
#include "matmul/row_ops.h"

namespace softbatch {

// What Python holds; Decoder below has the types.
class DecoderBase : public torch::CustomClassHolder {
 public:
  virtual void add_layer(const std::vector<at::Tensor>& weights, const std::vector<OptionalTensor>& optional,
                         const at::Tensor& key_cache, const at::Tensor& value_cache) = 0;
  virtual void set_head(const at::Tensor& norm, const at::Tensor& weight, const OptionalTensor& bias) = 0;
  virtual at::Tensor forward(const at::Tensor& hidden, const at::Tensor& positions, const at::Tensor& query_start,
                             const at::Tensor& context_len, const at::Tensor& block_table,
                             const at::Tensor& slot_mapping, const at::Tensor& logit_rows) = 0;
};

namespace {

template <typename W, typename T>
class Decoder final : public DecoderBase {
 public:
  Decoder(int64_t heads, int64_t kv_heads, int64_t dim, double epsilon, double scale, const at::Tensor& frequencies,
          double rotary_scale, KvFormat kv_format)
      : kv_packing_(kv_format, dim), heads_(heads), kv_heads_(kv_heads), dim_(dim), epsilon_(epsilon), scale_(scale),
        frequencies_(floats(frequencies)), rotary_scale_(rotary_scale) {
    TORCH_CHECK(heads % kv_heads == 0, "heads must be a multiple of kv_heads");
    TORCH_CHECK(2 * int64_t(frequencies_.size()) == dim, "one frequency for every two dimensions of a head");
  }

  void add_layer(const std::vector<at::Tensor>& weights, const std::vector<OptionalTensor>& optional,
                 const at::Tensor& key_cache, const at::Tensor& value_cache) override {
    TORCH_CHECK(weights.size() == 9 && optional.size() == 6, "a layer has nine tensors, and six optional ones");
    const auto dtype = kv_packing_ ? at::kByte : c10::CppTypeToScalarType<T>::value;
    const auto check_cache = [&](const at::Tensor& cache, int64_t packed_bytes) {
      TORCH_CHECK(cache.is_contiguous() && cache.dim() == 4 && cache.size(1) == kv_heads_ &&
                      cache.size(3) == (kv_packing_ ? packed_bytes : dim_),
                  "caches must be contiguous [num_blocks, kv_heads, block_size, head_dim or bytes of a packed row]");
      TORCH_CHECK(cache.scalar_type() == dtype, "caches must be ", dtype);
    };
    check_cache(key_cache, kv_packing_.keys.bytes);
    check_cache(value_cache, kv_packing_.values.bytes);
    TORCH_CHECK(key_cache.size(0) == value_cache.size(0) && key_cache.size(2) == value_cache.size(2),
                "caches must have the same blocks");
    const int64_t size = weights[0].numel(), width = heads_ * dim_, inner = weights[6].size(0);
    TORCH_CHECK(weights[5].numel() == size && (layers_.empty() || inner == intermediate_), "layers must be alike");
    check_shape(weights[1], width, size);
    check_shape(weights[2], kv_heads_ * dim_, size);
    check_shape(weights[3], kv_heads_ * dim_, size);
    check_shape(weights[4], size, width);
    check_shape(weights[6], inner, size);
    check_shape(weights[7], inner, size);
    check_shape(weights[8], size, inner);
    for (int norm : {4, 5})
      TORCH_CHECK(!optional[norm] || optional[norm]->numel() == dim_, "a head's norm must have its dimensions");
    layers_.emplace_back(std::make_unique<Layer>());
    Layer& layer = *layers_.back();
    layer.input_norm = floats(weights[0]);
    stack(arena_, layer.qkv, {weights[1], weights[2], weights[3]}, {optional[0], optional[1], optional[2]});
    stack(arena_, layer.out, {weights[4]}, {optional[3]});
    layer.mlp_norm = floats(weights[5]);
    interleave(arena_, layer.gate_up, weights[6], weights[7]);
    stack(arena_, layer.down, {weights[8]}, {std::nullopt});
    if (optional[4]) layer.query_norm = floats(*optional[4]);
    if (optional[5]) layer.key_norm = floats(*optional[5]);
    layer.key_cache = key_cache;
    layer.value_cache = value_cache;
    intermediate_ = inner;
  }

  void set_head(const at::Tensor& norm, const at::Tensor& weight, const OptionalTensor& bias) override {
    norm_ = floats(norm);
    check_shape(weight, weight.size(0), norm_.size());
    stack(arena_, head_, {weight}, {bias});
  }

  at::Tensor forward(const at::Tensor& hidden, const at::Tensor& positions, const at::Tensor& query_start,
                     const at::Tensor& context_len, const at::Tensor& block_table, const at::Tensor& slot_mapping,
                     const at::Tensor& logit_rows) override {
    const int64_t tokens = hidden.size(0), size = hidden.size(1), sequences = context_len.size(0);
    TORCH_CHECK(size == int64_t(norm_.size()) && hidden.scalar_type() == c10::CppTypeToScalarType<T>::value,
                "hidden must be [T, hidden_size], in the cache's dtype");
    check_batch(query_start, context_len, block_table, slot_mapping, tokens, layers_.front()->key_cache);
    check_rows(positions, tokens, std::numeric_limits<int64_t>::max(), "positions");
    check_rows(logit_rows, logit_rows.size(0), tokens, "logit_rows");
    const at::Tensor inputs = hidden.contiguous();
    const at::Tensor logits = logits_for(logit_rows.size(0));
    const int64_t* wanted = logit_rows.const_data_ptr<int64_t>();
    const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
    const int64_t* position = positions.const_data_ptr<int64_t>();
    const int64_t width = heads_ * dim_, kv_width = kv_heads_ * dim_, half = dim_ / 2;

    const Rows residual{residual_.resize(tokens * size), size};
    const Rows qkv{qkv_.resize(tokens * (width + 2 * kv_width)), width + 2 * kv_width};
    T* query = query_.resize(tokens * width);
    T* attended = attended_.resize(tokens * width);
    constexpr bool kTakesParts = Layout<W>::kTakesParts;
    T* gated = kTakesParts ? nullptr : gated_.resize(std::max(tokens, logit_rows.size(0)) * intermediate_);
    float* cosines = rotary_.resize(2 * tokens * half);
    float* sines = cosines + tokens * half;

    Problem<T> p{};
    const at::Tensor& any_cache = layers_.front()->key_cache;
    p.query = query;
    p.query_stride = width;
    p.query_head_stride = dim_;
    p.slot_stride = kv_packing_ ? 1 : dim_;
    p.block_size = any_cache.size(2);
    p.head_stride = p.block_size * p.slot_stride;
    p.block_stride = kv_heads_ * p.head_stride;
    p.query_start = query_start.const_data_ptr<int32_t>();
    p.context_len = context_len.const_data_ptr<int32_t>();
    p.block_table = block_table.const_data_ptr<int32_t>();
    p.table_stride = block_table.stride(0);
    p.out = attended;
    p.heads = heads_;
    p.group = heads_ / kv_heads_;
    p.dim = dim_;
    p.padded_dim = round_up(dim_, kPanel);
    p.scale = static_cast<float>(scale_) * kLog2e;
    const Plan plan(p, sequences, kv_heads_);
    p.partials = partials_.resize(plan.partials * (p.padded_dim + 2));

    for (auto* x : {&hidden_in_, &attended_in_, &gated_in_})
      x->resize(tokens, x == &hidden_in_ ? size : x == &attended_in_ ? width : intermediate_);
    // Behind the last layer's attention only the rows whose logits are wanted count.
    const int64_t last_rows = logit_rows.size(0);
    const Rows last_residual{last_residual_.resize(last_rows * size), size};
    head_in_.resize(last_rows, size);
    last_attended_in_.resize(last_rows, width);
    last_gated_in_.resize(last_rows, intermediate_);

    Team::run([&](Team& team) {
      std::vector<float> row_buffer(std::max({size, width, intermediate_}));
      float* buffer = row_buffer.data();
      const auto normed = [&](const Rows& rows, const std::vector<float>& weight) {
        return [&, buffer](int64_t row) {
          rms_norm(rows.data + row * size, weight, epsilon_, buffer);
          return buffer;
        };
      };
      const auto widened = [&](const T* from, int64_t columns) {
        widen_row(from, columns, buffer);
        return buffer;
      };
      // What follows a layer's attention, on the rows of `residual`; attended_row(row) is where their attention lies.
      const auto behind_attention = [&](const Layer& layer, const Rows& residual, Activations<W>& attended_in,
                                        Activations<W>& hidden_in, Activations<W>& gated_in, const auto& attended_row) {
        const auto add_to_residual = [&](int64_t, int64_t row, int64_t column, const float* sums) {
          residual.each(row, column, sums, [](Vec old, Vec sum) { return old + sum; });
        };
        attended_in.fill(team, [&](int64_t row) { return widened(attended + attended_row(row) * width, width); });
        matmul(team, layer.out, attended_in, add_to_residual);
        hidden_in.fill(team, normed(residual, layer.mlp_norm));
        matmul(team, layer.gate_up, hidden_in, [&](int64_t tile, int64_t row, int64_t column, const float* sums) {
          const int64_t first = column / 2;
          float part[kLanes];
          store(part, swiglu(load(sums), load(sums + kLanes)));
          if constexpr (kTakesParts) {
            gated_in.put_part(tile, row, first, part);
          } else {
            narrow_row(part, std::min<int64_t>(kLanes, intermediate_ - first), gated + row * intermediate_ + first);
          }
        });
        if constexpr (!kTakesParts)
          gated_in.fill(team, [&](int64_t row) { return widened(gated + row * intermediate_, intermediate_); });
        matmul(team, layer.down, gated_in, add_to_residual);
      };

      team.for_each(tokens, [&](int64_t t) {
        widen_row(inputs.const_data_ptr<T>() + t * size, size, residual.data + t * size);
        for (int64_t i = 0; i < half; ++i) {
          const float angle = static_cast<float>(position[t]) * frequencies_[i];
          cosines[t * half + i] = std::cos(angle) * rotary_scale_;
          sines[t * half + i] = std::sin(angle) * rotary_scale_;
        }
      });
      for (const auto& layer : layers_) {
        hidden_in_.fill(team, normed(residual, layer->input_norm));
        matmul(team, layer->qkv, hidden_in_, [&](int64_t, int64_t row, int64_t column, const float* sums) {
          qkv.each(row, column, sums, [](Vec, Vec sum) { return sum; });
        });
        Problem<T> mine = p;
        mine.keys = KvRows<T>(layer->key_cache.data_ptr(), kv_packing_.keys);
        mine.values = KvRows<T>(layer->value_cache.data_ptr(), kv_packing_.values);
        team.for_each(tokens, [&](int64_t t) {
          const float *cosine = cosines + t * half, *sine = sines + t * half;
          float* from = qkv.data + t * qkv.columns;
          const int64_t slot = slots[t] / p.block_size * p.block_stride + slots[t] % p.block_size * p.slot_stride;
          for (int64_t h = 0; h < heads_; ++h) {
            rotate(from + h * dim_, layer->query_norm, epsilon_, cosine, sine, dim_, buffer);
            if (kv_packing_) hadamard_rotate(buffer, dim_);
            narrow_row(buffer, dim_, query + t * width + h * dim_);
          }
          for (int64_t h = 0; h < kv_heads_; ++h) {
            rotate(from + width + h * dim_, layer->key_norm, epsilon_, cosine, sine, dim_, buffer);
            if (kv_packing_) hadamard_rotate(buffer, dim_);
            mine.keys.put(buffer, dim_, slot + h * p.head_stride);
            mine.values.put(from + width + kv_width + h * dim_, dim_, slot + h * p.head_stride);
          }
        });
        const bool is_last = layer == layers_.back();
        if (is_last && last_rows == 0) return;
        attend(plan, mine, [&](int64_t count, const auto& f) { team.for_each_ahead(count, true, f); });
        if (!is_last)
          behind_attention(*layer, residual, attended_in_, hidden_in_, gated_in_, [](int64_t row) { return row; });
      }
      team.for_each(last_rows, [&](int64_t row) {
        std::memcpy(last_residual.data + row * size, residual.data + wanted[row] * size, size * sizeof(float));
      });
      behind_attention(*layers_.back(), last_residual, last_attended_in_, head_in_, last_gated_in_,
                       [&](int64_t row) { return wanted[row]; });
      head_in_.fill(team, normed(last_residual, norm_));
      const Rows out{logits.data_ptr<float>(), head_.outputs};
      matmul(team, head_, head_in_, [&](int64_t, int64_t row, int64_t column, const float* sums) {
        out.each(row, column, sums, [](Vec, Vec sum) { return sum; });
      });
    });
    return logits;
  }

 private:
  struct Layer {
    std::vector<float> input_norm, mlp_norm, query_norm, key_norm;
    Packed<W> qkv, out, gate_up, down;
    at::Tensor key_cache, value_cache;
  };

  // The memory is kept for the next step, since fresh pages would have to be cleared, but not that of a rare large one.
  at::Tensor logits_for(int64_t rows) {
    const auto make = [&](int64_t count) { return at::empty({count, head_.outputs}, at::kFloat); };
    if (rows > kKeptLogits) return make(rows);
    if (!logits_.defined() || logits_.size(0) < rows) logits_ = make(rows);
    return logits_.narrow(0, 0, rows);
  }

  const KvPacking<T> kv_packing_;
  const int64_t heads_, kv_heads_, dim_;
  const float epsilon_;
  const double scale_;
  const std::vector<float> frequencies_;
  const float rotary_scale_;
  int64_t intermediate_ = 0;
  Arena arena_;  // of all packed weights
  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<float> norm_;
  Packed<W> head_;
  // Working memory of a step, kept for the next.
  static constexpr int64_t kKeptLogits = 256;
  at::Tensor logits_;
  Buffer<float> residual_, last_residual_, qkv_, rotary_, partials_;
  Buffer<T> query_, attended_, gated_;
  Activations<W> hidden_in_, attended_in_, gated_in_, head_in_, last_attended_in_, last_gated_in_;
};

c10::intrusive_ptr<DecoderBase> make_decoder(int64_t weights, at::ScalarType dtype, int64_t heads, int64_t kv_heads,
                                             int64_t dim, double epsilon, double scale, const at::Tensor& frequencies,
                                             double rotary_scale, int64_t kv_format) {
  const auto make = [&](auto w, auto t) -> c10::intrusive_ptr<DecoderBase> {
    return c10::make_intrusive<Decoder<decltype(w), decltype(t)>>(heads, kv_heads, dim, epsilon, scale, frequencies,
                                                                  rotary_scale, kv_format_of(kv_format));
  };
  if (weight_format_of(weights).format != WeightFormat::kInt8) return in_format(weights, make);
  return dtype == at::kFloat ? make(int8_t{}, float{}) : make(int8_t{}, at::BFloat16{});
}

bool has_12_bits() {
#if defined(SOFTBATCH_COMPACT)
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace softbatch

TORCH_LIBRARY_FRAGMENT(softbatch, m) {
  using softbatch::DecoderBase;
  m.class_<DecoderBase>("Decoder")
      .def(torch::init(&softbatch::make_decoder))
      .def("add_layer", &DecoderBase::add_layer)
      .def("set_head", &DecoderBase::set_head)
      .def("forward", &DecoderBase::forward);
  m.def("has_12_bits() -> bool", &softbatch::has_12_bits);
}
