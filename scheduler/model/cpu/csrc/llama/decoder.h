// A whole decoder in one call: RMSNorm, rotary positions, attention over the paged cache, a gated MLP. What differs
// between families is in DecoderShape and in each layer: which norms there are, its window, its rotary scheme.
//
// The residual stream, norms, softmax and all sums are float32. Only what enters a product is rounded, to the weights'
// dtype. W is the weights' format. T is the dtype of attention, and of the KV cache unless the cache is packed.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>

#include <cmath>
#include <limits>
#include <map>
#include <memory>

#include "attention/attention.h"
#include "attention/check_batch.h"
#include "attention/kv_format.h"
#include "llama/decoder_shape.h"
#include "llama/decoder_step.h"
#include "llama/layer_weights.h"
#include "llama/position_keys.h"
#include "matmul/matmul.h"
#include "matmul/row_ops.h"

namespace softbatch {

// What Python holds; Decoder below has the types.
class DecoderBase : public torch::CustomClassHolder {
 public:
  virtual void add_layer(const LayerWeights::Named& named, const LayerWeights::Kinds& kinds,
                         const at::Tensor& key_cache, const at::Tensor& value_cache, int64_t window,
                         int64_t rotary) = 0;
  virtual void limit_windows(int64_t most) = 0;
  virtual void set_head(const at::Tensor& norm, const at::Tensor& weight, std::optional<int64_t> kind,
                        const OptionalTensor& bias) = 0;
  virtual int64_t weight_bytes() const = 0;
  virtual at::Tensor forward(const at::Tensor& hidden, const at::Tensor& positions, const at::Tensor& query_start,
                             const at::Tensor& context_len, const at::Tensor& block_table,
                             const at::Tensor& slot_mapping, const at::Tensor& logit_rows, bool as_states,
                             const OptionalTensor& decodes, bool joins_ranges, const OptionalTensor& turns_long) = 0;
};

template <typename W, typename T>
class Decoder final : public DecoderBase {
 public:
  // `frequencies` [schemes, half] and `rotary_scales` [schemes] are those of each rotary scheme, which turns the first
  // 2 * half dimensions of a head. `long_frequencies` are those of tokens that a step says turn as in long sequences.
  Decoder(const DecoderShape& shape, const at::Tensor& frequencies, const at::Tensor& rotary_scales,
          const OptionalTensor& long_frequencies, KvFormat kv_format)
      : shape_(shape), kv_packing_(kv_format, shape.head_dim), heads_(shape.heads), kv_heads_(shape.kv_heads),
        dim_(shape.head_dim), epsilon_(shape.epsilon), half_(frequencies.size(1)), frequencies_(floats(frequencies)),
        long_frequencies_(long_frequencies ? floats(*long_frequencies) : std::vector<float>()),
        rotary_scales_(floats(rotary_scales)) {
    TORCH_CHECK(int64_t(rotary_scales_.size()) == frequencies.size(0), "each rotary scheme must have its scale");
    TORCH_CHECK(long_frequencies_.empty() || long_frequencies_.size() == frequencies_.size(),
                "long sequences must have as many frequencies as others");
    TORCH_CHECK(2 * half_ <= dim_, "no more than one frequency for every two dimensions of a head");
    for (size_t i = 0; i < rotary_scales_.size(); ++i)
      position_keys_.emplace_back(scheme(i, false), dim_);
    position_keys_.emplace_back(RotaryScheme{}, dim_);  // of layers without positions
  }

