// Attention over a paged KV cache, cut into items that threads take one by one.
//
// The query heads that share a kv head are handled together, so that each K and V row is read from memory once.
// Sequences with one query token take the dot path, longer chunks the tile path. A long key range is split at
// fixed positions into items whose results are merged, which keeps all threads busy with a small batch. Where
// it is split depends neither on the batch nor on the number of threads, so a sequence's result does not either.

#pragma once

#include <ATen/Parallel.h>

#include "dot_path.h"
#include "tile_path.h"

namespace softbatch {

// How a step's attention is cut into items; the same for every layer.
struct Plan {
  std::vector<Group> groups;
  std::vector<Item> items;
  int64_t partials = 0;  // rows of partial results, padded_dim + 2 floats each

  template <typename T>
  Plan(const Problem<T>& p, int64_t sequences, int64_t kv_heads) {
    int64_t dot_splits = 0;
    for (int64_t s = 0; s < sequences; ++s)
      if (p.query_length(s) == 1) dot_splits += (p.context_len[s] + kDotSplit - 1) / kDotSplit;
    // A block's kv heads lie side by side in memory: walk them together, unless threads would run out of items.
    const int64_t together =
        std::clamp<int64_t>(kv_heads * dot_splits / (4 * at::get_num_threads()), 1, kv_heads);
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t length = p.query_length(s);
      const bool dots = length == 1;
      const int64_t step = dots ? together : 1, split = dots ? kDotSplit : kTileSplit;
      for (int64_t h = 0; h < kv_heads; h += step) {
        const int64_t heads = std::min(step, kv_heads - h) * p.group, rows = length * heads;
        const int64_t max_rows = dots ? rows : kMaxRows;
        for (int64_t first = 0; first < rows; first += max_rows) {
          const int64_t count = std::min(max_rows, rows - first);
          const int64_t key_end = p.context_len[s] - length + (first + count - 1) / heads + 1;
          const int64_t splits = (key_end + split - 1) / split;
          for (int64_t n = 0; n < splits; ++n)
            items.push_back({static_cast<int64_t>(groups.size()), n});
          groups.push_back({s, h, heads, first, count, key_end, splits, partials});
          if (splits > 1) partials += splits * count;
        }
      }
    }
  }
};

// each(count, f) calls f(i, after) for every i below count, on any thread, and returns when all are done; `after` is
// what that thread takes next, or count.
template <typename T, typename F>
void attend(const Plan& plan, const Problem<T>& p, const F& each) {
  const auto has_dots = [&](const Item& item) { return p.query_length(plan.groups[item.group].sequence) == 1; };
  const int64_t count = plan.items.size();
  each(count, [&](int64_t i, int64_t after) {
    const Item& item = plan.items[i];
    const Group& g = plan.groups[item.group];
    if (!has_dots(item)) return tile_item(p, g, item.split);
    const Item* next = after < count && has_dots(plan.items[after]) ? &plan.items[after] : nullptr;
    dot_item(p, g, item.split, next ? &plan.groups[next->group] : nullptr, next ? next->split : 0);
  });
  if (plan.partials > 0)
    each(plan.groups.size(), [&](int64_t i, int64_t) {
      if (plan.groups[i].splits > 1) p.merge(plan.groups[i]);
    });
}

}  // namespace softbatch
