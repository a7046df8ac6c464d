// The formats of weights and of KV caches, by the numbers that cross to Python; formats.py beside csrc/ has the same.
//
// No number is both a weight format's and a KV format's, so a mix-up is refused.

#pragma once

#include <c10/util/Exception.h>

#include <array>
#include <cstdint>

namespace softbatch {

enum class WeightFormat : int64_t { kFloat32 = 1, kBfloat16 = 2, kBfloat16In12Bits = 3, kInt8 = 4, kGgufBlocks = 5 };

enum class KvFormat : int64_t { kPlain = 101, kInt8 = 102, kK6V4 = 103 };

template <typename E>
struct NamedFormat {
  const char* name;
  E format;
};

inline constexpr std::array<NamedFormat<WeightFormat>, 5> kWeightFormats{{
    {"float32", WeightFormat::kFloat32},
    {"bfloat16", WeightFormat::kBfloat16},
    {"bfloat16 in 12 bits", WeightFormat::kBfloat16In12Bits},
    {"int8", WeightFormat::kInt8},
    {"gguf blocks", WeightFormat::kGgufBlocks},
}};

inline constexpr std::array<NamedFormat<KvFormat>, 3> kKvFormats{{
    {"plain", KvFormat::kPlain},
    {"int8", KvFormat::kInt8},
    {"k6v4", KvFormat::kK6V4},
}};

template <typename Formats>
const auto& format_of(const Formats& formats, int64_t number) {
  for (const auto& named : formats)
    if (static_cast<int64_t>(named.format) == number) return named;
  TORCH_CHECK(false, "no such format has the number ", number);
}

inline const NamedFormat<WeightFormat>& weight_format_of(int64_t number) { return format_of(kWeightFormats, number); }
inline KvFormat kv_format_of(int64_t number) { return format_of(kKvFormats, number).format; }

}  // namespace softbatch