  // `window` is how many tokens each sees, or 0; `rotary` the scheme of its positions, or -1 for none.
  void add_layer(const LayerWeights::Named& named, const LayerWeights::Kinds& kinds, const at::Tensor& key_cache,
                 const at::Tensor& value_cache, int64_t window, int64_t rotary) override {
    TORCH_CHECK(window >= 0, "a window must not be negative");
    TORCH_CHECK(-1 <= rotary && rotary < int64_t(rotary_scales_.size()), "there is no rotary scheme ", rotary);
    const LayerWeights weights(named, kinds);
    weights.check(heads_, kv_heads_, dim_);
    TORCH_CHECK(layers_.empty() || (weights.hidden_size() == size_ && weights.intermediate_size() == inner_),
                "layers must be alike");
    TORCH_CHECK(kv_packing_ || !weights.key_offset, "a key offset is for a packed cache");
    TORCH_CHECK(long_frequencies_.empty() || !weights.key_offset, "a key offset is for positions that turn in one way");
    check_cache(key_cache, kv_packing_.keys.bytes);
    check_cache(value_cache, kv_packing_.values.bytes);
    TORCH_CHECK(key_cache.size(0) == value_cache.size(0) && key_cache.size(2) == value_cache.size(2),
                "caches must have the same blocks");
    const std::vector<float> sinks = weights.sinks ? floats(*weights.sinks) : std::vector<float>();
    layers_.push_back(std::make_unique<Layer>(Layer{{arena_, weights}, key_cache, value_cache, sinks, window, rotary}));
    branches_ |= weights.attended_norm || weights.mlp_output_norm;
    has_offsets_ |= weights.key_offset.has_value();
    size_ = weights.hidden_size();
    inner_ = weights.intermediate_size();
  }

  // No window is longer than `most`; 0: they are as they were given.
  void limit_windows(int64_t most) override { most_window_ = most; }

  // `kind` is that of the weight's blocks if it is some.
  void set_head(const at::Tensor& norm, const at::Tensor& weight, std::optional<int64_t> kind,
                const OptionalTensor& bias) override {
    norm_ = floats(norm);
    const LoadedMatrix loaded{weight, kind ? &block_format_of(*kind) : nullptr};
    check_shape(loaded, weight.size(0), norm_.size());
    stack(arena_, head_, {loaded}, {bias});
  }

  int64_t weight_bytes() const override { return arena_.allocated(); }

  at::Tensor forward(const at::Tensor& hidden, const at::Tensor& positions, const at::Tensor& query_start,
                     const at::Tensor& context_len, const at::Tensor& block_table, const at::Tensor& slot_mapping,
                     const at::Tensor& logit_rows, bool as_states, const OptionalTensor& decodes,
                     bool joins_ranges, const OptionalTensor& turns_long) override {
    const int64_t tokens = hidden.size(0);
    TORCH_CHECK(!layers_.empty() && int64_t(norm_.size()) == size_, "a decoder takes layers, and a head of their size");
    TORCH_CHECK(hidden.size(1) == size_ && hidden.scalar_type() == c10::CppTypeToScalarType<T>::value,
                "hidden must be [T, hidden_size], in the cache's dtype");
    check_batch(query_start, context_len, block_table, slot_mapping, tokens, layers_.front()->key_cache);
    check_rows(positions, tokens, std::numeric_limits<int64_t>::max(), "positions");
    check_rows(logit_rows, logit_rows.size(0), tokens, "logit_rows");
    TORCH_CHECK(!turns_long || !long_frequencies_.empty(), "this decoder knows no frequencies of long sequences");

    const int64_t wanted = logit_rows.size(0);
    const at::Tensor inputs = hidden.contiguous();
    const at::Tensor out = as_states ? at::empty({wanted, size_}, at::kFloat) : logits_for(wanted);
    Step<W, T> step = working_memory(tokens, wanted);
    step.inputs = inputs.const_data_ptr<T>();
    step.positions = positions.const_data_ptr<int64_t>();
    step.turns_long = check_flags(turns_long, tokens, "turns_long");
    step.slots = slot_mapping.const_data_ptr<int64_t>();
    step.wanted.tokens = logit_rows.const_data_ptr<int64_t>();
    (as_states ? step.states : step.logits) = Rows{out.data_ptr<float>(), out.size(1)};
    step.problem = problem_of(step, query_start, context_len, block_table);
    step.problem.decodes = check_decodes(decodes, context_len.size(0));
    step.problem.joins_ranges = joins_ranges;
    if (has_offsets_) cover_positions(step.problem, context_len.size(0));
    const Plans plans = plans_of(step.problem, context_len.size(0));
    int64_t partials = 0;
    for (const auto& [window, plan] : plans)
      partials = std::max(partials, plan->partials);
    step.problem.partials = partials_.resize(partials * (step.problem.padded_dim + 2));
    Team::run([&](Team& team) {
      std::vector<float> row(std::max({size_, heads_ * dim_, inner_, 2 * dim_}));
      run_layers({team, row.data()}, step, plans);
    });
    return out;
  }

