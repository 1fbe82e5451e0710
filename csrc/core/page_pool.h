// Owns page numbers: which are free, and how many owners each of the others has.
#pragma once

#include <vector>

#include "core/types.h"

namespace apr {

class PagePool {
 public:
  PagePool(int64_t num_pages, int64_t page_size);

  void require(int64_t pages) const;  // throws kOutOfPages where fewer are free
  PageId allocate();                  // one owner; throws kOutOfPages
  void retain(PageId page);
  void release(PageId page);

  int64_t page_size() const { return page_size_; }
  int64_t num_pages() const { return static_cast<int64_t>(owners_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_used() const { return num_pages() - num_free(); }
  int64_t peak_used() const { return peak_used_; }

 private:
  int64_t page_size_;
  int64_t peak_used_ = 0;
  std::vector<int32_t> owners_;
  std::vector<PageId> free_;  // a stack: pages used lately are used again first
};

}  // namespace apr
