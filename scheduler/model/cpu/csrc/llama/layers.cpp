// The layers of the Llama family before and behind their attention, with gradients in their inputs. They train a soft
// prompt in front of a frozen model. The caller computes attention between the two (prefix_attention.cpp).
//
// As in decoder.cpp the residual stream, norms and sums are float32, and what enters a product is rounded to W.
// Queries, keys, values and attention's results are T [batch, heads, tokens, dim]. All else is float32 [rows, ...],
// with batch * tokens rows.

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/stack.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "llama/heads.h"
#include "llama/layer_weights.h"
#include "matmul/row_ops.h"

namespace softbatch {

class LayersBase : public torch::CustomClassHolder {
 public:
  using Tensors = std::vector<at::Tensor>;

  virtual void add_layer(const LayerWeights::Named& named) = 0;
  virtual Tensors into_attention(int64_t layer, const at::Tensor& inputs, const at::Tensor& cosines,
                                 const at::Tensor& sines, int64_t batch) = 0;
  virtual at::Tensor into_attention_backward(int64_t layer, const at::Tensor& inputs, const at::Tensor& cosines,
                                             const at::Tensor& sines, const Tensors& gradients) = 0;
  virtual Tensors behind_attention(int64_t layer, const at::Tensor& inputs, const at::Tensor& attended) = 0;
  virtual Tensors behind_attention_backward(int64_t layer, const at::Tensor& middle, const at::Tensor& gate_up,
                                            const at::Tensor& gradient, int64_t batch) = 0;
};

namespace {

template <typename W, typename T>
class Layers final : public LayersBase {
 public:
  Layers(int64_t heads, int64_t kv_heads, int64_t dim, double epsilon)
      : heads_(heads), kv_heads_(kv_heads), dim_(dim), epsilon_(epsilon) {
    TORCH_CHECK(dim % 2 == 0 && heads % kv_heads == 0, "heads must be a multiple of kv_heads, of an even size");
  }

  void add_layer(const LayerWeights::Named& named) override {
    const LayerWeights weights(named);
    weights.check(heads_, kv_heads_, dim_);
    TORCH_CHECK(!weights.query_norm && !weights.key_norm, "norms of heads have no gradients here");
    TORCH_CHECK(weights.input_norm && weights.mlp_norm && !weights.attended_norm && !weights.mlp_output_norm,
                "layers have a norm before attention and one before the MLP here, and no others");
    const int64_t size = weights.hidden_size(), inner = weights.intermediate_size();
    TORCH_CHECK(layers_.empty() || (inner == inner_ && size == size_), "layers must be alike");
    size_ = size;
    inner_ = inner;
    layers_.push_back(std::make_unique<Layer>(Layer{{arena_, weights}, {}, {}, {}, {}}));
    Layer& layer = *layers_.back();
    const auto backwards = [&](Packed<W>& packed, const at::Tensor& weight) {
      stack(arena_, packed, {{weight.t().contiguous()}}, {std::nullopt});
    };
    backwards(layer.qkv_back, at::cat({weights.query.data, weights.key.data, weights.value.data}));
    backwards(layer.out_back, weights.output.data);
    // As interleave() has them: kLanes of the gate, then the same of the other half.
    const auto in_vectors = [&](const at::Tensor& weight) {
      return at::constant_pad_nd(weight, {0, 0, 0, gated() - inner}).reshape({-1, kLanes, size});
    };
    backwards(layer.gate_up_back, at::stack({in_vectors(weights.gate.data), in_vectors(weights.up.data)}, 1).reshape({-1, size}));
    backwards(layer.down_back, weights.down.data);
  }

  Tensors into_attention(int64_t index, const at::Tensor& inputs, const at::Tensor& cosines, const at::Tensor& sines,
                         int64_t batch) override {
    const Layer& layer = layer_at(index);
    const int64_t rows = check_rows(inputs, batch), width = heads_ * dim_, kv_width = kv_heads_ * dim_;
    check_rotary(cosines, sines, rows);
    const Tensors out = {heads(batch, heads_, rows), heads(batch, kv_heads_, rows), heads(batch, kv_heads_, rows)};
    const Heads<T> query(out[0], dim_), key(out[1], dim_), value(out[2], dim_);
    const float* x = inputs.const_data_ptr<float>();
    const Rows qkv{buffer_.resize(rows * (width + 2 * kv_width)), width + 2 * kv_width};
    hidden_in_.resize(rows, size_);
    Team::run([&](Team& team) {
      std::vector<float> own(std::max(size_, width));
      hidden_in_.fill(team, [&](int64_t row) {
        rms_norm(x + row * size_, layer.input_norm, epsilon_, own.data());
        return own.data();
      });
      matmul(team, layer.qkv, hidden_in_, written_to(qkv));
      team.for_each(rows, [&](int64_t row) {
        float* from = qkv.data + row * qkv.columns;
        turn(from, heads_, cosines, sines, row, own.data());
        query.write(row, own.data());
        turn(from + width, kv_heads_, cosines, sines, row, own.data());
        key.write(row, own.data());
        value.write(row, from + width + kv_width);
      });
    });
    return out;
  }