 private:
  struct Layer : PackedLayer<W> {
    at::Tensor key_cache, value_cache;
    std::vector<float> sinks;
    int64_t window, rotary;
  };

  using Plans = std::map<int64_t, std::unique_ptr<const Plan>>;  // by window

  static constexpr bool kTakesParts = Layout<W>::kTakesParts;

  void check_cache(const at::Tensor& cache, int64_t packed_bytes) const {
    const auto dtype = kv_packing_ ? at::kByte : c10::CppTypeToScalarType<T>::value;
    TORCH_CHECK(cache.is_contiguous() && cache.dim() == 4 && cache.size(1) == kv_heads_ &&
                    cache.size(3) == (kv_packing_ ? packed_bytes : dim_),
                "caches must be contiguous [num_blocks, kv_heads, block_size, head_dim or bytes of a packed row]");
    TORCH_CHECK(cache.scalar_type() == dtype, "caches must be ", dtype);
  }

  Step<W, T> working_memory(int64_t tokens, int64_t wanted) {
    const int64_t width = heads_ * dim_, qkv_width = width + 2 * kv_heads_ * dim_;
    const int64_t turns = rotary_scales_.size() * tokens * half_;
    const Rows branch{branches_ ? branch_.resize(std::max(tokens, wanted) * size_) : nullptr, size_};
    Step<W, T> step{};
    step.all = {tokens, {residual_.resize(tokens * size_), size_}, branch, &inputs_, nullptr};
    step.wanted = {wanted, {wanted_residual_.resize(wanted * size_), size_}, branch, &wanted_inputs_, nullptr};
    for (const Selection<W>* rows : {&step.all, &step.wanted})
      rows->inputs->resize(rows->count, size_, width, inner_);
    step.qkv = {qkv_.resize(tokens * qkv_width), qkv_width};
    step.query = query_.resize(tokens * width * (has_offsets_ ? 2 : 1));
    step.attended = attended_.resize(tokens * width);
    step.gated = kTakesParts ? nullptr : gated_.resize(std::max(tokens, wanted) * inner_);
    step.cosines = rotary_.resize(2 * turns);
    step.sines = step.cosines + turns;
    return step;
  }

  RotaryScheme scheme(int64_t i, bool is_long) const {
    return {(is_long ? long_frequencies_ : frequencies_).data() + i * half_, rotary_scales_[i], half_};
  }

  int64_t window_of(const Layer& layer) const {
    return most_window_ > 0 ? std::min(layer.window, most_window_) : layer.window;
  }

  Plans plans_of(const Problem<T>& problem, int64_t sequences) const {
    Plans plans;
    for (const auto& layer : layers_) {
      std::unique_ptr<const Plan>& plan = plans[window_of(*layer)];
      if (plan) continue;
      Problem<T> windowed = problem;
      windowed.window = window_of(*layer);
      plan = std::make_unique<const Plan>(windowed, sequences, kv_heads_);
    }
    return plans;
  }

