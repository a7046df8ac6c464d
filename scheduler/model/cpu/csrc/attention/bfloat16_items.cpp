// Items of attention over bfloat16 numbers, for every file that attends to them.

#include "attention/items.h"

namespace softbatch {

template void compute_item(const Plan&, const Problem<at::BFloat16>&, const Item&, const Item*);

}  // namespace softbatch
