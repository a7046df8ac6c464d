// The objective of training, from last hidden states: projections, both distributions and the gradient. It takes a few
// positions at a time, so that logits need little memory.
//
// The formulas are those of prompt_store/compression/objectives.py. With t and s the teacher's and the student's
// distribution, the loss is alpha * -log s(gold) + (1 - alpha) * KL(t || s); its gradient in the student's logits
// s - alpha * [gold] - (1 - alpha) * t.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "matmul/weights.h"
#include "matmul/row_ops.h"

namespace softbatch {

class ObjectiveBase : public torch::CustomClassHolder {
 public:
  virtual std::tuple<at::Tensor, at::Tensor> mean(const at::Tensor& student, const OptionalTensor& teacher,
                                                  const at::Tensor& gold, double alpha) = 0;
};

namespace {

constexpr int64_t kPositions = 4 * kTile;  // at once

// A row of logits, minus their largest, in units of log 2; returns log2 of the sum of their powers of 2.
inline float centre(float* logits, int64_t count) {
  Vec top = fill(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    top = max(top, load(logits + i));
  float most = largest(top);
  for (; i < count; ++i)
    most = std::max(most, logits[i]);
  Vec total = {};
  float rest = 0;
  for (i = 0; i + kLanes <= count; i += kLanes) {
    const Vec x = (load(logits + i) - most) * kLog2e;
    store(logits + i, x);
    total += exp2(x);
  }
  for (; i < count; ++i) {
    logits[i] = (logits[i] - most) * kLog2e;
    rest += std::exp2(logits[i]);
  }
  return std::log2(sum(total) + rest);
}

template <typename W, typename T>
class Objective final : public ObjectiveBase {
 public:
  Objective(const at::Tensor& weight, const OptionalTensor& bias) : vocab_(weight.size(0)), size_(weight.size(1)) {
    stack(arena_, head_, {{weight}}, {bias});
    stack(arena_, back_, {{weight.t().contiguous()}}, {std::nullopt});
  }

  // The mean over positions, and its gradient in the student's states, float32 [positions, hidden].
  std::tuple<at::Tensor, at::Tensor> mean(const at::Tensor& student, const OptionalTensor& teacher,
                                          const at::Tensor& gold, double alpha) override {
    const int64_t positions = student.size(0);
    for (const OptionalTensor& states : {OptionalTensor(student), teacher})
      TORCH_CHECK(!states || (states->is_cpu() && states->is_contiguous() &&
                              states->scalar_type() == c10::CppTypeToScalarType<T>::value &&
                              states->sizes() == at::IntArrayRef({positions, size_})),
                  "states must be contiguous [positions, hidden], in the model's dtype");
    TORCH_CHECK(gold.is_cpu() && gold.is_contiguous() && gold.scalar_type() == at::kLong &&
                    gold.numel() == positions && positions > 0,
                "gold must be int64 [positions]");
    const int64_t* label = gold.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < positions; ++i)
      TORCH_CHECK(0 <= label[i] && label[i] < vocab_, "gold must be of the vocabulary");
    TORCH_CHECK(teacher || alpha == 1, "the teacher's states must be given");
    const T* of_teacher = teacher ? teacher->const_data_ptr<T>() : nullptr;
    const at::Tensor out = at::empty({positions, size_}, at::kFloat);
    std::vector<double> losses(positions);
    for (int64_t first = 0; first < positions; first += kPositions) {
      const int64_t count = std::min(kPositions, positions - first);
      part(count, student.const_data_ptr<T>() + first * size_, of_teacher ? of_teacher + first * size_ : nullptr,
           label + first, static_cast<float>(alpha), 1.0f / positions, losses.data() + first,
           out.data_ptr<float>() + first * size_);
    }
    double total = 0;
    for (double loss : losses)
      total += loss;
    return {at::scalar_tensor(total / positions, at::kFloat), out};
  }

 private:
  void part(int64_t count, const T* student, const T* teacher, const int64_t* gold, float alpha, float weight,
            double* losses, float* gradient) {
    const Rows logits{logits_.resize((teacher ? 2 : 1) * count * vocab_), vocab_}, out{gradient, size_};
    states_in_.resize((teacher ? 2 : 1) * count, size_);
    residual_in_.resize(count, vocab_);
    Team::run([&](Team& team) {
      std::vector<float> own(size_);
      states_in_.fill(team, [&](int64_t row) {
        widen_row(row < count ? student + row * size_ : teacher + (row - count) * size_, size_, own.data());
        return own.data();
      });
      matmul(team, head_, states_in_, written_to(logits));
      team.for_each(count, [&](int64_t row) {
        float* s = logits.data + row * vocab_;
        losses[row] = residual(s, teacher ? s + count * vocab_ : nullptr, gold[row], alpha);
      });
      residual_in_.fill(team, [&](int64_t row) { return logits.data + row * vocab_; });
      matmul(team, back_, residual_in_, [&](int64_t, int64_t row, int64_t column, const float* sums) {
        out.each(row, column, sums, [&](Vec, Vec sum) { return sum * weight; });
      });
    });
  }

  // Turns the student's logits into the loss's gradient in them; returns the loss.
  double residual(float* s, float* t, int64_t gold, float alpha) const {
    constexpr double kLog2 = 0.6931471805599453;
    const float log_s = centre(s, vocab_), log_t = t ? centre(t, vocab_) : 0.0f;
    const double nll = kLog2 * (log_s - s[gold]);
    const float share = t ? 1 - alpha : 0.0f;
    Vec kl = {};
    double rest = 0;
    int64_t i = 0;
    for (; i + kLanes <= vocab_; i += kLanes) {
      const Vec own = load(s + i) - log_s;
      Vec residual = exp2(min_zero(own));
      if (t) {
        const Vec other = load(t + i) - log_t, p = exp2(min_zero(other));
        kl += p * (other - own);
        residual -= share * p;
      }
      store(s + i, residual);
    }
    for (; i < vocab_; ++i) {
      const float own = s[i] - log_s;
      s[i] = std::exp2(own);
      if (!t) continue;
      const float other = t[i] - log_t, p = std::exp2(other);
      rest += p * (other - own);
      s[i] -= share * p;
    }
    s[gold] -= alpha;
    return alpha * nll + share * kLog2 * (sum(kl) + rest);
  }

  const int64_t vocab_, size_;
  Arena arena_;
  Packed<W> head_, back_;
  Buffer<float> logits_;
  Activations<W> states_in_, residual_in_;
};

c10::intrusive_ptr<ObjectiveBase> make_objective(int64_t weights, const at::Tensor& weight,
                                                 const OptionalTensor& bias) {
  return in_format(weights, [&](auto w, auto t) -> c10::intrusive_ptr<ObjectiveBase> {
    return c10::make_intrusive<Objective<decltype(w), decltype(t)>>(weight, bias);
  });
}

}  // namespace
}  // namespace softbatch

TORCH_LIBRARY_FRAGMENT(softbatch, m) {
  m.class_<softbatch::ObjectiveBase>("Objective")
      .def(torch::init(&softbatch::make_objective))
      .def("mean", &softbatch::ObjectiveBase::mean);
}
