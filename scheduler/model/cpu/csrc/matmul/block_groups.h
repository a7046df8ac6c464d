// How a group of 32 inputs lies in a panel of GGUF's blocks: packed, in as many bytes as in the file, and opened for a
// product, with bytes for numbers and float32 for scales.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "matmul/gguf_blocks.h"
#include "matmul/panels.h"

namespace softbatch {

// A row of a weight matrix, or nothing.
struct BlockRow {
  const uint8_t* data = nullptr;
  const BlockFormat* format = nullptr;
};

struct BlockGroups {
  // An open group's bytes: for every four inputs two vectors, with the four of each output in a lane.
  static constexpr int kVectors = kBlockGroup / 2, kVectorBytes = 4 * kLanes;
  typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));

  struct Scales {
    float scales[2][kColumns];  // of either half; the first is for all if there are no half groups
    float minimum[kColumns];
  };
  struct OpenGroup : Scales {
    uint8_t numbers[kVectors * kVectorBytes];
  };

  // What a panel begins with.
  struct alignas(64) Head {
    int bits, zero;
    bool is_open, in_superblocks, has_minimum, has_half_groups;

    int64_t superblock_bytes() const { return in_superblocks ? scale_bytes(2) : 0; }
    int64_t group_bytes() const {
      if (is_open) return sizeof(OpenGroup);
      const int64_t scales = in_superblocks ? scale_bytes(1) + (has_half_groups ? kColumns : 0) : scale_bytes(2);
      return scales + kVectors * kVectorBytes * bits / 8;
    }
    int64_t panel_bytes(int64_t inputs) const {
      const int64_t groups = inputs / kBlockGroup;
      return sizeof(Head) + groups / kGroupsOfSuperblock * superblock_bytes() + groups * group_bytes();
    }

   private:
    int64_t scale_bytes(int64_t each) const { return each * kColumns * (has_minimum ? 2 : 1); }
  };

  // Rows of different kinds make an open panel.
  static Head head_of(const BlockRow* rows) {
    const BlockFormat* first = nullptr;
    for (int i = 0; i < kColumns; ++i) {
      const BlockFormat* format = rows[i].format;
      if (format && first && format != first) return {8, 128, true, false, true, true};
      if (format) first = format;
    }
    if (!first) first = &kBlockFormats.front();
    return {first->bits, first->zero, false, first->in_superblocks, first->has_minimum, first->has_half_groups};
  }

  static void pack(const Head& head, const BlockRow* rows, int64_t inputs, char* panel) {
    std::memcpy(panel, &head, sizeof head);
    char* to = panel + sizeof head;
    for (int64_t g = 0; g < inputs / kBlockGroup; ++g) {
      BlockGroup groups[kColumns] = {};
      OpenGroup open = {};
      for (int c = 0; c < kColumns; ++c) {
        const BlockFormat* format = rows[c].format;
        if (format) read_group(rows[c].data, *format, g, groups[c]);
        const int shift = format ? head.zero - format->zero : 0;
        for (int i = 0; i < kBlockGroup; ++i)
          open.numbers[(i / 4 * kColumns + c) * 4 + i % 4] = static_cast<uint8_t>(groups[c].numbers[i] + shift);
        if (!format || !head.is_open) continue;
        for (int part = 0; part < 2; ++part)
          open.scales[part][c] = groups[c].scale_of(*format, format->has_half_groups ? part : 0);
        open.minimum[c] = groups[c].minimum_of(*format);
      }
      if (head.is_open) {
        std::memcpy(to, &open, sizeof open);
      } else {
        if (head.in_superblocks && g % kGroupsOfSuperblock == 0) {
          put_halves(groups, head.has_minimum, to);
          to += head.superblock_bytes();
        }
        pack_group(head, groups, open, to);
      }
      to += head.group_bytes();
    }
  }

  // Reads one group after another.
  class Reader {
   public:
    INLINE explicit Reader(const char* panel) : head_(*reinterpret_cast<const Head*>(panel)), at_(panel + sizeof(Head)) {
      static_cast<Scales&>(open_) = {};
    }
    INLINE const Head& head() const { return head_; }

    // Its numbers may lie where they were.
    INLINE const uint8_t* next(const float*& scales, const float*& minimum) {
      if (head_.is_open) {
        const OpenGroup& group = *reinterpret_cast<const OpenGroup*>(at_);
        at_ += sizeof group;
        scales = group.scales[0];
        minimum = group.minimum;
        return group.numbers;
      }
      scales = open_.scales[0];
      minimum = open_.minimum;
      const char* numbers = head_.in_superblocks ? open_integer_scales() : open_scales();
      const uint8_t* from = reinterpret_cast<const uint8_t*>(numbers);
      at_ = numbers + kVectors * kVectorBytes * head_.bits / 8;
      if (head_.bits == 8) return from;
      if (head_.bits == 4) open_numbers<4>(from, open_.numbers);
      if (head_.bits == 5) open_numbers<5>(from, open_.numbers);
      if (head_.bits == 6) open_numbers<6>(from, open_.numbers);
      return open_.numbers;
    }

   private:
    INLINE const char* open_scales() {
      convert_halves(at_, open_.scales[0]);
      if (!head_.has_minimum) return at_ + 2 * kColumns;
      convert_halves(at_ + 2 * kColumns, open_.minimum);
      return at_ + 4 * kColumns;
    }
    INLINE const char* open_integer_scales() {
      if (group_++ % kGroupsOfSuperblock == 0) {
        convert_halves(at_, superblock_.scales[0]);
        if (head_.has_minimum) convert_halves(at_ + 2 * kColumns, superblock_.minimum);
        at_ += head_.superblock_bytes();
      }
      const char* from = at_;
      for (int part = 0; part < (head_.has_half_groups ? 2 : 1); ++part, from += kColumns)
        scale_integers(superblock_.scales[0], from, open_.scales[part]);
      if (!head_.has_minimum) return from;
      scale_integers(superblock_.minimum, from, open_.minimum);  // they are below 64
      return from + kColumns;
    }

    const Head head_;
    const char* at_;
    int64_t group_ = 0;
    alignas(64) OpenGroup open_;
    Scales superblock_;
  };

  static INLINE Bits bits_at(const uint8_t* p) {
    Bits v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

 private:
  static void put_halves(const BlockGroup* groups, bool has_minimum, char* to) {
    uint16_t halves[2 * kColumns];
    for (int c = 0; c < kColumns; ++c) {
      halves[c] = groups[c].scale;
      halves[kColumns + c] = groups[c].minimum;
    }
    std::memcpy(to, halves, sizeof halves / (has_minimum ? 1 : 2));
  }

  static void pack_group(const Head& head, const BlockGroup* groups, const OpenGroup& open, char* to) {
    if (head.in_superblocks) {
      for (int part = 0; part < (head.has_half_groups ? 2 : 1); ++part, to += kColumns)
        for (int c = 0; c < kColumns; ++c)
          to[c] = groups[c].scales[part];
      for (int c = 0; head.has_minimum && c < kColumns; ++c)
        *to++ = static_cast<char>(groups[c].minimums);
    } else {
      put_halves(groups, head.has_minimum, to);
      to += 2 * kColumns * (head.has_minimum ? 2 : 1);
    }
    // Vectors of half-bytes, each with one of the first and one of the last vectors of bytes; then the bits above those.
    constexpr int kHalf = kVectors / 2 * kVectorBytes;
    if (head.bits == 8) {
      std::memcpy(to, open.numbers, 2 * kHalf);
      return;
    }
    for (int i = 0; i < kHalf; ++i)
      to[i] = static_cast<char>((open.numbers[i] & 0xf) | open.numbers[kHalf + i] << 4);
    const int above = head.bits - 4, each = 8 / std::max(above, 1);
    for (int v = 0; above > 0 && v < kVectors; ++v)
      for (int i = 0; i < kVectorBytes; ++i) {
        char& byte = to[kHalf + v / each * kVectorBytes + i];
        const int high = open.numbers[v * kVectorBytes + i] >> 4 << v % each * above;
        byte = static_cast<char>(v % each == 0 ? high : byte | high);
      }
  }

  template <int kBits>
  static INLINE void open_numbers(const uint8_t* from, uint8_t* to) {
    constexpr int kHalf = kVectors / 2, kAbove = kBits - 4, kEach = kAbove > 0 ? 8 / kAbove : 1;
    constexpr uint32_t kLow = 0x0f0f0f0f, kHigh = kAbove == 2 ? 0x30303030 : 0x10101010;
    const uint8_t* above = from + kHalf * kVectorBytes;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const Bits two = bits_at(from + v % kHalf * kVectorBytes);
      Bits found = (v < kHalf ? two : two >> 4) & kLow;
      if constexpr (kAbove > 0) {
        const Bits high = bits_at(above + v / kEach * kVectorBytes);
        const int shift = v % kEach * kAbove - 4;
        found |= (shift < 0 ? high << -shift : high >> shift) & kHigh;
      }
      std::memcpy(to + v * kVectorBytes, &found, sizeof found);
    }
  }

  static INLINE void convert_halves(const char* from, float* to) {
    for (int c = 0; c < kColumns; c += kLanes) {
#if defined(__AVX512F__)
      store(to + c, (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * c))));
#else
      store(to + c, load(reinterpret_cast<const at::Half*>(from) + c));
#endif
    }
  }

  // GCC makes dozens of instructions of these two conversions.
  static INLINE Ints widened(const char* from) {
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepi8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bytes)));
#else
    return __builtin_convertvector(bytes, Ints);
#endif
  }

  static INLINE void scale_integers(const float* scales, const char* from, float* to) {
    for (int c = 0; c < kColumns; c += kLanes) {
      store(to + c, load(scales + c) * __builtin_convertvector(widened(from + c), Vec));
    }
  }
};

}  // namespace softbatch
