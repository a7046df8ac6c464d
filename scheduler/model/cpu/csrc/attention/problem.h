// One call of attention: its tensors, how its query rows are cut into items, and how an item's result is written.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "attention/kv_format.h"

namespace softbatch {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kHeads = 4;  // query heads that the dot path takes at once: 32 vector registers hold their sums
#else
constexpr int kHeads = 2;  // 16 registers
#endif
constexpr int kTileRows = 2 * kHeads;  // rows of a register-blocked matrix product,
constexpr int kPanel = 2 * kLanes;     // and its columns: query rows side by side
static_assert(kPanel % kTileRows == 0);
constexpr int kMaxRows = 128;  // query rows of one tile item, so that its working set fits the L2 cache
constexpr int kKeyTile = 64;   // keys between two updates of the running maximum
constexpr int kDotSplit = 8 * kKeyTile;    // keys of one item, dot path
constexpr int kTileSplit = 16 * kKeyTile;  // the same, tile path
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLowest = std::numeric_limits<float>::lowest();  // finite, so that kLowest - kLowest is 0 and not NaN
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// float32 working memory of one thread, kept between calls so that no step pays for page faults.
inline float* scratch(int64_t floats) {
  struct alignas(64) Line {
    float x[16];
  };
  thread_local std::vector<Line> lines;
  lines.resize(std::max<size_t>(lines.size(), floats / 16 + 1));
  return lines.data()->x;
}

// Multiplies so many scores by `scale`, and caps them.
INLINE void cap_scores(float* scores, int64_t count, float scale, float softcap) {
  const Vec by = fill(scale / softcap), cap = fill(softcap);
  for (int64_t i = 0; i < count; i += kLanes)
    store(scores + i, cap * tanh(load(scores + i) * by));
}

// A sequence that shares a group's keys with others. `partial` is the row of partial results of its first query head's
// first split.
struct Member {
  int64_t sequence, partial;
};

// Query rows that attend to the same keys. Rows count through `heads` query heads of the first query token, then of the
// next. These heads belong to `kv_head`, and perhaps to kv heads after it. The group is `rows` rows from `first` on.
// Its tokens are those of one sequence. With `members` they are the only token of each member, and `sequence` is any of
// them.
struct Group {
  int64_t sequence, kv_head, heads, first, rows;
  int64_t key_begin, key_end, splits;
  int64_t first_visible;  // keys before it are seen by no row, so that splits leave them out
  // A row's result is merged from `parts` parts. Those of this group's splits begin at `first_part`. A group of members
  // has no result of its own: it writes parts of its members' results.
  int64_t first_part, parts;
  int64_t partial;  // first row of its sequence's partial results, [parts][part_rows]; unused with one part
  int64_t part_rows;
  const Member* members;
  bool dots;  // takes the dot path
};

struct Item {
  int64_t group, split;
};

// One call's tensors. Strides count elements.
template <typename T>
struct Problem {
  const T* query;
  int64_t query_stride, query_head_stride;
  KvRows<T> keys, values;
  int64_t block_stride, head_stride, slot_stride, block_size;  // of a packed cache in rows
  const int32_t* query_start;
  const int32_t* context_len;
  const int32_t* block_table;
  int64_t table_stride;
  const bool* decodes;  // of each sequence, if its only token decodes; null: whatever has one token does
  bool joins_ranges;    // whether keys that sequences share may be computed once for all of them
  T* out;
  float* partials;  // of each row: running maximum, sum of weights, weighted values
  int64_t heads, group, dim;
  int64_t padded_dim;  // rounded up to whole panels, and so to whole vectors of any format
  // What scores are products of. Keys of a packed cache may lack what is the same in all of them before they are turned
  // by their positions. A row of `position_keys` [position, dim] then stands behind each, and makes up for it.
  int64_t key_dim, padded_key_dim;
  const T* position_keys;  // null: key_dim is dim
  float scale;         // times log2(e), as scores are exponents of 2
  int64_t window;      // how many tokens each sees, itself among them; 0: all
  float softcap;       // scores x become softcap * tanh(x / softcap), times log2(e); 0: they stay
  const float* sinks;  // of each head: a score beside those of the keys, without a value; null: none

