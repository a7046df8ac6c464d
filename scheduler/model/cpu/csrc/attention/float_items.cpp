// Items of attention over float32 and float16 numbers, for every file that attends to them.

#include "attention/items.h"

namespace softbatch {

template void compute_item(const Plan&, const Problem<float>&, const Item&, const Item*);
template void compute_item(const Plan&, const Problem<at::Half>&, const Item&, const Item*);

}  // namespace softbatch
