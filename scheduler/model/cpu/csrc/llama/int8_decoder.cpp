// The decoder with weights in 8 bits.

#include "llama/decoder.h"

namespace softbatch {

c10::intrusive_ptr<DecoderBase> make_int8_decoder(const DecoderMaker& maker, at::ScalarType dtype) {
  return dtype == at::kFloat ? maker.make<int8_t, float>() : maker.make<int8_t, at::BFloat16>();
}

}  // namespace softbatch
