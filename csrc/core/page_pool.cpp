// Owns page numbers: which are free, and which a segment has.
#include "core/page_pool.h"

#include <algorithm>

#include "core/error.h"

namespace apr {

PagePool::PagePool(int64_t num_pages, int64_t page_size, int64_t most_pages)
    : page_size_(page_size), most_pages_(std::max(num_pages, most_pages)) {
  if (num_pages < 1 || page_size < 1 || most_pages_ > INT32_MAX / page_size) {
    throw Error(ErrorKind::kInvalidInput,
                "page pool: got " + std::to_string(most_pages_) + " pages of " +
                    std::to_string(page_size) +
                    " tokens; expected at least one of each and fewer than 2^31 tokens in all");
  }
  grow(num_pages);
}

void PagePool::grow(int64_t num_pages) {
  if (num_pages > most_pages_) {
    throw Error(ErrorKind::kInvalidInput, "page pool: got " + std::to_string(num_pages) +
                                              " pages; expected at most " +
                                              std::to_string(most_pages_));
  }
  if (num_pages <= num_pages_) return;
  std::vector<PageId> fresh;                      // used when those that were there are
  fresh.reserve(static_cast<size_t>(num_pages));  // a release takes no memory
  for (int64_t page = num_pages - 1; page >= num_pages_; --page) {
    fresh.push_back(static_cast<PageId>(page));
  }
  fresh.insert(fresh.end(), free_.begin(), free_.end());
  free_.swap(fresh);
  num_pages_ = num_pages;
}

void PagePool::require(int64_t pages) const {
  if (pages <= num_free()) return;
  throw Error(ErrorKind::kOutOfPages,
              "the KV pool is exhausted: " + std::to_string(num_used()) + " of " +
                  std::to_string(num_pages()) + " pages of " + std::to_string(page_size_) +
                  " tokens are in use; release threads, or open the Session with a larger "
                  "max_tokens");
}

PageId PagePool::allocate() {
  require(1);
  const PageId page = free_.back();
  free_.pop_back();
  peak_used_ = std::max(peak_used_, num_used());
  return page;
}

}  // namespace apr