  Problem<T> problem_of(const Step<W, T>& step, const at::Tensor& query_start, const at::Tensor& context_len,
                        const at::Tensor& block_table) const {
    Problem<T> p{};
    p.query = step.query;
    p.slot_stride = kv_packing_ ? 1 : dim_;
    p.block_size = layers_.front()->key_cache.size(2);
    p.head_stride = p.block_size * p.slot_stride;
    p.block_stride = kv_heads_ * p.head_stride;
    p.query_start = query_start.const_data_ptr<int32_t>();
    p.context_len = context_len.const_data_ptr<int32_t>();
    p.block_table = block_table.const_data_ptr<int32_t>();
    p.table_stride = block_table.stride(0);
    p.out = step.attended;
    p.heads = heads_;
    p.group = heads_ / kv_heads_;
    p.dim = dim_;
    p.padded_dim = round_up(dim_, kPanel);
    set_key_dim(p, dim_);
    p.scale = shape_.attention_scale * kLog2e;
    p.softcap = shape_.softcap * kLog2e;
    return p;
  }

  // Tiles may be filled up with keys behind the last.
  void cover_positions(const Problem<T>& p, int64_t sequences) {
    const int64_t longest = sequences > 0 ? *std::max_element(p.context_len, p.context_len + sequences) : 0;
    for (PositionKeys<T>& keys : position_keys_)
      keys.cover(longest + kKeyTile);
  }

  void set_key_dim(Problem<T>& p, int64_t key_dim) const {
    p.key_dim = key_dim;
    p.padded_key_dim = round_up(key_dim, kPanel);
    p.query_head_stride = key_dim;
    p.query_stride = heads_ * key_dim;
  }

  // The members of a team run this together, and meet behind every loop.
  void run_layers(const Worker& worker, const Step<W, T>& step, const Plans& plans) {
    embed(worker, step);
    for (const auto& layer : layers_) {
      Problem<T> problem = step.problem;
      problem.keys = KvRows<T>(layer->key_cache.data_ptr(), kv_packing_.keys);
      problem.values = KvRows<T>(layer->value_cache.data_ptr(), kv_packing_.values);
      problem.window = window_of(*layer);
      problem.sinks = layer->sinks.empty() ? nullptr : layer->sinks.data();
      if (!layer->key_offset.empty()) {
        set_key_dim(problem, 2 * dim_);
        problem.position_keys = (layer->rotary < 0 ? position_keys_.back() : position_keys_[layer->rotary]).rows();
      }
      into_attention(worker, step, *layer, problem);
      const bool is_last = layer == layers_.back();
      if (is_last && step.wanted.count == 0) return;
      attend(*plans.at(problem.window), problem, [&](int64_t count, const auto& f) { worker.team.for_each_ahead(count, true, f); });
      if (!is_last) behind_attention(worker, step, *layer, step.all);
    }
    worker.team.for_each(step.wanted.count, [&](int64_t row) {
      std::memcpy(step.wanted.residual.data + row * size_,
                  step.all.residual.data + step.wanted.token(row) * size_, size_ * sizeof(float));
    });
    behind_attention(worker, step, *layers_.back(), step.wanted);
    if (step.states.data) {
      worker.team.for_each(step.wanted.count, [&](int64_t row) {
        rms_norm(step.wanted.residual.data + row * size_, norm_, epsilon_, step.states.data + row * size_);
      });
      return;
    }
    fill_normed(worker, step.wanted, norm_);
    if (shape_.logit_scale == 1.0f && shape_.logit_softcap == 0.0f)
      return matmul(worker.team, head_, step.wanted.inputs->hidden, written_to(step.logits));
    const float scale = shape_.logit_scale, cap = shape_.logit_softcap;
    matmul(worker.team, head_, step.wanted.inputs->hidden, [&](int64_t, int64_t row, int64_t column, const float* sums) {
      step.logits.each(row, column, sums, [&](Vec, Vec sum) {
        return cap > 0 ? tanh(sum * (scale / cap)) * cap : sum * scale;
      });
    });
  }

  void embed(const Worker& worker, const Step<W, T>& step) const {
    worker.team.for_each(step.all.count, [&](int64_t t) {
      float* row = step.all.residual.data + t * size_;
      widen_row(step.inputs + t * size_, size_, row);
      if (shape_.embedding_scale != 1.0f)
        for (int64_t i = 0; i < size_; ++i)
          row[i] *= shape_.embedding_scale;
      for (size_t i = 0; i < rotary_scales_.size(); ++i) {
        const int64_t at = (i * step.all.count + t) * half_;
        const bool is_long = step.turns_long && step.turns_long[t];
        scheme(i, is_long).turn(static_cast<float>(step.positions[t]), step.cosines + at, step.sines + at);
      }
    });
  }

