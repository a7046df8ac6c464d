// bfloat16 weights in 12 bits each, without loss, for steps that are bound by memory.
//
// Nearly all weights of a panel share a few exponents. The panel names its sixteen most frequent ones, four bits per
// weight say which applies, and sign and mantissa stay as they are. Outliers with another exponent are put in place
// when the panel is read. The idea is DFloat11's (arXiv 2504.11651), but its codes vary in length, which vectors cannot
// decode.

#pragma once

#include "matmul/panels.h"

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)
#define SOFTBATCH_COMPACT

#include <array>
#include <numeric>

namespace softbatch {

struct Compact {};

template <>
inline constexpr bool kFitsMatrixTiles<Compact> = true;

template <>
struct Layout<Compact> : Layout<at::BFloat16> {
  using Plain = Layout<at::BFloat16>;
  static constexpr int kExponents = 16;
  static constexpr int kNumbers = Plain::kStep / 2;  // of a step
  static constexpr int64_t kStep = kNumbers * 12 / 8;

  // A weight whose exponent is none of the panel's sixteen.
  struct Outlier {
    int32_t step;
    uint16_t place, bits;
  };
  struct alignas(64) Head {
    uint8_t exponents[kExponents];
    const Outlier* others;  // in the order of their steps, and one behind the last step
  };
  // Two steps share a vector of exponents: the first has the lower halves of its bytes.
  struct alignas(64) StepPair {
    uint8_t signs_mantissas[2][kNumbers], exponents[kNumbers];
  };
  static_assert(sizeof(StepPair) == 2 * kStep);

  static int64_t panel_bytes(int64_t inputs) { return sizeof(Head) + groups(inputs) * kGroup * kStep; }

  // The number that a step's byte belongs to: unpacking turns each 16 bytes into 8 numbers of either vector.
  static constexpr int place(int byte) { return byte % 16 / 8 * (kNumbers / 2) + byte / 16 * 8 + byte % 8; }
  static int exponent(uint16_t bits) { return bits >> 7 & 0xff; }

  template <typename G>
  static void pack(const G& weights, int64_t inputs, char* panel, Arena& arena) {
    std::vector<uint16_t> plain(Plain::panel_bytes(inputs) / 2);
    Plain::pack(weights, inputs, reinterpret_cast<char*>(plain.data()), arena);
    std::array<int64_t, 256> found{};
    for (uint16_t bits : plain)
      ++found[exponent(bits)];
    std::array<uint8_t, 256> often;
    std::iota(often.begin(), often.end(), 0);
    std::stable_sort(often.begin(), often.end(), [&](uint8_t a, uint8_t b) { return found[a] > found[b]; });
    Head& head = *reinterpret_cast<Head*>(panel);
    std::copy_n(often.begin(), kExponents, head.exponents);
    std::array<int, 256> code;
    code.fill(-1);
    for (int i = 0; i < kExponents; ++i)
      code[often[i]] = i;

    std::vector<Outlier> others;
    StepPair* to = reinterpret_cast<StepPair*>(panel + sizeof(Head));
    const int32_t steps = plain.size() / kNumbers;
    for (int32_t step = 0; step < steps; ++step) {
      StepPair& two = to[step / 2];
      for (int byte = 0; byte < kNumbers; ++byte) {
        const uint16_t bits = plain[step * kNumbers + place(byte)];
        const int c = code[exponent(bits)];
        if (c < 0) others.push_back({step, static_cast<uint16_t>(place(byte)), bits});
        two.signs_mantissas[step % 2][byte] = (bits >> 8 & 0x80) | (bits & 0x7f);
        if (step % 2 == 0) two.exponents[byte] = 0;
        two.exponents[byte] |= std::max(c, 0) << 4 * (step % 2);
      }
    }
    others.push_back({steps, 0, 0});
    head.others = std::copy(others.begin(), others.end(), arena.allocate<Outlier>(others.size())) - others.size();
  }

