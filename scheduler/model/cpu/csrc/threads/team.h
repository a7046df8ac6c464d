// A team of threads that goes through many small parallel loops within one OpenMP region.
//
// A step of a small model is hundreds of very short loops. Opening a region for each would cost as much as the work.
//
// Members take items one by one, because costs differ and other processes may hold up a core. Each member takes those
// of its own range first, which is the same in every loop, so a core finds in its cache what it left there one loop
// before. A waiting member spins, and yields its core before long in case another process needs it.

#pragma once

#include <ATen/Parallel.h>
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "simd/amx.h"
#include "threads/pinned.h"

namespace softbatch {

class Team {
 public:
  // Runs body(team) on every member; loops inside are shared by all of them.
  template <typename F>
  static void run(const F& body) {
    const int most = at::in_parallel_region() ? 1 : at::get_num_threads();
    Team team(most);
#pragma omp parallel num_threads(most)
    {
#pragma omp single
      team.size_ = omp_get_num_threads();  // OMP_THREAD_LIMIT and OMP_DYNAMIC may allow fewer
      const Pinned pinned(omp_get_thread_num(), team.size_);
      [[maybe_unused]] const MatrixTiles matrix_tiles{};
      body(team);
    }
  }

  int size() const { return size_; }

  // Calls f(item, the item this member takes next or count) for every item, and returns when all are done. With
  // `uneven` costs, items are taken in order. The last ones are not taken in advance, so none waits behind a long one.
  template <typename F>
  void for_each_ahead(int64_t count, bool uneven, const F& f) {
    Items items(*this, count, uneven ? 1 : size_);
    const int64_t early = uneven ? count - 2 * size_ : count;
    int64_t item = items.take();
    while (item < count) {
      const int64_t after = item < early ? items.take() : count;
      f(item, after);
      item = item < early ? after : items.take();
    }
    meet();
  }

  template <typename F>
  void for_each(int64_t count, const F& f) {
    Items items(*this, count, size_);
    for (int64_t item; (item = items.take()) < count;)
      f(item);
    meet();
  }

 private:
  struct alignas(64) Range {
    std::atomic<int64_t> taken{0};
  };

  // A member's share of a loop's items: its own range, then the rest of other members' ranges.
  class Items {
   public:
    Items(Team& team, int64_t count, int ranges) : team_(team), count_(count), ranges_(ranges), left_(ranges) {
      enter(omp_get_thread_num() % ranges);
    }
    // The next item, or count.
    int64_t take() {
      for (; left_ > 0; --left_, enter((range_ + 1) % ranges_)) {
        std::atomic<int64_t>& taken = team_.ranges_[range_].taken;
        if (begin_ + taken.load(std::memory_order_relaxed) >= end_) continue;  // the cache line stays shared
        const int64_t item = begin_ + taken.fetch_add(1, std::memory_order_relaxed);
        if (item < end_) return item;
      }
      return count_;
    }

   private:
    void enter(int range) {
      range_ = range;
      begin_ = count_ * range / ranges_;
      end_ = count_ * (range + 1) / ranges_;
    }
    Team& team_;
    const int64_t count_;
    const int ranges_;
    int left_, range_;
    int64_t begin_, end_;
  };

  explicit Team(int most) : ranges_(most) {}

  // The last member to arrive resets the counters and releases the others.
  void meet() {
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      for (Range& range : ranges_)
        range.taken.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      spin_pause();
      if (spins >= kSpins) sched_yield();
    }
  }

  static constexpr int kSpins = 2000;

  int size_ = 0;
  std::vector<Range> ranges_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

}  // namespace softbatch