  void fill_normed(const Worker& worker, const Selection<W>& rows, const std::vector<float>& norm) const {
    rows.inputs->hidden.fill(worker.team, [&](int64_t row) {
      const float* from = rows.residual.data + row * size_;
      if (norm.empty()) return from;
      rms_norm(from, norm, epsilon_, worker.row);
      return static_cast<const float*>(worker.row);
    });
  }

  // Adds a product's rows to the residual stream, behind a norm of their own if there is one.
  void add_branch(const Worker& worker, const Selection<W>& rows, const Packed<W>& weights, const Activations<W>& inputs,
                  const std::vector<float>& norm) const {
    const float scale = shape_.residual_scale;
    if (norm.empty()) {
      if (scale == 1.0f) return matmul(worker.team, weights, inputs, added_to(rows.residual));
      return matmul(worker.team, weights, inputs, added_to(rows.residual, scale));
    }
    matmul(worker.team, weights, inputs, written_to(rows.branch));
    worker.team.for_each(rows.count, [&](int64_t row) {
      float* to = rows.residual.data + row * size_;
      rms_norm(rows.branch.data + row * size_, norm, epsilon_, worker.row);
      for (int64_t i = 0; i < size_; ++i)
        to[i] += worker.row[i] * scale;
    });
  }

  // Leaves queries in step.query, keys and values in the cache.
  void into_attention(const Worker& worker, const Step<W, T>& step, const Layer& layer, const Problem<T>& p) const {
    const int64_t width = heads_ * dim_, kv_width = kv_heads_ * dim_, half = layer.rotary < 0 ? 0 : half_;
    const int64_t turns = std::max<int64_t>(layer.rotary, 0) * step.all.count * half_;
    const bool has_offset = !layer.key_offset.empty();
    const bool norms_all = !layer.query_norm.empty() && int64_t(layer.query_norm.size()) != dim_;
    const std::vector<float> none, &query_norm = norms_all ? none : layer.query_norm,
                                   &key_norm = norms_all ? none : layer.key_norm;
    fill_normed(worker, step.all, layer.input_norm);
    matmul(worker.team, layer.qkv, step.all.inputs->hidden, written_to(step.qkv));
    worker.team.for_each(step.all.count, [&](int64_t t) {
      const float *cosine = step.cosines + turns + t * half, *sine = step.sines + turns + t * half;
      float *from = step.qkv.data + t * step.qkv.columns, *row = worker.row;
      const int64_t block = step.slots[t] / p.block_size, slot = step.slots[t] % p.block_size;
      const int64_t first = block * p.block_stride + slot * p.slot_stride;
      if (norms_all) {
        rms_norm(from, layer.query_norm, epsilon_, from);
        rms_norm(from + width, layer.key_norm, epsilon_, from + width);
      }
      for (int64_t h = 0; h < heads_; ++h) {
        rotate(from + h * dim_, query_norm, epsilon_, cosine, sine, half, dim_, row);
        if (has_offset) offset_factors(row, layer.key_offset.data() + h / p.group * dim_, half, dim_, row + dim_);
        if (kv_packing_) hadamard_rotate(row, dim_);
        narrow_row(row, p.key_dim, step.query + t * p.query_stride + h * p.key_dim);
      }
      for (int64_t h = 0; h < kv_heads_; ++h) {
        float* key = from + width + h * dim_;
        if (has_offset) {
          if (!key_norm.empty()) rms_norm(key, key_norm, epsilon_, key);
          for (int64_t i = 0; i < dim_; ++i)
            key[i] -= layer.key_offset[h * dim_ + i];
        }
        rotate(key, has_offset ? none : key_norm, epsilon_, cosine, sine, half, dim_, row);
        if (kv_packing_) hadamard_rotate(row, dim_);
        p.keys.put(row, dim_, first + h * p.head_stride);
        p.values.put(from + width + kv_width + h * dim_, dim_, first + h * p.head_stride);
      }
    });
  }