  class Reader {
   public:
    INLINE explicit Reader(const char* panel) {
      const Head& head = *reinterpret_cast<const Head*>(panel);
      const __m512i exponents = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(head.exponents)));
      const __m512i top = _mm512_set1_epi8(static_cast<char>(0x80));
      high_ = _mm512_andnot_si512(top, _mm512_srli_epi16(exponents, 1));
      low_ = _mm512_and_si512(top, _mm512_slli_epi16(exponents, 7));
      others_ = head.others;
      at_ = reinterpret_cast<const StepPair*>(panel + sizeof(Head));
    }
    template <typename S>
    INLINE void two(const S& step) {
      const __m512i codes = _mm512_load_si512(at_->exponents);
      one(codes, at_->signs_mantissas[0], step);
      one(_mm512_srli_epi16(codes, 4), at_->signs_mantissas[1], step);
      ++at_;
    }

   private:
    // The table is repeated four times, so the bits above a code do not matter.
    template <typename S>
    INLINE void one(__m512i codes, const uint8_t* signs_mantissas, const S& step) {
      constexpr int kPick = 0xe4;  // takes a bit of the first operand if the third has a one there, else of the second
      const __m512i rest = _mm512_load_si512(signs_mantissas);
      const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
      const __m512i high = _mm512_ternarylogic_epi32(rest, _mm512_permutexvar_epi8(codes, high_), sign, kPick);
      const __m512i low = _mm512_ternarylogic_epi32(_mm512_permutexvar_epi8(codes, low_), rest, sign, kPick);
      Bits w[2] = {(Bits)_mm512_unpacklo_epi8(low, high), (Bits)_mm512_unpackhi_epi8(low, high)};
      if (__builtin_expect(others_->step == steps_, false)) {
        uint16_t numbers[kNumbers];
        std::memcpy(numbers, w, sizeof w);
        for (; others_->step == steps_; ++others_)
          numbers[others_->place] = others_->bits;
        std::memcpy(w, numbers, sizeof w);
      }
      ++steps_;
      step(w[0], w[1]);
    }

    __m512i high_, low_;
    const Outlier* others_;
    const StepPair* at_;
    int32_t steps_ = 0;
  };

  // A panel's steps for matrix tiles, which read only memory. Each step is unpacked shortly before the first rows need
  // it, and kept if other rows follow.
  class MatrixPanel {
   public:
    INLINE MatrixPanel(const char* panel, int64_t steps, bool once)
        : reader_(panel), steps_(steps), mask_(once ? kPlaces - 1 : -1) {
      thread_local Buffer<char> memory;
      memory_ = memory.resize((once ? std::min(steps, kPlaces) : steps) * kMatrixStep);
      for (int i = 0; i < kEarly; ++i)
        prepare();
    }
    INLINE const char* step(int64_t i) const { return memory_ + (i & mask_) * kMatrixStep; }
    INLINE void prepare() {
      if (prepared_ == steps_) return;
      char* to = memory_ + (prepared_++ & mask_) * kMatrixStep;
      for (int k = 0; k < kMatrixPairs; k += 2)
        reader_.two([&](Bits left, Bits right) ALWAYS_INLINE {
          std::memcpy(to, &left, sizeof left);
          std::memcpy(to + sizeof left, &right, sizeof right);
          to += sizeof left + sizeof right;
        });
    }

   private:
    static constexpr int kEarly = 2;  // steps, so that the data has left the store buffer
    // Steps in memory if none is kept. kEarly would be too few: compilers do not know that tiles are loaded from
    // memory, and may write the next step before this one is read.
    static constexpr int64_t kPlaces = 2 * kEarly;
    static_assert(Plain::kGroup * Plain::kStep == kMatrixStep);
    Reader reader_;
    int64_t steps_, prepared_ = 0;
    int64_t mask_;
    char* memory_;
  };

  template <int M>
  static void multiply(const char* tile, const char* panel, int64_t inputs, Prefetch ahead, float* sums) {
    Plain::multiply<M, Reader>(tile, panel, inputs, ahead, sums);
  }
};

}  // namespace softbatch

#endif
