// Owns segments: runs of tokens on pages, written by one thread at a time, read by any number.
#include "core/segment_store.h"

#include <iterator>
#include <unordered_set>
#include <utility>

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
  Segment& segment = at(id);
  if (--segment.references > 0) return;
  if (segment.context_references > 0 || destroy(id)) sweep();
}

bool SegmentStore::destroy(SegmentId id) {
  // What it held may go with it, and so on: a worklist keeps the stack flat.
  std::vector<SegmentId> work{id};
  bool lost_a_holder = false;
  while (!work.empty()) {
    const SegmentId current = work.back();
    work.pop_back();
    const Segment segment = std::move(at(current));
    segments_.erase(current);
    for (const PageId page : segment.pages) pool_.release(page);
    states_.release_all(segment.states);
    for (const Entry& entry : segment.context) {
      if (entry.segment == current || !contains(entry.segment)) continue;
      Segment& held = at(entry.segment);
      --held.context_references;
      if (held.references > 0) continue;
      if (held.context_references == 0) {
        work.push_back(entry.segment);
      } else {
        lost_a_holder = true;
      }
    }
  }
  return lost_a_holder;
}

// Contexts of live regions may hold one another in a ring, which counting alone never frees: what
// no view and no handle leads to is found by marking.
void SegmentStore::sweep() {
  std::unordered_set<SegmentId> marked;
  std::vector<SegmentId> work;
  for (const auto& [id, segment] : segments_) {
    if (segment.references > 0) work.push_back(id);
  }
  while (!work.empty()) {
    const SegmentId current = work.back();
    work.pop_back();
    if (!marked.insert(current).second) continue;
    for (const Entry& entry : at(current).context) work.push_back(entry.segment);
  }
  std::vector<SegmentId> lost;
  for (const auto& [id, segment] : segments_) {
    if (marked.count(id) == 0) lost.push_back(id);
  }
  for (const SegmentId id : lost) {
    if (contains(id)) destroy(id);
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

void SegmentStore::drop_states_after(Segment& segment, int64_t count) {
  while (!segment.states.empty() && segment.states.rbegin()->first > count) {
    states_.release(segment.states.rbegin()->second);
    segment.states.erase(std::prev(segment.states.end()));
  }
}

void SegmentStore::set_context(SegmentId id, std::vector<Entry> context, Visibility visibility) {
  Segment& segment = at(id);
  for (const Entry& entry : context) {
    if (entry.segment != id) ++at(entry.segment).context_references;
  }
  segment.context = std::move(context);
  segment.context_visibility = visibility;
}

void SegmentStore::clear_context(SegmentId id) {
  std::vector<Entry> context;
  context.swap(at(id).context);
  bool lost_a_holder = false;
  for (const Entry& entry : context) {
    if (entry.segment == id) continue;
    Segment& held = at(entry.segment);
    --held.context_references;
    if (held.references > 0) continue;
    lost_a_holder |= held.context_references > 0 || destroy(entry.segment);
  }
  if (lost_a_holder) sweep();
}

}  // namespace apr
