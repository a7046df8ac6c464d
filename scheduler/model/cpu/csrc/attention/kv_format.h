// Keys and values in fewer bits, for a cache that holds more tokens.
//
// A row is one head's key or value of one token, in groups of 32 numbers. Each group has its own scale.
//
// A few dimensions of keys are outliers, which would cost all others their precision. Every group of a key is therefore
// rotated by a Hadamard matrix, which spreads the outliers. Queries are rotated alike, so no product of the two changes
// (QuaRot, arXiv:2404.00456). Values have no such outliers, but need an offset (KIVI, arXiv:2402.02750).

#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "formats.h"
#include "simd/vector.h"

namespace softbatch {

constexpr int kKvGroup = 32;

INLINE Bits load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)  // GCC takes a conversion to numbers four times as wide apart
  return (Bits)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  uint8_t v __attribute__((vector_size(kLanes)));
  std::memcpy(&v, p, sizeof v);
  return widen(__builtin_convertvector(v, Short));
#endif
}

INLINE Bits lane_numbers() {
  Bits v = {};
  for (int i = 0; i < kLanes; ++i)
    v[i] = i;
  return v;
}

template <int W>
INLINE void hadamard(Vec* v) {
  constexpr int kVectors = kKvGroup / kLanes;
  if constexpr (W < kLanes) {
    const Vec sign = (lane_numbers() & W) != 0 ? fill(-1.0f) : fill(1.0f);
    for (int i = 0; i < kVectors; ++i)
      v[i] = v[i] * sign + swapped<W>(v[i]);
  } else {
    for (int i = 0; i < kVectors; ++i) {
      constexpr int kApart = W / kLanes;
      if (i & kApart) continue;
      const Vec a = v[i], b = v[i + kApart];
      v[i] = a + b;
      v[i + kApart] = a - b;
    }
  }
}

// Rotates every group of a row, in place. The rotation is its own inverse.
INLINE void hadamard_rotate(float* row, int64_t dim) {
  const float norm = 1.0f / std::sqrt(static_cast<float>(kKvGroup));
  for (int64_t g = 0; g < dim; g += kKvGroup) {
    Vec v[kKvGroup / kLanes];
    for (int i = 0; i < kKvGroup / kLanes; ++i)
      v[i] = load(row + g + i * kLanes) * norm;
    hadamard<1>(v);
    hadamard<2>(v);
    hadamard<4>(v);
    hadamard<8>(v);
    hadamard<16>(v);
    for (int i = 0; i < kKvGroup / kLanes; ++i)
      store(row + g + i * kLanes, v[i]);
  }
}

// Numbers as codes of kBits: code * scale + offset. Without kOffset the middle code stands for zero. In memory a group
// is its scale, its offset if it has one, then its codes. Of 4 and 6 bits the lower four come first (numbers i and 16 +
// i share a byte), then the upper two of 6.
template <int kBits, bool kOffset>
struct PackedRow {
  static_assert(kBits == 4 || kBits == 6 || kBits == 8);
  static constexpr int kHead = (kOffset ? 2 : 1) * sizeof(at::BFloat16);
  static constexpr int kGroupBytes = kHead + kKvGroup * kBits / 8;
  static constexpr float kMost = (1 << kBits) - 1, kZero = 1 << (kBits - 1);
  static constexpr float kLeast = 1e-30f;  // smaller ranges count as zero, so 1 / scale stays finite

  static int64_t bytes(int64_t dim) { return dim / kKvGroup * kGroupBytes; }

  static void encode(const float* row, int64_t dim, uint8_t* to) {
    for (int64_t g = 0; g < dim; g += kKvGroup, to += kGroupBytes)
      encode_group(row + g, to);
  }

  // The rows at `offsets`, `apart` numbers from one to the next. Prefetches as many rows at `ahead` unless it is null.
  template <typename T>
  static void decode(const uint8_t* rows, const int64_t* offsets, int64_t count, int64_t dim, int64_t apart, T* to,
                     const uint8_t* ahead, const int64_t* ahead_offsets) {
    const int64_t size = bytes(dim);
    for (int64_t i = 0; i < count; ++i, to += apart) {
      const uint8_t* from = rows + offsets[i] * size;
      for (int64_t b = 0; ahead && b < size; b += 64)
        __builtin_prefetch(ahead + ahead_offsets[i] * size + b);
      for (int64_t g = 0; g < dim; g += kKvGroup, from += kGroupBytes)
        decode_group(from, to + g);
    }
  }

