// Intel's matrix tiles (AMX): sixteen rows of bfloat16 numbers times sixteen columns, 32 deep, in one instruction.
//
// A process must ask Linux for the tiles, and Linux may refuse, so every caller has another way too. Tiles round sums
// differently from vectors. Which way is taken therefore depends on the machine alone.

#pragma once

#include "simd/vector.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__linux__)
#define SOFTBATCH_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <type_traits>

namespace softbatch {

constexpr int kMatrixRows = 16;
constexpr int kMatrixDepth = 32;    // numbers of a row that one instruction takes,
constexpr int kMatrixBytes = 64;    // and their bytes
constexpr int kMatrixColumns = 32;  // of the products below: two tiles side by side
constexpr int kMatrixPairs = kMatrixDepth / 2;                    // rows of pairs in a step of their second operand,
constexpr int64_t kMatrixStep = kMatrixPairs * 2 * kMatrixBytes;  // and the step's bytes

// Whether weights of type W are, or are read as, the bfloat16 numbers that matrix tiles take.
template <typename W>
constexpr bool kFitsMatrixTiles = std::is_same_v<W, at::BFloat16>;

// Sixteen rows, `stride` bytes from one to the next; `step` bytes on, the next kMatrixDepth numbers of each.
struct MatrixRows {
  const void* data;
  int64_t stride, step;
};

#if defined(SOFTBATCH_AMX)

inline bool may_use_matrix_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// GCC does not know that its tile intrinsics read memory. This orders them behind the stores before it.
INLINE void memory_is_read() { asm volatile("" ::: "memory"); }

// Whether products of this type run on matrix tiles.
template <typename T>
bool uses_matrix_tiles() {
  return kFitsMatrixTiles<T> && may_use_matrix_tiles();
}

// The calling thread's tiles, all of the largest shape, for as long as this lives.
class MatrixTiles {
 public:
  MatrixTiles() {
    if (!may_use_matrix_tiles()) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    std::fill(shape.bytes, shape.bytes + 8, kMatrixBytes);
    std::fill(shape.rows, shape.rows + 8, kMatrixRows);
    memory_is_read();
    _tile_loadconfig(&shape);
  }
  ~MatrixTiles() {
    if (may_use_matrix_tiles()) _tile_release();
  }
  MatrixTiles(const MatrixTiles&) = delete;
  MatrixTiles& operator=(const MatrixTiles&) = delete;
};

// out[r][c] = sum over k of rows[r][k] * b[k][c], kMatrixColumns columns, for sixteen rows. `kTwo` computes sixteen
// `others` behind them, `kAdd` adds to what out holds. b(i) points to the numbers of step i: kMatrixPairs rows of
// pairs, one number below the other. during() is called behind each step. Rows bypass the L1 cache, so that b, which
// meets many rows, stays in it.
template <bool kTwo, bool kAdd, typename B, typename F>
INLINE void multiply_matrix_tiles(MatrixRows rows, MatrixRows others, const B& b, int64_t steps, float* out,
                                  const F& during) {
  constexpr int64_t kRow = 2 * kMatrixBytes, kOutRow = kMatrixColumns * sizeof(float);
  const char *a = static_cast<const char*>(rows.data), *a2 = static_cast<const char*>(others.data);
  float *right = out + kLanes, *out2 = out + kMatrixRows * kMatrixColumns, *right2 = out2 + kLanes;
  memory_is_read();
  if constexpr (kAdd) {
    _tile_loadd(0, out, kOutRow);
    _tile_loadd(1, right, kOutRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  if constexpr (kTwo && kAdd) {
    _tile_loadd(2, out2, kOutRow);
    _tile_loadd(3, right2, kOutRow);
  } else if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < steps; ++i, a += rows.step, a2 += others.step) {
    const char* columns = b(i);
    _tile_stream_loadd(4, a, rows.stride);
    _tile_loadd(6, columns, kRow);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, columns + kMatrixBytes, kRow);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_stream_loadd(5, a2, others.stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    during();
    memory_is_read();  // during() may have written
  }
  _tile_stored(0, out, kOutRow);
  _tile_stored(1, right, kOutRow);
  if constexpr (kTwo) {
    _tile_stored(2, out2, kOutRow);
    _tile_stored(3, right2, kOutRow);
  }
}

#else

template <typename T>
constexpr bool uses_matrix_tiles() {
  return false;
}

struct MatrixTiles {};

template <bool kTwo, bool kAdd, typename B, typename F>
void multiply_matrix_tiles(MatrixRows, MatrixRows, const B&, int64_t, float*, const F&) {}

#endif

}  // namespace softbatch
