// Which of a step's decoding sequences begin with the same blocks, and how far: a tree, cut into ranges of keys.
//
// Attention over a range is one product for all of its sequences. Common keys and values are brought into the products'
// format once for many rows, instead of being read by each sequence for itself.

#pragma once

#include "attention/problem.h"

namespace softbatch {

// Fewer query rows per kv head do not make up for the format's cost.
constexpr int64_t kSharedRows = 12;
// Sequences with fewer keys in common, such as those behind a soft prompt of usual length, get the same results in any
// batch, bit for bit.
constexpr int64_t kLeastShared = 4 * kKeyTile;
constexpr int64_t kSharedSplit = 8 * kKeyTile;  // keys of an item

// Keys begin ... end - 1, a multiple of kKeyTile of them, which all `sequences` have in the same blocks. Each has
// `first_part` parts of its result from ranges before it.
struct SharedRange {
  int64_t begin, end, first_part;
  std::vector<int64_t> sequences;

  int64_t splits() const { return (end - begin + kSharedSplit - 1) / kSharedSplit; }
};

// How much of a sequence is computed by ranges.
struct SharedPart {
  int64_t end = 0, parts = 0;
};

template <typename T>
class Sharing {
 public:
  std::vector<SharedRange> ranges;
  std::vector<SharedPart> of;  // each sequence

  Sharing(const Problem<T>& p, int64_t sequences) : of(sequences), p_(p) {
    if (p.window > 0) return;  // what tokens at different positions see begins at different keys
    std::vector<int64_t> decoding;
    for (int64_t s = 0; s < sequences; ++s)
      if (p.joins_ranges && p.is_decoding(s)) decoding.push_back(s);
    find(std::move(decoding), {}, 0);
  }

 private:
  // Finds the ranges from `from` on of sequences that are known to be alike up to key `alike`.
  void find(std::vector<int64_t> members, SharedPart from, int64_t alike) {
    // The last key is the query's own token, which no other sequence has.
    const auto is_short = [&](int64_t s) { return p_.context_len[s] <= alike + kKeyTile; };
    members.erase(std::remove_if(members.begin(), members.end(), is_short), members.end());
    if (!are_enough(members.size())) return;
    std::sort(members.begin(), members.end(), [&](int64_t a, int64_t b) { return compare(a, b, alike) < 0; });
    for (size_t first = 0, last = 0; first < members.size(); first = last) {
      while (last < members.size() && compare(members[first], members[last], alike) == 0)
        ++last;
      if (!are_enough(last - first)) continue;
      SharedRange range{from.end, alike + kKeyTile, from.parts, {members.begin() + first, members.begin() + last}};
      const auto has_next = [&](int64_t s) {
        return p_.context_len[s] > range.end + kKeyTile && compare(range.sequences[0], s, range.end) == 0;
      };
      while (std::all_of(range.sequences.begin(), range.sequences.end(), has_next))
        range.end += kKeyTile;
      SharedPart now = from;
      if (range.end - range.begin >= kLeastShared) {
        now = {range.end, from.parts + range.splits()};
        for (int64_t s : range.sequences)
          of[s] = now;
        ranges.push_back(range);
      }
      find(std::move(range.sequences), now, range.end);
    }
  }

  bool are_enough(int64_t sequences) const { return sequences > 1 && sequences * p_.group >= kSharedRows; }

  // The blocks of the kKeyTile keys from `begin` on, of two sequences that have them.
  int compare(int64_t a, int64_t b, int64_t begin) const {
    const int64_t first = begin / p_.block_size, last = (begin + kKeyTile - 1) / p_.block_size;
    return std::memcmp(p_.block_table + a * p_.table_stride + first, p_.block_table + b * p_.table_stride + first,
                       (last - first + 1) * sizeof(int32_t));
  }

  const Problem<T>& p_;
};

}  // namespace softbatch
