// Which segments a step reads, and which could lie elsewhere meanwhile: pages are lent to those
// that need them. Who moves their contents is told here what to move.
#include <algorithm>
#include <unordered_set>

#include "core/error.h"
#include "core/thread_table.h"

namespace apr {

StepNeeds ThreadTable::needs_of(const std::vector<ThreadId>& threads, std::vector<SegmentId> open) {
  StepNeeds needs;
  std::unordered_set<SegmentId> seen;
  const auto list = [&](const std::vector<Entry>& view) {
    for (const Entry& entry : view) open.push_back(entry.segment);
  };
  for (const ThreadId id : threads) list(at(id).view);
  ++reading_;
  const int64_t page_size = pool_.page_size();
  while (!open.empty()) {
    const SegmentId id = open.back();
    open.pop_back();
    if (!seen.insert(id).second) continue;
    Segment& segment = segments_.at(id);
    segment.read_last = reading_;
    needs.segments.push_back(id);
    needs.pages += segment.away_pages;
    if (segment.queued() == 0) continue;
    // Its queued tokens may have to run, under the view of whoever encodes them.
    list(segment.context);
    if (segment.writer != kNone) list(at(segment.writer).view);
    const int64_t all = (segment.copied + segment.length() + page_size - 1) / page_size;
    needs.pages += all - std::max(std::ssize(segment.pages), segment.away_pages);
  }
  std::sort(needs.segments.begin(), needs.segments.end());
  return needs;
}

std::vector<SegmentId> ThreadTable::idle_segments(const std::vector<SegmentId>& besides) const {
  std::vector<std::pair<uint64_t, SegmentId>> found;
  segments_.for_each([&](SegmentId id, const Segment& segment) {
    if (segment.dropped_pages > 0 || segment.pages.empty()) return;
    if (std::binary_search(besides.begin(), besides.end(), id)) return;
    found.emplace_back(segment.read_last, id);
  });
  std::sort(found.begin(), found.end());
  std::vector<SegmentId> ids;
  for (const auto& [last, id] : found) ids.push_back(id);
  return ids;
}

void ThreadTable::send_away(SegmentId id) {
  touch();
  Segment& segment = segments_.at(id);
  if (segment.dropped_pages > 0) {
    invalid("offload: segment " + std::to_string(id) + " is not whole here");
  }
  // One that was on its way back is away as it was.
  segment.away_pages = std::max(segment.away_pages, std::ssize(segment.pages));
  segments_.free_pages(segment);
}

std::vector<PageId> ThreadTable::make_place(SegmentId id) {
  touch();
  Segment& segment = segments_.at(id);
  pool_.require(segment.away_pages - std::ssize(segment.pages));
  segments_.grow_pages(segment, segment.away_pages * pool_.page_size());
  return segment.pages;
}

void ThreadTable::bring_back(SegmentId id) {
  touch();
  Segment& segment = segments_.at(id);
  if (std::ssize(segment.pages) != segment.away_pages) {
    invalid("offload: segment " + std::to_string(id) + " has no place to come back to");
  }
  segment.away_pages = 0;
}

int64_t ThreadTable::offloaded_pages() const {
  int64_t pages = 0;
  segments_.for_each([&](SegmentId, const Segment& segment) { pages += segment.away_pages; });
  return pages;
}

}  // namespace apr
