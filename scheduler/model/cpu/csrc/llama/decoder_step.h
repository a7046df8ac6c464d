// What the threads of a decoder's step share, and what each has for itself.

#pragma once

#include "attention/problem.h"
#include "matmul/matmul.h"
#include "matmul/row_ops.h"

namespace softbatch {

// What enters the products of a layer.
template <typename W>
struct ProductInputs {
  Activations<W> hidden, attended, gated;

  void resize(int64_t rows, int64_t hidden_size, int64_t width, int64_t intermediate_size) {
    hidden.resize(rows, hidden_size);
    attended.resize(rows, width);
    gated.resize(rows, intermediate_size);
  }
};

// Rows that go on behind a layer's attention.
template <typename W>
struct Selection {
  int64_t count;
  Rows residual;
  Rows branch;  // what attention and the MLP give, before its norm; null where no layer has one
  ProductInputs<W>* inputs;
  const int64_t* tokens;  // the token of each row, or null if rows are tokens

  int64_t token(int64_t row) const { return tokens ? tokens[row] : row; }
};

template <typename W, typename T>
struct Step {
  const T* inputs;
  const int64_t *positions, *slots;
  const bool* turns_long;  // whether a token's position turns as in long sequences; null if none does
  Selection<W> all;
  Selection<W> wanted;  // rows whose logits or states are asked for: behind the last layer's attention no others count
  Rows qkv, logits;
  Rows states;  // behind the last norm; null if logits are asked for
  T *query, *attended;
  T* gated;  // null if a product's results can be put into the next product's inputs piece by piece
  float *cosines, *sines;  // of each rotary scheme, [T, half]
  Problem<T> problem;
};

// A thread, and its memory for one row.
struct Worker {
  Team& team;
  float* row;
};

}  // namespace softbatch
