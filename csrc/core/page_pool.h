// Owns page numbers: which are free, and which a segment has.
#pragma once

#include <vector>

#include "core/types.h"

namespace apr {

class PagePool {
 public:
  PagePool(int64_t num_pages, int64_t page_size);

  const std::vector<PageId>& free_pages() const { return free_; }
  void require(int64_t pages) const;  // throws kOutOfPages where fewer are free
  PageId allocate();                  // throws kOutOfPages
  void release(PageId page) { free_.push_back(page); }
  void grow(int64_t num_pages);  // to so many; throws kInvalidInput for too many

  int64_t page_size() const { return page_size_; }
  int64_t num_pages() const { return num_pages_; }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_used() const { return num_pages() - num_free(); }
  int64_t peak_used() const { return peak_used_; }

 private:
  int64_t num_pages_ = 0, page_size_;
  int64_t peak_used_ = 0;
  std::vector<PageId> free_;  // a stack: pages used lately are used again first
};

}  // namespace apr
