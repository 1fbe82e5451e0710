// Owns segments: runs of tokens on pages, written by one thread at a time, read by any number.
#include "core/segment_store.h"

#include <algorithm>
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

Segment& SegmentStore::place(SegmentId id, Segment segment) {
  const auto [found, is_new] = segments_.emplace(id, std::move(segment));
  if (!is_new || id < 0) invalid("open: segment " + std::to_string(id) + " is there already");
  next_ = std::max(next_, id + 1);
  return found->second;
}

Segment& SegmentStore::at(SegmentId id) {
  const auto found = segments_.find(id);
  if (found == segments_.end()) {
    throw Error(ErrorKind::kInvalidInput,
                "segment " + std::to_string(id) +
                    " is not in this session: it was freed with its last view, let go by "
                    "refresh(), or belongs to another session; make it again, or list segments "
                    "of the session that made them");
  }
  return found->second;
}

const Segment& SegmentStore::at(SegmentId id) const {
  return const_cast<SegmentStore*>(this)->at(id);
}

void SegmentStore::release(SegmentId id) {
  if (--at(id).references == 0) collect({id});
}

void SegmentStore::clear() {
  for (auto& [id, segment] : segments_) {
    shrink_pages(segment, 0);
    states_.release_all(segment.states);
  }
  segments_.clear();
}

void SegmentStore::collect(std::vector<SegmentId> suspects) {
  // A worklist keeps the stack flat.
  while (!suspects.empty()) {
    const SegmentId suspect = suspects.back();
    suspects.pop_back();
    if (!contains(suspect)) continue;
    for (const SegmentId id : lost_with(suspect)) {
      Segment segment = std::move(at(id));
      segments_.erase(id);
      shrink_pages(segment, 0);
      states_.release_all(segment.states);
      let_go(id, segment.context, suspects);
    }
  }
}

// A segment and all whose contexts lead to it, where none of them is in a view or a handle; else
// nothing. Contexts of live regions may hold one another in a ring, which counting never frees.
std::vector<SegmentId> SegmentStore::lost_with(SegmentId id) const {
  std::vector<SegmentId> found{id};
  std::unordered_set<SegmentId> seen{id};
  for (size_t i = 0; i < found.size(); ++i) {
    const Segment& segment = at(found[i]);
    if (segment.references > 0) return {};
    for (const auto& [holder, times] : segment.holders) {
      if (seen.insert(holder).second) found.push_back(holder);
    }
  }
  return found;
}

void SegmentStore::let_go(SegmentId holder, const std::vector<Entry>& context,
                          std::vector<SegmentId>& suspects) {
  for (const Entry& entry : context) {
    if (entry.segment == holder || !contains(entry.segment)) continue;
    Segment& held = at(entry.segment);
    const auto found = held.holders.find(holder);
    if (--found->second == 0) held.holders.erase(found);
    if (held.references == 0) suspects.push_back(entry.segment);
  }
}

std::pair<SegmentId, int64_t> SegmentStore::written_at(SegmentId id, int64_t index) const {
  const Segment& segment = at(id);
  int64_t first = -segment.copied;
  for (const TokenRange& range : segment.copied_from) {
    if (index < first + range.count && index < 0) {
      return {range.segment, range.from + index - first};
    }
    first += range.count;
  }
  return {id, index};
}

std::optional<int64_t> SegmentStore::index_of(SegmentId id,
                                              std::pair<SegmentId, int64_t> written) const {
  if (written.first == id) return written.second;
  const Segment& segment = at(id);
  int64_t first = -segment.copied;
  for (const TokenRange& range : segment.copied_from) {
    const int64_t behind = written.second - range.from;
    if (range.segment == written.first && behind >= 0 && behind < range.count) {
      return first + behind;
    }
    first += range.count;
  }
  return std::nullopt;
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
    drop_page(segment, segment.pages.size() - 1);
    --segment.dropped_pages;
    segment.pages.pop_back();
  }
}

void SegmentStore::drop_page(Segment& segment, size_t index) {
  PageId& page = segment.pages[index];
  if (page == kNoPage) return;
  if (page == kAwayPage) {
    free_place(segment);  // it is of another size now
    --segment.away_pages;
  } else {
    pool_.release(page);
  }
  page = kNoPage;
  ++segment.dropped_pages;
}

void SegmentStore::free_place(Segment& segment) {
  for (const PageId page : segment.place) pool_.release(page);
  segment.place.clear();
}

void SegmentStore::drop_states_after(Segment& segment, int64_t count) {
  while (!segment.states.empty() && segment.states.rbegin()->first > count) {
    states_.release(segment.states.rbegin()->second);
    segment.states.erase(std::prev(segment.states.end()));
  }
}

void SegmentStore::set_context(SegmentId id, std::vector<Entry> context, Visibility visibility) {
  for (const Entry& entry : context) {
    if (entry.segment == id) continue;
    ++at(entry.segment).holders[id];
    note_reader(entry, kNone);
  }
  Segment& segment = at(id);
  segment.context = std::move(context);
  segment.context_visibility = visibility;
}

void SegmentStore::clear_context(SegmentId id) {
  std::vector<Entry> context;
  context.swap(at(id).context);
  std::vector<SegmentId> suspects;
  let_go(id, context, suspects);
  collect(std::move(suspects));
}

}  // namespace apr
