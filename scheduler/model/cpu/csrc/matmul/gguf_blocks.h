// Weights as GGUF files hold them: rows of blocks, whose numbers are small integers with a scale of their own.
//
// All kinds say the same in other bytes: value = scale * (number - zero) + minimum, with one scale for 16 or 32 inputs.
// Scales and minimums are float16, or in the K kinds integers times a float16 for 256 inputs, or in MXFP4 exponents.
// Every product of these is exact in float32, so a value is rounded once, where its minimum is added.

#pragma once

#include <c10/util/Exception.h>

#include <array>
#include <cstdint>
#include <cstring>

#include "matmul/block_codes.h"
#include "simd/vector.h"

namespace softbatch {

constexpr int kBlockGroup = 32;       // inputs that are taken apart together
constexpr int kGroupsOfSuperblock = 8;  // of the K kinds

// A kind of blocks, by its number in GGUF.
struct BlockFormat {
  const char* name;
  int64_t kind;
  int64_t inputs, bytes;  // of a block
  int bits, zero;
  bool in_superblocks;    // scales are integers times another scale
  bool has_minimum;
  bool has_half_groups;   // a scale for every 16 inputs, not 32
  bool has_codes = false;  // numbers are codes, and scales exponents (block_codes.h)
};

inline constexpr std::array<BlockFormat, 9> kBlockFormats{{
    {"Q4_0", 2, 32, 18, 4, 8, false, false, false},
    {"Q4_1", 3, 32, 20, 4, 0, false, true, false},
    {"Q5_0", 6, 32, 22, 5, 16, false, false, false},
    {"Q5_1", 7, 32, 24, 5, 0, false, true, false},
    {"Q8_0", 8, 32, 34, 8, 128, false, false, false},
    {"Q4_K", 12, 256, 144, 4, 0, true, true, false},
    {"Q5_K", 13, 256, 176, 5, 0, true, true, false},
    {"Q6_K", 14, 256, 210, 6, 32, true, false, true},
    {"MXFP4", 39, 32, 17, 4, BlockCodes::kZero, false, false, false, true},
}};

inline const BlockFormat& block_format_of(int64_t kind) {
  for (const BlockFormat& format : kBlockFormats)
    if (format.kind == kind) return format;
  TORCH_CHECK(false, "no known kind of blocks has the number ", kind);
}

INLINE float from_half(uint16_t bits) {
  at::Half h;
  std::memcpy(&h, &bits, sizeof h);
  return h;
}

// A group of a row. `scale` and `minimum` are float16; where there are superblocks, they are multiplied by the integers.
// Where there are codes, `numbers` are these, and `scale` is the exponent.
struct BlockGroup {
  uint8_t numbers[kBlockGroup];
  uint16_t scale, minimum;
  int8_t scales[2];
  uint8_t minimums;

  int number_of(const BlockFormat& format, int i) const {
    return format.has_codes ? BlockCodes::kNumbers[numbers[i]] : numbers[i];
  }
  float scale_of(const BlockFormat& format, int part) const {
    if (format.has_codes) return BlockCodes::half_scale(static_cast<uint8_t>(scale));
    return format.in_superblocks ? from_half(scale) * static_cast<float>(scales[part]) : from_half(scale);
  }
  float minimum_of(const BlockFormat& format) const {
    if (!format.has_minimum) return 0;
    return format.in_superblocks ? from_half(minimum) * static_cast<float>(minimums) : from_half(minimum);
  }
};

namespace blocks {

INLINE uint16_t half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

// Q4 and Q5 without superblocks: 16 bytes whose upper halves are the last 16 numbers.
INLINE void read_nibbles(const uint8_t* from, const uint8_t* high_bits, uint8_t* to) {
  uint32_t high = 0;
  if (high_bits) std::memcpy(&high, high_bits, sizeof high);
  for (int i = 0; i < kBlockGroup; ++i)
    to[i] = (from[i % 16] >> (i < 16 ? 0 : 4) & 0xf) | (high >> i & 1) << 4;
}

// Scales and minimums of Q4_K and Q5_K: six bits each in twelve bytes.
INLINE void read_scales(const uint8_t* s, int g, BlockGroup& to) {
  const bool early = g < 4;
  to.scales[0] = early ? s[g] & 63 : (s[g + 4] & 0xf) | (s[g - 4] >> 6) << 4;
  to.scales[1] = to.scales[0];
  to.minimums = early ? s[g + 4] & 63 : s[g + 4] >> 4 | (s[g] >> 6) << 4;
}

INLINE void read_4k_5k(const uint8_t* block, int g, bool five, BlockGroup& to) {
  constexpr uint16_t kMinus = 0x8000;  // these minimums are subtracted
  to.scale = half_at(block);
  to.minimum = half_at(block + 2) ^ kMinus;
  read_scales(block + 4, g, to);
  const uint8_t *high = block + 16, *low = high + (five ? 32 : 0) + g / 2 * 32;
  for (int i = 0; i < kBlockGroup; ++i)
    to.numbers[i] = (low[i] >> g % 2 * 4 & 0xf) | (five ? (high[i] >> g & 1) << 4 : 0);
}

INLINE void read_6k(const uint8_t* block, int g, BlockGroup& to) {
  const uint8_t *low = block + g / 4 * 64 + g % 2 * 32, *high = block + 128 + g / 4 * 32;
  for (int i = 0; i < kBlockGroup; ++i)
    to.numbers[i] = (low[i] >> g % 4 / 2 * 4 & 0xf) | (high[i] >> g % 4 * 2 & 3) << 4;
  std::memcpy(to.scales, block + 192 + 2 * g, 2);
  to.scale = half_at(block + 208);
}

}  // namespace blocks

// Takes group `g` of a row apart.
INLINE void read_group(const uint8_t* row, const BlockFormat& format, int64_t g, BlockGroup& to) {
  const uint8_t* block = row + g * kBlockGroup / format.inputs * format.bytes;
  const int within = g % kGroupsOfSuperblock;
  switch (format.kind) {
    case 12:
    case 13:
      return blocks::read_4k_5k(block, within, format.bits == 5, to);
    case 14:
      return blocks::read_6k(block, within, to);
    case 8:
      to.scale = blocks::half_at(block);
      for (int i = 0; i < kBlockGroup; ++i)
        to.numbers[i] = block[2 + i] ^ 0x80;
      return;
    case 39:
      to.scale = block[0];
      return blocks::read_nibbles(block + 1, nullptr, to.numbers);
    default:
      to.scale = blocks::half_at(block);
      const uint8_t* behind = block + 2;
      if (format.has_minimum) {
        to.minimum = blocks::half_at(behind);
        behind += 2;
      }
      const bool five = format.bits == 5;
      return blocks::read_nibbles(behind + (five ? 4 : 0), five ? behind : nullptr, to.numbers);
  }
}

// The values of a row [inputs], as GGUF's own reference has them bit for bit.
inline void dequantize_row(const uint8_t* row, const BlockFormat& format, int64_t inputs, float* to) {
  BlockGroup group{};
  for (int64_t g = 0; g < inputs / kBlockGroup; ++g, to += kBlockGroup) {
    read_group(row, format, g, group);
    const float minimum = group.minimum_of(format), scales[2] = {group.scale_of(format, 0), group.scale_of(format, 1)};
    for (int i = 0; i < kBlockGroup; ++i) {
      const float value = scales[i / 16] * static_cast<float>(group.number_of(format, i) - format.zero);
      to[i] = format.has_minimum ? value + minimum : value;
    }
  }
}

}  // namespace softbatch
