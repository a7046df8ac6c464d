// Products of small float32 matrices within one thread, for attention with gradients.
//
// Rows lie a multiple of kPad numbers apart, and unused numbers are zero.

#pragma once

#include "matmul/matmul.h"

namespace softbatch {

constexpr int64_t kPad = std::max<int64_t>(kColumns, Layout<float>::kGroup);

// [rows, columns] of zeros, to be filled.
struct SmallMatrix {
  int64_t rows = 0, columns = 0, stride = 0;
  Buffer<float> memory;

  void resize(int64_t new_rows, int64_t new_columns) {
    rows = new_rows;
    columns = new_columns;
    stride = round_up(columns, kPad);
    float* data = memory.resize(round_up(rows, kPad) * stride);
    std::memset(data, 0, round_up(rows, kPad) * stride * sizeof(float));
  }
  INLINE float* row(int64_t i) const { return memory.data() + i * stride; }

  void transpose_into(SmallMatrix& to) const {
    to.resize(columns, rows);
    for (int64_t i = 0; i < rows; i += kLanes)
      for (int64_t j = 0; j < columns; j += kLanes) {
        Vec block[kLanes];
        for (int k = 0; k < kLanes; ++k)
          block[k] = load(row(i + k) + j);
        transpose(block);
        for (int k = 0; k < kLanes; ++k)
          store(to.row(j + k) + i, block[k]);
      }
  }
};

// Calls done(row, first column, sums [kColumns]) for x W, where W is [x.columns, outputs].
template <typename F>
void multiply_small(const SmallMatrix& x, const SmallMatrix& w, Buffer<char>& scratch, const F& done) {
  using L = Layout<float>;
  static constexpr auto kernels = tile_kernels<float>(std::make_integer_sequence<int, kTile>{});
  const int64_t inputs = x.columns, panels = (w.columns + kColumns - 1) / kColumns, bytes = L::panel_bytes(inputs);
  alignas(64) float sums[kTile * kColumns];
  char* packed = scratch.resize(panels * bytes + kTile * L::row_bytes(inputs));
  char* tile = packed + panels * bytes;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t k = 0; k < L::groups(inputs) * L::kGroup; ++k)
      std::memcpy(packed + p * bytes + k * L::kStep, w.row(k) + p * kColumns, kColumns * sizeof(float));
  for (int64_t first = 0; first < x.rows; first += kTile) {
    const int64_t count = std::min<int64_t>(kTile, x.rows - first);
    for (int64_t r = 0; r < count; ++r)
      L::put(x.row(first + r), inputs, r, count, tile);
    for (int64_t p = 0; p < panels; ++p) {
      kernels[count - 1](tile, packed + p * bytes, inputs, Prefetch::none(packed), sums);
      for (int64_t r = 0; r < count; ++r)
        done(first + r, p * kColumns, sums + r * kColumns);
    }
  }
}

}  // namespace softbatch
