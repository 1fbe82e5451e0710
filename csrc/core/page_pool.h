// Owns page numbers: which are free, and which a segment has.
#pragma once

#include <vector>

#include "core/types.h"

namespace apr {

class PagePool {
 public:
  // It may grow to `most_pages`. Throws kInvalidInput for pages that there cannot be.
  PagePool(int64_t num_pages, int64_t page_size, int64_t most_pages);

  const std::vector<PageId>& free_pages() const { return free_; }
  void require(int64_t pages) const;  // throws kOutOfPages where fewer are free
  PageId allocate();                  // throws kOutOfPages
  void release(PageId page) { free_.push_back(page); }
  void grow(int64_t num_pages);  // to so many; throws kInvalidInput past the most

  int64_t page_size() const { return page_size_; }
  int64_t num_pages() const { return num_pages_; }
  int64_t most_pages() const { return most_pages_; }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_used() const { return num_pages() - num_free(); }
  int64_t peak_used() const { return peak_used_; }

 private:
  int64_t num_pages_ = 0, page_size_, most_pages_;
  int64_t peak_used_ = 0;
  std::vector<PageId> free_;  // a stack: pages used lately are used again first
};

}  // namespace apr
