// The decoder as Python sees it, and those whose weights are plain numbers.

#include "llama/decoder.h"

#include <torch/library.h>

namespace softbatch {
namespace {

c10::intrusive_ptr<DecoderBase> make_decoder(int64_t weights, at::ScalarType dtype, const DecoderShape::Named& shape,
                                             const at::Tensor& frequencies, const at::Tensor& rotary_scales,
                                             const OptionalTensor& long_frequencies, int64_t kv_format) {
  const DecoderMaker maker{DecoderShape(shape), frequencies, rotary_scales, long_frequencies, kv_format_of(kv_format)};
  const WeightFormat format = weight_format_of(weights).format;
  if (format == WeightFormat::kInt8) return make_int8_decoder(maker, dtype);
  if (format == WeightFormat::kGgufBlocks) return make_block_decoder(maker, dtype);
  return in_format(weights, [&](auto w, auto t) { return maker.make<decltype(w), decltype(t)>(); });
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
      .def("limit_windows", &DecoderBase::limit_windows)
      .def("set_head", &DecoderBase::set_head)
      .def("weight_bytes", &DecoderBase::weight_bytes)
      .def("forward", &DecoderBase::forward);
  m.def("has_12_bits() -> bool", &softbatch::has_12_bits);
}