  void behind_attention(const Worker& worker, const Step<W, T>& step, const Layer& layer,
                        const Selection<W>& rows) const {
    ProductInputs<W>& in = *rows.inputs;
    const auto fill = [&](Activations<W>& to, int64_t columns, const auto& from) {
      to.fill(worker.team, [&](int64_t row) {
        widen_row(from(row), columns, worker.row);
        return worker.row;
      });
    };
    const int64_t width = heads_ * dim_;
    fill(in.attended, width, [&](int64_t row) { return step.attended + rows.token(row) * width; });
    add_branch(worker, rows, layer.out, in.attended, layer.attended_norm);
    fill_normed(worker, rows, layer.mlp_norm);
    matmul(worker.team, layer.gate_up, in.hidden, [&](int64_t tile, int64_t row, int64_t column, const float* sums) {
      const int64_t first = column / 2;
      float part[kLanes];
      const Vec gate = load(sums), up = load(sums + kLanes);
      store(part, shape_.gelu ? geglu(gate, up) : swiglu(gate, up));
      if constexpr (kTakesParts) {
        in.gated.put_part(tile, row, first, part);
      } else {
        narrow_row(part, std::min<int64_t>(kLanes, inner_ - first), step.gated + row * inner_ + first);
      }
    });
    if constexpr (!kTakesParts) fill(in.gated, inner_, [&](int64_t row) { return step.gated + row * inner_; });
    add_branch(worker, rows, layer.down, in.gated, layer.mlp_output_norm);
  }

  // Kept for the next step, as the kernel would have to clear fresh pages. A rare large step's memory is not kept.
  at::Tensor logits_for(int64_t rows) {
    const auto make = [&](int64_t count) { return at::empty({count, head_.outputs}, at::kFloat); };
    if (rows > kKeptLogits) return make(rows);
    if (!logits_.defined() || logits_.size(0) < rows) logits_ = make(rows);
    return logits_.narrow(0, 0, rows);
  }

  const DecoderShape shape_;
  const KvPacking<T> kv_packing_;
  const int64_t heads_, kv_heads_, dim_;
  const float epsilon_;
  const int64_t half_;
  const std::vector<float> frequencies_, long_frequencies_, rotary_scales_;
  int64_t most_window_ = 0;
  bool branches_ = false;         // some layer has a norm behind attention or the MLP
  bool has_offsets_ = false;      // some layer's keys have one
  std::vector<PositionKeys<T>> position_keys_;  // of each rotary scheme, and of none
  int64_t size_ = 0, inner_ = 0;  // hidden and intermediate
  Arena arena_;                   // of all packed weights
  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<float> norm_;
  Packed<W> head_;
  // Working memory of a step, kept for the next.
  static constexpr int64_t kKeptLogits = 256;
  at::Tensor logits_;
  Buffer<float> residual_, wanted_residual_, branch_, qkv_, rotary_, partials_;
  Buffer<T> query_, attended_, gated_;
  ProductInputs<W> inputs_, wanted_inputs_;
};

// What every decoder is made with.
struct DecoderMaker {
  DecoderShape shape;
  at::Tensor frequencies, rotary_scales;
  OptionalTensor long_frequencies;
  KvFormat kv_format;

  template <typename W, typename T>
  c10::intrusive_ptr<DecoderBase> make() const {
    return c10::make_intrusive<Decoder<W, T>>(shape, frequencies, rotary_scales, long_frequencies, kv_format);
  }
};

// Each format's decoder takes a compiler long, so they are in files of their own.
c10::intrusive_ptr<DecoderBase> make_int8_decoder(const DecoderMaker& maker, at::ScalarType dtype);
c10::intrusive_ptr<DecoderBase> make_block_decoder(const DecoderMaker& maker, at::ScalarType dtype);

}  // namespace softbatch
