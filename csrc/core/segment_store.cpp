// Owns segments: runs of tokens on pages, written by one thread at a time, read by any number.
#include "core/segment_store.h"

#include "core/error.h"

namespace apr {

SegmentId SegmentStore::create(int64_t base, int64_t stride) {
  if (stride < 1) {
    throw Error(ErrorKind::kInvalidInput,
                "segment: got stride " + std::to_string(stride) + "; expected at least 1");
  }
  const SegmentId id = next_++;
  Segment& segment = segments_[id];
  segment.base = base;
  segment.stride = stride;
  return id;
}

Segment& SegmentStore::at(SegmentId id) {
  const auto found = segments_.find(id);
  if (found == segments_.end()) {
    throw Error(ErrorKind::kInvalidInput,
                "segment " + std::to_string(id) +
                    " is not in this session: it was freed with its last view, or belongs to "
                    "another session; list segments of the session that made them");
  }
  return found->second;
}

const Segment& SegmentStore::at(SegmentId id) const {
  return const_cast<SegmentStore*>(this)->at(id);
}

void SegmentStore::release(SegmentId id) {
  // A context may hold further segments that hold contexts: a worklist keeps the stack flat.
  std::vector<SegmentId> work{id};
  while (!work.empty()) {
    const SegmentId current = work.back();
    work.pop_back();
    Segment& segment = at(current);
    if (--segment.references > 0) continue;
    for (const Entry& entry : segment.context) {
      if (entry.segment != current) work.push_back(entry.segment);
    }
    for (const PageId page : segment.pages) pool_.release(page);
    segments_.erase(current);
  }
}

void SegmentStore::grow_pages(Segment& segment, int64_t slots) {
  const int64_t size = pool_.page_size();
  while (static_cast<int64_t>(segment.pages.size()) * size < slots) {
    segment.pages.push_back(pool_.allocate());
  }
}

void SegmentStore::shrink_pages(Segment& segment, int64_t slots) {
  const int64_t size = pool_.page_size();
  const size_t keep = static_cast<size_t>((slots + size - 1) / size);
  while (segment.pages.size() > keep) {
    pool_.release(segment.pages.back());
    segment.pages.pop_back();
  }
}

void SegmentStore::clear_context(Segment& segment) {
  std::vector<Entry> context;
  context.swap(segment.context);
  for (const Entry& entry : context) {
    if (contains(entry.segment) && &at(entry.segment) != &segment) release(entry.segment);
  }
}

}  // namespace apr
