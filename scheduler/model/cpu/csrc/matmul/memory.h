// Memory for weights and for a step's working tensors, in huge pages where it is large: a step reads every weight once,
// and with small pages waits for their addresses as much as for the data.

#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace softbatch {

// Memory that grows and is kept; what it held is lost when it grows.
template <typename T>
class Buffer {
 public:
  T* resize(size_t count) {
    if (count > count_) {
      const size_t align = count * sizeof(T) >= kHugePage ? kHugePage : 64;
      const size_t bytes = (count * sizeof(T) + align - 1) / align * align;
      void* p = std::aligned_alloc(align, bytes);
      if (p == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      if (align == kHugePage) madvise(p, bytes, MADV_HUGEPAGE);  // a wish: refused where there are none
#endif
      data_.reset(static_cast<T*>(p));
      count_ = count;
    }
    return data_.get();
  }
  T* data() const { return data_.get(); }

 private:
  static constexpr size_t kHugePage = 1 << 21;
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  size_t count_ = 0;
};

// Pieces of memory that live as long as the arena, one behind the other. Threads may ask at the same time.
class Arena {
 public:
  template <typename T>
  T* allocate(size_t count) {
    const std::lock_guard lock(mutex_);
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > free_) {
      free_ = bytes > kChunk ? bytes : kChunk;
      next_ = chunks_.emplace_back().resize(free_);
    }
    char* found = next_;
    next_ += bytes;
    free_ -= bytes;
    return reinterpret_cast<T*>(found);
  }

 private:
  static constexpr size_t kChunk = 64 << 20;  // pages that are not used are never there
  std::mutex mutex_;
  std::vector<Buffer<char>> chunks_;
  char* next_ = nullptr;
  size_t free_ = 0;
};

}  // namespace softbatch