  at::Tensor into_attention_backward(int64_t index, const at::Tensor& inputs, const at::Tensor& cosines,
                                     const at::Tensor& sines, const Tensors& gradients) override {
    const Layer& layer = layer_at(index);
    TORCH_CHECK(gradients.size() == 3, "gradients of queries, keys and values");
    const int64_t batch = gradients[0].size(0), rows = check_rows(inputs, batch);
    check_rotary(cosines, sines, rows);
    check_heads(gradients[0], batch, heads_, rows);
    check_heads(gradients[1], batch, kv_heads_, rows);
    check_heads(gradients[2], batch, kv_heads_, rows);
    const int64_t width = heads_ * dim_, kv_width = kv_heads_ * dim_;
    const Heads<T> query(gradients[0], dim_), key(gradients[1], dim_), value(gradients[2], dim_);
    const at::Tensor out = at::empty({rows, size_}, at::kFloat), back = sines.neg();
    const Rows normed{out.data_ptr<float>(), size_};
    qkv_in_.resize(rows, width + 2 * kv_width);
    Team::run([&](Team& team) {
      std::vector<float> read(width + 2 * kv_width), turned(width + 2 * kv_width);
      qkv_in_.fill(team, [&](int64_t row) {
        query.read(row, read.data());
        key.read(row, read.data() + width);
        turn(read.data(), heads_ + kv_heads_, cosines, back, row, turned.data());
        value.read(row, turned.data() + width + kv_width);
        return turned.data();
      });
      matmul(team, layer.qkv_back, qkv_in_, written_to(normed));
      team.for_each(rows, [&](int64_t row) {
        float* gradient = normed.data + row * size_;
        rms_norm_backward(inputs.const_data_ptr<float>() + row * size_, layer.input_norm, epsilon_, gradient, gradient);
      });
    });
    return out;
  }

  Tensors behind_attention(int64_t index, const at::Tensor& inputs, const at::Tensor& attended) override {
    const Layer& layer = layer_at(index);
    const int64_t batch = attended.size(0), rows = check_rows(inputs, batch), width = heads_ * dim_;
    check_heads(attended, batch, heads_, rows);
    const Heads<T> from(attended, dim_);
    const Tensors out = {inputs.clone(), at::empty({rows, size_}, at::kFloat),
                         at::empty({rows, 2 * gated()}, at::kFloat)};
    const Rows middle{out[0].data_ptr<float>(), size_}, next{out[1].data_ptr<float>(), size_};
    const Rows gate_up{out[2].data_ptr<float>(), 2 * gated()};
    attended_in_.resize(rows, width);
    hidden_in_.resize(rows, size_);
    gated_in_.resize(rows, inner_);
    Team::run([&](Team& team) {
      std::vector<float> own(std::max(size_, width));
      attended_in_.fill(team, [&](int64_t row) {
        from.read(row, own.data());
        return own.data();
      });
      matmul(team, layer.out, attended_in_, added_to(middle));
      hidden_in_.fill(team, [&](int64_t row) {
        std::memcpy(next.data + row * size_, middle.data + row * size_, size_ * sizeof(float));
        rms_norm(middle.data + row * size_, layer.mlp_norm, epsilon_, own.data());
        return own.data();
      });
      matmul(team, layer.gate_up, hidden_in_, [&](int64_t tile, int64_t row, int64_t column, const float* sums) {
        gate_up.each(row, column, sums, [](Vec, Vec sum) { return sum; });
        float part[kLanes];
        store(part, swiglu(load(sums), load(sums + kLanes)));
        gated_in_.put_part(tile, row, column / 2, part);
      });
      matmul(team, layer.down, gated_in_, added_to(next));
    });
    return out;
  }

