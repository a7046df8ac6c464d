// The experts of a model's layers: gated MLPs of which each token takes a few, with GGUF's blocks as weights.

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "matmul/row_ops.h"
#include "matmul/weights.h"

namespace softbatch {
namespace {

// A token that takes an expert, and what that is multiplied by.
struct Share {
  int64_t token;
  float weight;
};

}  // namespace

class Experts final : public torch::CustomClassHolder {
 public:
  using Named = c10::Dict<std::string, at::Tensor>;

  // The gate is x * sigmoid(alpha * x) of x up to `limit`, and is multiplied by 1 + the up projection within `limit`.
  Experts(int64_t hidden_size, int64_t intermediate_size, double alpha, double limit)
      : size_(hidden_size), inner_(intermediate_size), alpha_(static_cast<float>(alpha)),
        limit_(static_cast<float>(limit)) {
    TORCH_CHECK(size_ > 0 && inner_ > 0, "experts must have sizes");
  }

  // The next expert of layer `layer`, the one before it or a new one. Matrices gate, up and down are blocks of `kind`.
  void add(int64_t layer, const Named& named, int64_t kind) {
    TORCH_CHECK(layer == int64_t(layers_.size()) || layer + 1 == int64_t(layers_.size()), "layers come in their order");
    const auto matrix = [&](const char* name, int64_t outputs, int64_t inputs) {
      const LoadedMatrix found{named.at(name), &block_format_of(kind)};
      check_shape(found, outputs, inputs);
      return found;
    };
    Expert expert;
    interleave(arena_, expert.gate_up, matrix("gate", inner_, size_), matrix("up", inner_, size_),
               named.at("gate_bias"), named.at("up_bias"));
    stack(arena_, expert.down, {matrix("down", size_, inner_)}, {named.at("down_bias")});
    if (layer == int64_t(layers_.size())) layers_.emplace_back();
    layers_.back().push_back(std::move(expert));
  }

  int64_t weight_bytes() const { return arena_.allocated(); }

  // [T, hidden_size] -> float32 of the same shape: the sum of the experts `chosen` [T, k] times `weights` [T, k].
  // Experts are added in their order, so a row's result does not depend on who shares its step.
  at::Tensor forward(int64_t layer, const at::Tensor& hidden, const at::Tensor& chosen, const at::Tensor& weights) {
    TORCH_CHECK(0 <= layer && layer < int64_t(layers_.size()), "there is no layer ", layer);
    TORCH_CHECK(hidden.dim() == 2 && hidden.size(1) == size_, "hidden must be [T, hidden_size]");
    TORCH_CHECK(chosen.dim() == 2 && chosen.size(0) == hidden.size(0) && chosen.sizes() == weights.sizes(),
                "each token must have its experts, and a weight for each");
    const std::vector<Expert>& experts = layers_[layer];
    const std::vector<std::vector<Share>> shares = shares_of(chosen, weights, experts.size());
    const at::Tensor from = hidden.to(at::kFloat).contiguous();
    const at::Tensor to = at::zeros({hidden.size(0), size_}, from.options());
    const float* rows = from.const_data_ptr<float>();
    const Rows out{to.data_ptr<float>(), size_};
    size_t most = 0;
    for (const std::vector<Share>& each : shares)
      most = std::max(most, each.size());
    make_room(most);  // here, where a lack of memory is an error, and not the end of the process
    Team::run([&](Team& team) {
      for (size_t i = 0; i < experts.size(); ++i)
        if (!shares[i].empty()) add_expert(team, experts[i], shares[i], rows, out);
    });
    return to;
  }

 private:
  struct Expert {
    Packed<Blocks> gate_up, down;
  };

  static std::vector<std::vector<Share>> shares_of(const at::Tensor& chosen, const at::Tensor& weights, size_t experts) {
    const at::Tensor numbers = chosen.to(at::kLong).contiguous(), factors = weights.to(at::kFloat).contiguous();
    const int64_t *number = numbers.const_data_ptr<int64_t>(), each = chosen.size(1);
    std::vector<std::vector<Share>> shares(experts);
    for (int64_t i = 0; i < chosen.numel(); ++i) {
      TORCH_CHECK(0 <= number[i] && number[i] < int64_t(experts), "there is no expert ", number[i]);
      shares[number[i]].push_back({i / each, factors.const_data_ptr<float>()[i]});
    }
    return shares;
  }

  void make_room(int64_t rows) {
    hidden_.resize(rows, size_);
    gated_.resize(rows, inner_);
    gate_.resize(rows * inner_);
  }

  // The members of a team run this together, and meet behind every loop.
  void add_expert(Team& team, const Expert& expert, const std::vector<Share>& shares, const float* rows,
                  const Rows& out) {
    team.for_each(1, [&](int64_t) { make_room(shares.size()); });
    hidden_.fill(team, [&](int64_t row) { return rows + shares[row].token * size_; });
    matmul(team, expert.gate_up, hidden_, [&](int64_t, int64_t row, int64_t column, const float* sums) {
      float part[kLanes];
      store(part, gate(load(sums), load(sums + kLanes)));
      const int64_t first = column / 2;
      std::copy_n(part, std::min<int64_t>(kLanes, inner_ - first), gate_.data() + row * inner_ + first);
    });
    gated_.fill(team, [&](int64_t row) { return gate_.data() + row * inner_; });
    matmul(team, expert.down, gated_, [&](int64_t, int64_t row, int64_t column, const float* sums) {
      const float weight = shares[row].weight;
      out.each(shares[row].token, column, sums, [weight](Vec old, Vec sum) { return old + sum * weight; });
    });
  }

  INLINE Vec gate(Vec gate, Vec up) const {
    const Vec most = fill(limit_);
    gate = gate > most ? most : gate;
    up = up > most ? most : up < -most ? -most : up;
    return gate * sigmoid(gate * alpha_) * (up + 1.0f);
  }

  const int64_t size_, inner_;
  const float alpha_, limit_;
  Arena arena_;
  std::vector<std::vector<Expert>> layers_;
  // Working memory of one expert, kept for the next.
  Activations<Blocks> hidden_, gated_;
  Buffer<float> gate_;
};

}  // namespace softbatch

TORCH_LIBRARY_FRAGMENT(softbatch, m) {
  using softbatch::Experts;
  m.class_<Experts>("Experts")
      .def(torch::init<int64_t, int64_t, double, double>())
      .def("add", &Experts::add)
      .def("weight_bytes", &Experts::weight_bytes)
      .def("forward", &Experts::forward);
}
