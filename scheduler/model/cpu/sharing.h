// Which of a step's decoding sequences begin with the same blocks, and how far: a tree, cut into ranges of keys.
//
// Attention over a range is one product for all of its sequences: their common keys and values, the whole of a long
// context, are brought into the tile path's format once, where each sequence alone would go through them by itself.

#pragma once

#include "work.h"

namespace softbatch {

constexpr int64_t kSharers = 4;  // sequences from which on a common range pays

// Keys begin ... end - 1, a multiple of kKeyTile of them, which all `sequences` have in the same blocks. Each has
// `first_part` parts of its result from ranges before it.
struct SharedRange {
  int64_t begin, end, first_part;
  std::vector<int64_t> sequences;

  int64_t splits() const { return (end - begin + kTileSplit - 1) / kTileSplit; }
};

// What of a sequence is taken care of by ranges.
struct SharedPart {
  int64_t end = 0, parts = 0;
};

template <typename T>
class Sharing {
 public:
  std::vector<SharedRange> ranges;
  std::vector<SharedPart> of;  // each sequence

  Sharing(const Problem<T>& p, int64_t sequences) : of(sequences), p_(p) {
    std::vector<int64_t> decoding;
    for (int64_t s = 0; s < sequences; ++s)
      if (p.query_length(s) == 1) decoding.push_back(s);
    find(std::move(decoding), {});
  }

 private:
  // Ranges of sequences that are alike in all that lies before `from`.
  void find(std::vector<int64_t> among, SharedPart from) {
    // The last key is the query's own token, which is nobody else's.
    const auto is_short = [&](int64_t s) { return p_.context_len[s] <= from.end + kKeyTile; };
    among.erase(std::remove_if(among.begin(), among.end(), is_short), among.end());
    if (int64_t(among.size()) < kSharers) return;
    std::sort(among.begin(), among.end(), [&](int64_t a, int64_t b) { return compare(a, b, from.end) < 0; });
    for (size_t first = 0, last = 0; first < among.size(); first = last) {
      while (last < among.size() && compare(among[first], among[last], from.end) == 0)
        ++last;
      if (int64_t(last - first) < kSharers) continue;
      SharedRange range{from.end, from.end + kKeyTile, from.parts, {among.begin() + first, among.begin() + last}};
      const auto has_next = [&](int64_t s) {
        return p_.context_len[s] > range.end + kKeyTile && compare(range.sequences[0], s, range.end) == 0;
      };
      while (std::all_of(range.sequences.begin(), range.sequences.end(), has_next))
        range.end += kKeyTile;
      const SharedPart now{range.end, from.parts + range.splits()};
      for (int64_t s : range.sequences)
        of[s] = now;
      ranges.push_back(range);
      find(std::move(range.sequences), now);
    }
  }

  // The blocks of the kKeyTile keys from `begin` on, of two sequences that have them.
  int compare(int64_t a, int64_t b, int64_t begin) const {
    const int64_t first = begin / p_.block_size, last = (begin + kKeyTile - 1) / p_.block_size;
    return std::memcmp(p_.block_table + a * p_.table_stride + first, p_.block_table + b * p_.table_stride + first,
                       (last - first + 1) * sizeof(int32_t));
  }

  const Problem<T>& p_;
};

}  // namespace softbatch
