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

  struct OpenGroup {
    float scales[2][kColumns];  // of either half
    float minimum[kColumns];
    uint8_t numbers[kVectors * kVectorBytes];
  };

  // What a panel begins with.
  struct alignas(64) Head {
    int bits, zero;
    bool is_open, in_superblocks, has_minimum, has_half_groups, has_codes;

    int64_t superblock_bytes() const { return in_superblocks ? scale_bytes(2) : 0; }
    int64_t group_bytes() const {
      if (is_open) return sizeof(OpenGroup);
      const int64_t plain = scale_bytes(has_codes ? 1 : 2);
      const int64_t scales = in_superblocks ? scale_bytes(1) + (has_half_groups ? kColumns : 0) : plain;
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
      if (format && first && format != first) return {8, 128, true, false, true, true, false};
      if (format) first = format;
    }
    if (!first) first = &kBlockFormats.front();
    return {first->bits,        first->zero,            false,           first->in_superblocks,
            first->has_minimum, first->has_half_groups, first->has_codes};
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
        for (int i = 0; i < kBlockGroup; ++i) {
          const int number = format && head.is_open ? groups[c].number_of(*format, i) : groups[c].numbers[i];
          open.numbers[(i / 4 * kColumns + c) * 4 + i % 4] = static_cast<uint8_t>(number + shift);
        }
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

  static INLINE void load_both(const float* from, Vec (&to)[2]) {
    to[0] = load(from);
    to[1] = load(from + kLanes);
  }

  // What code for a panel is compiled for: the bits of a number, whether a group's halves have scales of their own,
  // whether there is a minimum, whether it is open, whether there are codes.
  template <int BitsEach, bool HalfGroups, bool Minimum, bool Open = false, bool Codes = false>
  struct Kind {
    static constexpr int kBits = BitsEach, kParts = HalfGroups ? 2 : 1;
    static constexpr bool kHasMinimum = Minimum, kIsOpen = Open, kHasCodes = Codes;
    static constexpr int kZero = Codes ? BlockCodes::kZero : Minimum && !Open ? 0 : 1 << (BitsEach - 1);
  };

  static constexpr bool kinds_fit() {
    for (const BlockFormat& format : kBlockFormats) {
      const bool has_halves = format.bits == 6;
      if (format.has_codes) {
        if (format.bits != 4 || format.has_minimum || format.in_superblocks) return false;
        continue;
      }
      if (format.zero != (format.has_minimum ? 0 : 1 << (format.bits - 1))) return false;
      if (format.has_half_groups != has_halves || (has_halves && !format.in_superblocks)) return false;
      if (format.has_minimum && format.bits > 5) return false;
    }
    return true;
  }

  // Calls f with the kind of a panel.
  template <typename F>
  static INLINE void with_kind(const Head& head, const F& f) {
    if (head.is_open) return f(Kind<8, true, true, true>{});
    if (head.has_codes) return f(Kind<4, false, false, false, true>{});
    if (head.bits == 4) return head.has_minimum ? f(Kind<4, false, true>{}) : f(Kind<4, false, false>{});
    if (head.bits == 5) return head.has_minimum ? f(Kind<5, false, true>{}) : f(Kind<5, false, false>{});
    if (head.bits == 6) return f(Kind<6, true, false>{});
    return f(Kind<8, false, false>{});
  }

  // Of a group.
  template <typename K>
  struct Scales {
    Vec scales[K::kParts][2], minimum[2];
  };

  // Reads one group after another.
  template <typename K>
  class Reader {
   public:
    INLINE explicit Reader(const char* panel)
        : in_superblocks_(reinterpret_cast<const Head*>(panel)->in_superblocks), at_(panel + sizeof(Head)) {}

    // put(v, numbers) takes vector `v` of the group's numbers, a constant.
    template <typename F>
    INLINE void next(Scales<K>& scales, const F& put) {
      if constexpr (K::kIsOpen) {
        const OpenGroup& group = *reinterpret_cast<const OpenGroup*>(at_);
        load_both(group.scales[0], scales.scales[0]);
        load_both(group.scales[1], scales.scales[1]);
        load_both(group.minimum, scales.minimum);
        open_numbers<8>(group.numbers, put);
        at_ += sizeof group;
      } else {
        if constexpr (K::kHasCodes) {
          open_exponents(scales);
        } else if (K::kParts == 2 || in_superblocks_) {
          open_integer_scales(scales);
        } else {
          open_scales(scales);
        }
        open_numbers<K::kBits>(reinterpret_cast<const uint8_t*>(at_), [&](auto v, Bits found) ALWAYS_INLINE {
          put(v, K::kHasCodes ? BlockCodes::numbers(found) : found);
        });
        at_ += kVectors * kVectorBytes * K::kBits / 8;
      }
    }

   private:
    INLINE void open_exponents(Scales<K>& to) {
      to.scales[0][0] = BlockCodes::half_scales((Bits)widened(at_) & 0xff);
      to.scales[0][1] = BlockCodes::half_scales((Bits)widened(at_ + kLanes) & 0xff);
      at_ += kColumns;
    }
    INLINE void open_scales(Scales<K>& to) {
      convert_halves(at_, to.scales[0]);
      at_ += 2 * kColumns;
      if constexpr (!K::kHasMinimum) return;
      convert_halves(at_, to.minimum);
      at_ += 2 * kColumns;
    }
    INLINE void open_integer_scales(Scales<K>& to) {
      if (group_++ % kGroupsOfSuperblock == 0) {
        convert_halves(at_, scale_);
        at_ += 2 * kColumns;
        if constexpr (K::kHasMinimum) {
          convert_halves(at_, minimum_);
          at_ += 2 * kColumns;
        }
      }
      unrolled<K::kParts>([&](auto part) ALWAYS_INLINE {
        scale_integers(scale_, at_, to.scales[part]);
        at_ += kColumns;
      });
      if constexpr (!K::kHasMinimum) return;
      scale_integers(minimum_, at_, to.minimum);  // they are below 64
      at_ += kColumns;
    }

    const bool in_superblocks_;
    const char* at_;
    int64_t group_ = 0;
    Vec scale_[2] = {}, minimum_[2] = {};  // of the superblock
  };

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
    } else if (head.has_codes) {
      for (int c = 0; c < kColumns; ++c)
        *to++ = static_cast<char>(groups[c].scale);
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

  template <int kBits, typename F>
  static INLINE void open_numbers(const uint8_t* from, const F& put) {
    constexpr int kHalf = kVectors / 2, kAbove = kBits - 4, kEach = kAbove > 0 ? 8 / kAbove : 1;
    constexpr uint32_t kLow = 0x0f0f0f0f, kHigh = kAbove == 2 ? 0x30303030 : 0x10101010;
    const uint8_t* above = from + kHalf * kVectorBytes;
    unrolled<kVectors>([&](auto v) ALWAYS_INLINE {
      if constexpr (kBits == 8) {
        put(v, bits_at(from + v * kVectorBytes));
      } else {
        const Bits two = bits_at(from + v % kHalf * kVectorBytes);
        Bits found = (v < kHalf ? two : two >> 4) & kLow;
        if constexpr (kAbove > 0) {
          const Bits high = bits_at(above + v / kEach * kVectorBytes);
          constexpr int shift = v % kEach * kAbove - 4;
          found |= (shift < 0 ? high << std::max(-shift, 0) : high >> std::max(shift, 0)) & kHigh;
        }
        put(v, found);
      }
    });
  }

  static INLINE Bits bits_at(const uint8_t* p) {
    Bits v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  static INLINE void convert_halves(const char* from, Vec (&to)[2]) {
    unrolled<2>([&](auto half) ALWAYS_INLINE {
#if defined(__AVX512F__)
      to[half] = (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + half));
#else
      to[half] = load(reinterpret_cast<const at::Half*>(from) + half * kLanes);
#endif
    });
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

  static INLINE void scale_integers(const Vec (&scales)[2], const char* from, Vec (&to)[2]) {
    to[0] = scales[0] * __builtin_convertvector(widened(from), Vec);
    to[1] = scales[1] * __builtin_convertvector(widened(from + kLanes), Vec);
  }
};

static_assert(BlockGroups::kinds_fit(), "a panel's kind must follow from its bits and whether it has a minimum");

}  // namespace softbatch
