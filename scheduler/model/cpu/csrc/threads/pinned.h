// Keeps each member of a team on a processor of its own while the team works.
//
// If a team has as many members as there are processors, other processes share a processor with a member for a moment.
// The operating system then moves the member to another member's processor, and separates them again only after a step
// of a small model has ended.

#pragma once

#if defined(__linux__)
#include <sched.h>
#endif

namespace softbatch {

class Pinned {
 public:
  // No effect unless the team has exactly as many members as the thread may use processors.
  Pinned([[maybe_unused]] int member, [[maybe_unused]] int members) {
#if defined(__linux__)
    if (members < 2 || sched_getaffinity(0, sizeof before_, &before_) != 0 || CPU_COUNT(&before_) != members) return;
    int processor = -1;
    for (int passed = -1; passed < member;)
      passed += CPU_ISSET(++processor, &before_) != 0;
    cpu_set_t mine;
    CPU_ZERO(&mine);
    CPU_SET(processor, &mine);
    is_pinned_ = sched_setaffinity(0, sizeof mine, &mine) == 0;
#endif
  }

  ~Pinned() {
#if defined(__linux__)
    if (is_pinned_) sched_setaffinity(0, sizeof before_, &before_);
#endif
  }

  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

 private:
#if defined(__linux__)
  cpu_set_t before_;
  bool is_pinned_ = false;
#endif
};

}  // namespace softbatch