  int64_t first_key_of(int64_t position) const {
    return window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0;
  }
  // Behind each of the `count` keys from `position` on, `apart` numbers from one to the next.
  INLINE void put_position_keys(int64_t position, int64_t count, int64_t apart, T* keys) const {
    for (int64_t i = 0; position_keys && i < count; ++i)
      std::memcpy(keys + i * apart + dim, position_keys + (position + i) * dim, dim * sizeof(T));
  }
  int64_t query_length(int64_t s) const { return query_start[s + 1] - query_start[s]; }
  // A prompt's chunk of one token is computed as longer ones are: what a prompt leaves does not depend on its cuts.
  bool is_decoding(int64_t s) const { return query_length(s) == 1 && (!decodes || decodes[s]); }
  int64_t token(const Group& g, int64_t row) const {
    const int64_t token = (g.first + row) / g.heads;
    return g.members ? query_start[g.members[token].sequence] : query_start[g.sequence] + token;
  }
  int64_t head(const Group& g, int64_t row) const { return g.kv_head * group + (g.first + row) % g.heads; }

  // A row's query in the products' format. The elements must be zero before, as the last may be filled only in part.
  template <typename F>
  void take_query(const Group& g, int64_t row, typename F::Element* to) const {
    const T* from = query + token(g, row) * query_stride + head(g, row) * query_head_stride;
    if constexpr (F::kDepth == 2) {
      std::memcpy(to, from, key_dim * sizeof(T));
    } else {
      widen_row(from, key_dim, to);
    }
  }

  // Offsets in the caches of keys begin ... begin + count - 1 of a sequence, at kv head 0.
  void locate(int64_t sequence, int64_t begin, int64_t count, int64_t* offsets) const {
    const int32_t* table = block_table + sequence * table_stride;
    int64_t block = begin / block_size, slot = begin % block_size;
    for (int64_t i = 0; i < count; ++block, slot = 0) {
      const int64_t base = table[block] * block_stride;
      for (; slot < block_size && i < count; ++slot, ++i)
        offsets[i] = base + slot * slot_stride;
    }
  }

  void write(const Group& g, int64_t row, float top, float total, const float* values) const {
    T* to = out + (token(g, row) * heads + head(g, row)) * dim;
    float inverse = 1.0f / total;
    if (sinks) {
      const float sink = sinks[head(g, row)] * kLog2e, highest = std::max(top, sink);
      const float share = exp2(fill(top - highest))[0];
      inverse = share / (total * share + exp2(fill(sink - highest))[0]);
    }
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes)
      store(to + d, load(values + d) * inverse);
    for (; d < dim; ++d)
      to[d] = static_cast<T>(values[d] * inverse);
  }

  float* partial(const Group& g, int64_t split, int64_t row) const {
    const int64_t first = g.members ? g.members[(g.first + row) / g.heads].partial + (g.first + row) % g.heads
                                    : g.partial + g.first_part * g.part_rows + row;
    return partials + (first + split * g.part_rows) * (padded_dim + 2);
  }

  // The end of an item for one row: its output, or with several parts its share of it.
  void finish(const Group& g, int64_t split, int64_t row, float top, float total, const float* values) const {
    if (g.parts == 1) return write(g, row, top, total, values);
    float* to = partial(g, split, row);
    to[0] = top;
    to[1] = total;
    std::memcpy(to + 2, values, dim * sizeof(float));
  }

  // Joins the parts of each row's result.
  void merge(const Group& g) const {
    float* values = scratch(padded_dim);
    for (int64_t row = 0; row < g.rows; ++row) {
      float top = kLowest, total = 0;
      for (int64_t part = 0; part < g.parts; ++part)
        top = std::max(top, partial(g, part - g.first_part, row)[0]);
      std::fill(values, values + padded_dim, 0.0f);
      for (int64_t part = 0; part < g.parts; ++part) {
        const float* from = partial(g, part - g.first_part, row);
        const float weight = exp2(fill(from[0] - top))[0];
        total += weight * from[1];
        for (int64_t d = 0; d < dim; ++d)
          values[d] += weight * from[2 + d];
      }
      write(g, row, top, total, values);
    }
  }
};

}  // namespace softbatch
