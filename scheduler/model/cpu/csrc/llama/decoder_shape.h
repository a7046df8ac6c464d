// What all layers of a decoder have in common, by name.

#pragma once

#include <ATen/core/Dict.h>

#include <string>

#include "attention/problem.h"

namespace softbatch {

// The numbers that description.py gives these names.
struct DecoderShape {
  using Named = c10::Dict<std::string, double>;

  int64_t heads, kv_heads, head_dim;
  float epsilon;           // of all norms
  float attention_scale;
  float softcap;           // of attention's scores; 0: none
  float embedding_scale;   // what inputs are multiplied by,
  float residual_scale;    // what a layer's parts are multiplied by before they are added to the residual stream,
  float logit_scale;       // and logits
  float logit_softcap;     // 0: none
  bool gelu;               // the gate's activation is GELU's tanh form, not SiLU

  explicit DecoderShape(const Named& named) {
    size_t known = 0;
    const auto take = [&](const char* name) {
      const auto found = named.find(name);
      TORCH_CHECK(found != named.end(), "a decoder must have the number ", name);
      ++known;
      return found->value();
    };
    heads = static_cast<int64_t>(take("heads"));
    kv_heads = static_cast<int64_t>(take("kv_heads"));
    head_dim = static_cast<int64_t>(take("head_dim"));
    epsilon = static_cast<float>(take("epsilon"));
    attention_scale = static_cast<float>(take("attention_scale"));
    softcap = static_cast<float>(take("softcap"));
    embedding_scale = static_cast<float>(take("embedding_scale"));
    residual_scale = static_cast<float>(take("residual_scale"));
    logit_scale = static_cast<float>(take("logit_scale"));
    logit_softcap = static_cast<float>(take("logit_softcap"));
    gelu = take("gelu") != 0;
    TORCH_CHECK(known == named.size(), "a decoder has numbers that these kernels do not know");
    TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of kv_heads");
  }
};

}  // namespace softbatch
