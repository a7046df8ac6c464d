// What attention.h hands to a thread: an item on the way of decode.h or of prefill.h.

#pragma once

#include "attention/attention.h"
#include "attention/decode.h"
#include "attention/prefill.h"

namespace softbatch {

template <typename T>
void compute_item(const Plan& plan, const Problem<T>& p, const Item& item, const Item* next) {
  const Group& g = plan.groups[item.group];
  if (!g.dots) return tile_item(p, g, item.split);
  auto dot = dot_item<T, 0, 0>;
  if constexpr (FormatOf<T>::kDepth == 2) {  // decoding is so short that loops of unknown length would be felt
    const bool is_longer = p.key_dim > p.dim;
    if (p.dim == 64) dot = is_longer ? dot_item<T, 64, 128> : dot_item<T, 64, 64>;
    if (p.dim == 128) dot = is_longer ? dot_item<T, 128, 256> : dot_item<T, 128, 128>;
  }
  dot(p, g, item.split, next ? &plan.groups[next->group] : nullptr, next ? next->split : 0);
}

}  // namespace softbatch
