// Which formats there are: a test compares them with Python's.

#include "formats.h"

#include <ATen/core/Dict.h>
#include <torch/library.h>

#include <string>

namespace softbatch {
namespace {

template <typename Formats>
c10::Dict<std::string, int64_t> numbers_of(const Formats& formats) {
  c10::Dict<std::string, int64_t> numbers;
  for (const auto& named : formats)
    numbers.insert(named.name, static_cast<int64_t>(named.format));
  return numbers;
}

c10::Dict<std::string, int64_t> weight_formats() { return numbers_of(kWeightFormats); }
c10::Dict<std::string, int64_t> kv_formats() { return numbers_of(kKvFormats); }

}  // namespace
}  // namespace softbatch

TORCH_LIBRARY_FRAGMENT(softbatch, m) {
  m.def("weight_formats() -> Dict(str, int)", &softbatch::weight_formats);
  m.def("kv_formats() -> Dict(str, int)", &softbatch::kv_formats);
}