  Tensors behind_attention_backward(int64_t index, const at::Tensor& middle, const at::Tensor& gate_up,
                                    const at::Tensor& gradient, int64_t batch) override {
    const Layer& layer = layer_at(index);
    const int64_t rows = check_rows(middle, batch), width = heads_ * dim_;
    TORCH_CHECK(check_rows(gradient, batch) == rows, "one gradient for every row");
    TORCH_CHECK(gate_up.is_cpu() && gate_up.is_contiguous() && gate_up.scalar_type() == at::kFloat &&
                    gate_up.numel() == rows * 2 * gated(),
                "gate_up as it was returned");
    const Tensors out = {gradient.clone(), heads(batch, heads_, rows)};
    const Rows residual{out[0].data_ptr<float>(), size_};
    const Rows normed{buffer_.resize(rows * std::max(size_, width)), size_}, attended{normed.data, width};
    const Heads<T> to(out[1], dim_);
    const float *passed = gate_up.const_data_ptr<float>(), *x = middle.const_data_ptr<float>();
    hidden_in_.resize(rows, size_);
    gate_up_in_.resize(rows, 2 * gated());
    Team::run([&](Team& team) {
      std::vector<float> own(size_);
      hidden_in_.fill(team, [&](int64_t row) { return residual.data + row * size_; });
      matmul(team, layer.down_back, hidden_in_, [&](int64_t tile, int64_t row, int64_t column, const float* sums) {
        for (int64_t first = column; first < std::min(column + kColumns, gated()); first += kLanes) {
          const float* at = passed + row * 2 * gated() + 2 * first;
          const auto [gate, up] = swiglu_backward(load(at), load(at + kLanes), load(sums + first - column));
          float part[kLanes];
          store(part, gate);
          gate_up_in_.put_part(tile, row, 2 * first, part);
          store(part, up);
          gate_up_in_.put_part(tile, row, 2 * first + kLanes, part);
        }
      });
      matmul(team, layer.gate_up_back, gate_up_in_, written_to(normed));
      hidden_in_.fill(team, [&](int64_t row) {
        rms_norm_backward(x + row * size_, layer.mlp_norm, epsilon_, normed.data + row * size_, own.data());
        float* sum = residual.data + row * size_;
        for (int64_t i = 0; i < size_; ++i)
          sum[i] += own[i];
        return sum;
      });
      matmul(team, layer.out_back, hidden_in_, written_to(attended));
      team.for_each(rows, [&](int64_t row) { to.write(row, attended.data + row * width); });
    });
    return out;
  }

 private:
  struct Layer : PackedLayer<W> {
    Packed<W> qkv_back, out_back, gate_up_back, down_back;  // transposed
  };

  int64_t gated() const { return round_up(inner_, kLanes); }

  const Layer& layer_at(int64_t index) const {
    TORCH_CHECK(0 <= index && index < int64_t(layers_.size()), "there is no such layer");
    return *layers_[index];
  }
  int64_t check_rows(const at::Tensor& x, int64_t batch) const {
    TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == at::kFloat && x.dim() == 2 && x.size(1) == size_,
                "inputs must be contiguous float32 [rows, hidden_size]");
    TORCH_CHECK(batch > 0 && x.size(0) % batch == 0, "rows must be a multiple of the batch");
    return x.size(0);
  }
  void check_rotary(const at::Tensor& cosines, const at::Tensor& sines, int64_t rows) const {
    for (const at::Tensor& t : {cosines, sines})
      TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == at::kFloat && t.numel() == rows * dim_ / 2,
                  "cosines and sines must be contiguous float32 [rows, head_dim / 2]");
  }
  void check_heads(const at::Tensor& x, int64_t batch, int64_t heads, int64_t rows) const {
    TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == c10::CppTypeToScalarType<T>::value &&
                    x.sizes() == at::IntArrayRef({batch, heads, rows / batch, dim_}),
                "heads must be contiguous [batch, heads, tokens, head_dim], in the model's dtype");
  }
  at::Tensor heads(int64_t batch, int64_t count, int64_t rows) const {
    return at::empty({batch, count, rows / batch, dim_}, c10::CppTypeToScalarType<T>::value);
  }

  void turn(const float* from, int64_t count, const at::Tensor& cosines, const at::Tensor& sines, int64_t row,
            float* to) const {
    const int64_t first = row * dim_ / 2;
    for (int64_t h = 0; h < count; ++h)
      rotate(from + h * dim_, {}, 0, cosines.const_data_ptr<float>() + first, sines.const_data_ptr<float>() + first,
             dim_ / 2, dim_, to + h * dim_);
  }

  const int64_t heads_, kv_heads_, dim_;
  const float epsilon_;
  int64_t size_ = 0, inner_ = 0;
  Arena arena_;
  std::vector<std::unique_ptr<Layer>> layers_;
  // Working memory, kept for the next call.
  Buffer<float> buffer_;
  Activations<W> hidden_in_, qkv_in_, attended_in_, gated_in_, gate_up_in_;
};

c10::intrusive_ptr<LayersBase> make_layers(int64_t weights, int64_t heads, int64_t kv_heads, int64_t dim,
                                           double epsilon) {
  return in_format(weights, [&](auto w, auto t) -> c10::intrusive_ptr<LayersBase> {
    return c10::make_intrusive<Layers<decltype(w), decltype(t)>>(heads, kv_heads, dim, epsilon);
  });
}

}  // namespace
}  // namespace softbatch

TORCH_LIBRARY_FRAGMENT(softbatch, m) {
  using softbatch::LayersBase;
  m.class_<LayersBase>("Layers")
      .def(torch::init(&softbatch::make_layers))
      .def("add_layer", &LayersBase::add_layer)
      .def("into_attention", &LayersBase::into_attention)
      .def("into_attention_backward", &LayersBase::into_attention_backward)
      .def("behind_attention", &LayersBase::behind_attention)
      .def("behind_attention_backward", &LayersBase::behind_attention_backward);
}
