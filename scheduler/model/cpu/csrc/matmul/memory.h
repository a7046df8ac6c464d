// Memory for weights and for a step's working tensors. Large pieces lie in huge pages.
//
// A step reads every weight once. With small pages it would wait for address translation as long as for the data.

#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace softbatch {

// Memory that is kept and can grow. Growing loses its contents.
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
      if (align == kHugePage) madvise(p, bytes, MADV_HUGEPAGE);  // only a request: there may be none
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

// Hands out pieces of memory, one behind the other, that live as long as the arena. Thread-safe.
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
    allocated_ += bytes;
    return reinterpret_cast<T*>(found);
  }
  int64_t allocated() const { return allocated_; }

 private:
  static constexpr size_t kChunk = 64 << 20;  // the system provides only the pages that are used
  std::mutex mutex_;
  std::vector<Buffer<char>> chunks_;
  char* next_ = nullptr;
  size_t free_ = 0;
  int64_t allocated_ = 0;
};

}  // namespace softbatch
