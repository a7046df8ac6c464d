// The decoder with GGUF's blocks as weights.

#include "llama/decoder.h"

namespace softbatch {

c10::intrusive_ptr<DecoderBase> make_block_decoder(const DecoderMaker& maker, at::ScalarType dtype) {
  return dtype == at::kFloat ? maker.make<Blocks, float>() : maker.make<Blocks, at::BFloat16>();
}

}  // namespace softbatch