 private:
  static INLINE void encode_group(const float* x, uint8_t* to) {
    Vec lowest = load(x), highest = load(x), nothing = {};
    for (int i = 0; i < kKvGroup; i += kLanes) {
      const Vec v = load(x + i);
      lowest = v < lowest ? v : lowest;
      highest = max(highest, v);
      nothing += v * 0.0f;  // NaN if a number is not finite, so that no finite number comes out
    }
    const float low = -largest(-lowest), high = largest(highest);
    const float width = kOffset ? (high - low) / kMost : std::max(high, -low) / (kZero - 1);
    const auto scale = static_cast<at::BFloat16>(width > kLeast ? width : 0.0f);
    const auto offset = static_cast<at::BFloat16>(low);
    const at::BFloat16 head[] = {static_cast<at::BFloat16>(static_cast<float>(scale) + sum(nothing)), offset};
    std::memcpy(to, head, kHead);
    to += kHead;
    const float inverse = static_cast<float>(scale) > 0 ? 1 / static_cast<float>(scale) : 0.0f;
    const float shift = kOffset ? 0.5f - static_cast<float>(offset) * inverse : kZero + 0.5f;
    uint32_t codes[kKvGroup];
    for (int i = 0; i < kKvGroup; i += kLanes) {
      Vec code = max(fill(0.0f), load(x + i) * inverse + shift);
      code = code < kMost ? code : fill(kMost);
      const Bits bits = __builtin_convertvector(code, Bits);
      std::memcpy(codes + i, &bits, sizeof bits);
    }
    if constexpr (kBits == 8) {
      for (int i = 0; i < kKvGroup; ++i)
        to[i] = static_cast<uint8_t>(codes[i]);
    } else {
      for (int i = 0; i < 16; ++i)
        to[i] = static_cast<uint8_t>((codes[i] & 15) | (codes[16 + i] & 15) << 4);
    }
    if constexpr (kBits == 6) {
      uint32_t upper[2] = {};
      for (int i = 0; i < kKvGroup; ++i)
        upper[i / 16] |= codes[i] >> 4 << 2 * (i % 16);
      std::memcpy(to + 16, upper, sizeof upper);
    }
  }

  template <typename T>
  static INLINE void decode_group(const uint8_t* from, T* to) {
    at::BFloat16 head[2];
    std::memcpy(head, from, kHead);
    const float scale = head[0], offset = kOffset ? static_cast<float>(head[1]) : -kZero * scale;
    from += kHead;
    for (int i = 0; i < kKvGroup; i += kLanes) {
      const int half = i / 16, at = i % 16;
      Bits code;
      if constexpr (kBits == 8) {
        code = load_bytes(from + i);
      } else {
        code = load_bytes(from + at) >> 4 * half & 15;
      }
      if constexpr (kBits == 6) {
        uint32_t upper;
        std::memcpy(&upper, from + 16 + half * sizeof upper, sizeof upper);
        code |= ((Bits{} + (upper >> 2 * at)) >> 2 * lane_numbers() & 3) << 4;
      }
      typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
      store(to + i, __builtin_convertvector((Ints)code, Vec) * scale + offset);
    }
  }
};

// How rows of one kind lie in a cache that packs them.
template <typename T>
struct RowCodec {
  int64_t bytes = 0;
  void (*encode)(const float* row, int64_t dim, uint8_t* to) = nullptr;
  void (*decode)(const uint8_t* rows, const int64_t* offsets, int64_t count, int64_t dim, int64_t apart, T* to,
                 const uint8_t* ahead, const int64_t* ahead_offsets) = nullptr;
};

template <typename T, typename Row>
RowCodec<T> codec_of(int64_t dim) {
  return {Row::bytes(dim), Row::encode, Row::template decode<T>};
}

template <typename T>
struct KvPacking {
  RowCodec<T> keys, values;

  KvPacking(KvFormat format, int64_t dim) {
    if (format == KvFormat::kPlain) return;
    TORCH_CHECK(dim % kKvGroup == 0, "a packed cache takes heads of a multiple of ", kKvGroup, " numbers, not ", dim);
    const bool is_int8 = format == KvFormat::kInt8;
    keys = is_int8 ? codec_of<T, PackedRow<8, false>>(dim) : codec_of<T, PackedRow<6, false>>(dim);
    values = is_int8 ? codec_of<T, PackedRow<8, true>>(dim) : codec_of<T, PackedRow<4, true>>(dim);
  }

  explicit operator bool() const { return keys.bytes > 0; }
};

// A layer's keys or values in the cache: numbers of type T, or packed rows.
template <typename T>
struct KvRows {
  T* numbers = nullptr;      // offsets count numbers
  uint8_t* bytes = nullptr;  // offsets count rows
  RowCodec<T> codec;

  bool packed() const { return codec.bytes > 0; }

  KvRows() = default;
  // A packed cache has a codec.
  KvRows(void* cache, const RowCodec<T>& codec) : codec(codec) {
    if (codec.bytes > 0) {
      bytes = static_cast<uint8_t*>(cache);
    } else {
      numbers = static_cast<T*>(cache);
    }
  }

  INLINE void put(const float* row, int64_t dim, int64_t offset) const {
    if (packed()) return codec.encode(row, dim, bytes + offset * codec.bytes);
    narrow_row(row, dim, numbers + offset);
  }

  // The rows at first + offsets[i], `apart` numbers from one to the next. Prefetches those at next + next_offsets[i].
  INLINE void unpack(int64_t first, const int64_t* offsets, int64_t count, int64_t dim, int64_t apart, T* to,
                     int64_t next = 0, const int64_t* next_offsets = nullptr) const {
    codec.decode(bytes + first * codec.bytes, offsets, count, dim, apart, to,
                 next_offsets ? bytes + next * codec.bytes : nullptr, next_offsets);
  }
};

}  // namespace softbatch
