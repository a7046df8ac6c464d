// Attention over a paged KV cache, cut into items that threads take one by one.
//
// Query heads that share a kv head are handled together, so that each key and value is read from memory once. Sequences
// with one query token are computed by decode.h, longer chunks and shared key ranges by prefill.h: items.h has both.
//
// A long key range is split into items whose results are merged, which keeps all threads busy with a small batch. Where
// a range is split decides how sums are rounded. It never depends on the number of threads, and on the batch only if
// sequences share blocks (shared_prefix.h).

#pragma once

#include <ATen/Parallel.h>

#include "attention/problem.h"
#include "attention/shared_prefix.h"

namespace softbatch {

// How a step's attention is cut into items; the same for every layer.
struct Plan {
  std::vector<Group> groups;
  std::vector<Item> items;
  int64_t partials = 0;  // rows of partial results, padded_dim + 2 floats each

  Plan(const Plan&) = delete;  // groups point to its members
  Plan& operator=(const Plan&) = delete;

  template <typename T>
  Plan(const Problem<T>& p, int64_t sequences, int64_t kv_heads) {
    const Sharing<T> sharing(p, sequences);
    int64_t dot_splits = 0;
    for (int64_t s = 0; s < sequences; ++s)
      if (p.is_decoding(s))
        dot_splits += count_splits(std::max(sharing.of[s].end, p.first_key_of(p.context_len[s] - 1)), p.context_len[s],
                                   kDotSplit);
    // The kv heads of a block lie side by side in memory. Items take them together unless threads would run out of
    // items.
    const int64_t together =
        std::clamp<int64_t>(kv_heads * dot_splits / (4 * at::get_num_threads()), 1, kv_heads);
    std::vector<int64_t> first_group(sequences);
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t length = p.query_length(s);
      const bool dots = p.is_decoding(s);
      const SharedPart& shared = sharing.of[s];
      const int64_t step = dots ? together : 1;
      first_group[s] = groups.size();
      for (int64_t h = 0; h < kv_heads; h += step) {
        const int64_t heads = std::min(step, kv_heads - h) * p.group, rows = length * heads;
        const int64_t max_rows = dots ? rows : kMaxRows;
        for (int64_t first = 0; first < rows; first += max_rows) {
          const int64_t count = std::min(max_rows, rows - first);
          const int64_t position = p.context_len[s] - length, key_end = position + (first + count - 1) / heads + 1;
          const int64_t visible = std::max(shared.end, p.first_key_of(position + first / heads));
          const int64_t begin = dots ? visible : visible / kTileSplit * kTileSplit;
          const int64_t splits = count_splits(begin, key_end, dots ? kDotSplit : kTileSplit);
          const int64_t parts = shared.parts + splits;
          groups.push_back({s, h, heads, first, count, begin, key_end, splits, visible, shared.parts, parts, partials,
                            count, nullptr, dots});
          if (parts > 1) partials += parts * count;
        }
      }
    }
    const int64_t alone = groups.size();
    for (const SharedRange& range : sharing.ranges)
      for (int64_t h = 0; h < kv_heads; ++h) {
        const int64_t rows = range.sequences.size() * p.group;
        int64_t part_rows = 0;
        std::vector<Member>& to = members_.emplace_back();
        for (int64_t s : range.sequences) {
          const Group& own = groups[first_group[s] + h / together];
          part_rows = own.part_rows;
          to.push_back({s, own.partial + range.first_part * part_rows + (h - own.kv_head) * p.group});
        }
        for (int64_t first = 0; first < rows; first += kMaxRows)
          groups.push_back({range.sequences[0], h, p.group, first, std::min<int64_t>(kMaxRows, rows - first), range.begin,
                            range.end, range.splits(), range.begin, range.first_part, 0, 0, part_rows, to.data(), false});
      }
    // Ranges first, as they take longest: a long item at the end would keep all other threads waiting.
    for (int64_t g = alone; g < int64_t(groups.size()); ++g)
      add_items(g);
    for (int64_t g = 0; g < alone; ++g)
      add_items(g);
  }

 private:
  static int64_t count_splits(int64_t begin, int64_t end, int64_t split) { return (end - begin + split - 1) / split; }

  void add_items(int64_t group) {
    for (int64_t n = 0; n < groups[group].splits; ++n)
      items.push_back({group, n});
  }

  std::vector<std::vector<Member>> members_;  // of each range and kv head
};

// The result of one item. `next` is what this thread takes next if that decodes too, or null. It takes a compiler long,
// so each T has it once, in the .cpp files beside this one.
template <typename T>
void compute_item(const Plan& plan, const Problem<T>& p, const Item& item, const Item* next);

// each(count, f) calls f(i, after) for every i below count, on any thread, and returns when all are done. `after` is
// the item that the thread takes next, or count.
template <typename T, typename F>
void attend(const Plan& plan, const Problem<T>& p, const F& each) {
  const int64_t count = plan.items.size();
  each(count, [&](int64_t i, int64_t after) {
    const Item* next = after < count && plan.groups[plan.items[after].group].dots ? &plan.items[after] : nullptr;
    compute_item(plan, p, plan.items[i], next);
  });
  if (plan.partials > 0)
    each(plan.groups.size(), [&](int64_t i, int64_t) {
      if (plan.groups[i].parts > 1) p.merge(plan.groups[i]);
    });
}

}  // namespace softbatch
