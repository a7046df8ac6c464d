// A team of threads that goes through many small parallel loops within one OpenMP region.
//
// A step of a small model is some three hundred loops of a few microseconds each: opening a region for each of them
// would cost as much as the work. Items are handed out one by one, since their costs differ and other processes may
// hold up a core. A member that waits spins, but yields its core before long: something else may need it.

#pragma once

#include <ATen/Parallel.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "amx.h"
#include "pinned.h"

namespace softbatch {

class Team {
 public:
  // Runs body(team) on every member; loops inside are shared by all of them.
  template <typename F>
  static void run(const F& body) {
    Team team;
#pragma omp parallel num_threads(at::in_parallel_region() ? 1 : at::get_num_threads())
    {
#pragma omp single
      team.size_ = omp_get_num_threads();  // fewer than asked for where OMP_THREAD_LIMIT or OMP_DYNAMIC say so
      const Pinned pinned(omp_get_thread_num(), team.size_);
      [[maybe_unused]] const MatrixTiles matrix_tiles{};
      body(team);
    }
  }

  // Calls f(item, the item this member takes next or count) for every item; returns when all are done. With `uneven`
  // costs the last items are taken only when they begin, so that none waits for its turn behind a long one.
  template <typename F>
  void for_each_ahead(int64_t count, bool uneven, const F& f) {
    const auto take = [&] { return next_.fetch_add(1, std::memory_order_relaxed); };
    const int64_t early = uneven ? count - 2 * size_ : count;
    int64_t item = take();
    while (item < count) {
      const int64_t after = item < early ? take() : count;
      f(item, std::min(after, count));
      item = item < early ? after : take();
    }
    meet();
  }

  template <typename F>
  void for_each(int64_t count, const F& f) {
    for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < count;)
      f(item);
    meet();
  }

 private:
  Team() = default;

  // The last to come sets the counter back and lets everybody go.
  void meet() {
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins >= kSpins) sched_yield();
    }
  }

  static constexpr int kSpins = 2000;

  int size_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

}  // namespace softbatch
