// Which pages a step needs, and which could lie elsewhere meanwhile: pages are lent to those that
// need them. Who moves their contents is told here what to move.
#include <algorithm>
#include <unordered_map>

#include "core/error.h"
#include "core/thread_table.h"

namespace apr {

StepNeeds ThreadTable::needs_of(const std::vector<ThreadId>& threads,
                                const std::vector<SegmentId>& handles, bool all_of_it) {
  StepNeeds needs;
  std::unordered_map<SegmentId, int64_t> runs;  // up to which token, of what has to run
  std::vector<const std::vector<Entry>*> open;
  ++reading_;
  const auto read = [&](SegmentId id) {
    Segment& segment = segments_.at(id);
    if (segment.read_last != reading_ && segment.away_pages > 0) {
      needs.pages += segment.away_pages - std::ssize(segment.place);
      needs.away.push_back(id);
    }
    if (all_of_it && segment.read_last != reading_ && segment.queued() > 0) {
      open.push_back(&segment.context);
      if (segment.writer != kNone) open.push_back(&at(segment.writer).view);
    }
    segment.read_last = reading_;
  };
  const auto run = [&](SegmentId id, int64_t upto) {
    const Segment& segment = segments_.at(id);
    if (upto <= segment.encoded) return;
    const auto [found, fresh] = runs.try_emplace(id, upto);
    found->second = std::max(found->second, upto);
    if (!fresh) return;
    if (segment.writer != kNone) {
      open.push_back(&at(segment.writer).view);
    } else {
      open.push_back(&segment.context);
      read(id);
    }
  };
  for (const ThreadId id : threads) {
    open.push_back(&at(id).view);
    run(at(id).tail, segments_.at(at(id).tail).length());
  }
  for (const SegmentId id : handles) read(id);
  while (!open.empty()) {
    const std::vector<Entry>& view = *open.back();
    open.pop_back();
    for (const Entry& entry : view) {  // what of it has to run: as Step::require has it
      const Segment& segment = segments_.at(entry.segment);
      read(entry.segment);
      if (entry.hi != kLive) {
        run(entry.segment, std::min(entry.hi, segment.length()));
      } else if (segment.settled()) {
        run(entry.segment, segment.length());
      }
    }
  }
  const int64_t page_size = pool_.page_size();
  for (const auto& [id, upto] : runs) {
    const Segment& segment = segments_.at(id);
    const int64_t all = (segment.copied + upto + page_size - 1) / page_size;
    needs.pages += std::max<int64_t>(all - std::ssize(segment.pages), 0);
  }
  return needs;
}

std::vector<SegmentId> ThreadTable::idle_segments() const {
  std::vector<std::pair<uint64_t, SegmentId>> found;
  segments_.for_each([&](SegmentId id, const Segment& segment) {
    const int64_t here = std::ssize(segment.pages) - segment.dropped_pages - segment.away_pages +
                         std::ssize(segment.place);
    if (here > 0 && segment.read_last != reading_) found.emplace_back(segment.read_last, id);
  });
  std::sort(found.begin(), found.end());
  std::vector<SegmentId> ids;
  for (const auto& [last, id] : found) ids.push_back(id);
  return ids;
}

void ThreadTable::send_away(SegmentId id) {
  touch();
  Segment& segment = segments_.at(id);
  segments_.free_place(segment);
  for (PageId& page : segment.pages) {
    if (page < 0) continue;
    pool_.release(page);
    page = kAwayPage;
    ++segment.away_pages;
  }
}

std::vector<PageId> ThreadTable::make_place(SegmentId id) {
  touch();
  Segment& segment = segments_.at(id);
  pool_.require(segment.away_pages - std::ssize(segment.place));
  while (std::ssize(segment.place) < segment.away_pages) segment.place.push_back(pool_.allocate());
  return segment.place;
}

void ThreadTable::bring_back(SegmentId id) {
  touch();
  Segment& segment = segments_.at(id);
  if (std::ssize(segment.place) != segment.away_pages) {
    invalid("offload: segment " + std::to_string(id) + " has no place to come back to");
  }
  auto place = segment.place.begin();
  for (PageId& page : segment.pages) {
    if (page == kAwayPage) page = *place++;
  }
  segment.place.clear();
  segment.away_pages = 0;
}

bool ThreadTable::follows_others(const std::vector<ThreadId>& threads) const {
  return std::any_of(threads.begin(), threads.end(), [this](ThreadId id) {
    const Thread& thread = at(id);
    return std::any_of(thread.view.begin(), thread.view.end(), [&](const Entry& entry) {
      return entry.segment != thread.tail && entry.hi == kLive &&
             !segments_.at(entry.segment).settled();
    });
  });
}

int64_t ThreadTable::offloaded_pages() const {
  int64_t pages = 0;
  segments_.for_each([&](SegmentId, const Segment& segment) { pages += segment.away_pages; });
  return pages;
}

}  // namespace apr
