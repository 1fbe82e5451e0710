// What all views together show of each segment: pages that several threads read, and pages that
// nobody sees any more.
#include "core/shown.h"

#include <algorithm>

#include "core/error.h"
#include "core/thread_table.h"
#include "core/view.h"

namespace apr {

PageRange shown_pages(const Entry& entry, const Segment& segment, int64_t page_size) {
  const int64_t slots = segment.copied + std::min(entry.hi, segment.encoded);
  const int64_t end = (slots + page_size - 1) / page_size;
  return {std::min((segment.copied + entry.lo) / page_size, end), end};
}

bool lacks_pages(const Entry& entry, const Segment& segment, int64_t page_size, bool now) {
  if (segment.dropped_pages == 0 && (!now || segment.away_pages == 0)) return false;
  const PageRange shown = shown_pages(entry, segment, page_size);
  const auto begin = segment.pages.begin();
  return std::any_of(begin + shown.begin, begin + shown.end,
                     [now](PageId page) { return page == kNoPage || (now && page == kAwayPage); });
}

namespace {

struct Shown {
  int64_t entries = 0;  // of threads
  std::vector<PageRange> pages;
};
using ShownSegments = std::unordered_map<SegmentId, Shown>;

void show(const SegmentStore& segments, const std::vector<Entry>& view, int64_t page_size,
          ShownSegments& shown) {
  for (const Entry& entry : view) {
    Shown& one = shown[entry.segment];
    ++one.entries;
    one.pages.push_back(shown_pages(entry, segments.at(entry.segment), page_size));
    if (entry.hi == kLive) one.pages.back().end = kLive;
  }
}

// What a handle holds stays whole, as it may yet be put into any view, and so does what has tokens
// queued, which will see the rest of it.
void drop_hidden_pages(SegmentStore& segments, ShownSegments& shown) {
  for (auto& [id, one] : shown) {
    Segment& segment = segments.at(id);
    if (segment.references > one.entries || segment.queued() > 0) continue;
    std::sort(one.pages.begin(), one.pages.end(),
              [](const PageRange& a, const PageRange& b) { return a.begin < b.begin; });
    auto range = one.pages.begin();
    int64_t seen_to = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(segment.pages.size()); ++i) {
      for (; range != one.pages.end() && range->begin <= i; ++range) {
        seen_to = std::max(seen_to, range->end);
      }
      if (i >= seen_to) segments.drop_page(segment, static_cast<size_t>(i));
    }
  }
}

// Pages that at least two of the ranges, one of each thread, have in common.
int64_t pages_in_common(const std::vector<PageRange>& ranges) {
  std::vector<std::pair<int64_t, int>> changes;
  for (const PageRange& range : ranges) {
    changes.emplace_back(range.begin, 1);
    changes.emplace_back(range.end, -1);
  }
  std::sort(changes.begin(), changes.end());
  int64_t common = 0;
  int readers = 0;
  for (size_t i = 0; i + 1 < changes.size(); ++i) {
    readers += changes[i].second;
    if (readers > 1) common += changes[i + 1].first - changes[i].first;
  }
  return common;
}

}  // namespace

void ThreadTable::free_hidden(const Thread& thread) {
  ShownSegments shown;
  show(segments_, thread.view, pool_.page_size(), shown);
  // Contexts of others show it too.
  std::erase_if(shown,
                [this](const auto& one) { return !segments_.at(one.first).holders.empty(); });
  drop_hidden_pages(segments_, shown);
}

void ThreadTable::free_hidden() {
  ShownSegments shown;
  for (const auto& [id, thread] : threads_) show(segments_, thread.view, pool_.page_size(), shown);
  segments_.for_each([&](SegmentId, const Segment& segment) {
    ShownSegments encoders;
    show(segments_, segment.context, pool_.page_size(), encoders);
    for (const auto& [id, one] : encoders) {
      std::vector<PageRange>& pages = shown[id].pages;
      pages.insert(pages.end(), one.pages.begin(), one.pages.end());
    }
  });
  drop_hidden_pages(segments_, shown);
}

void ThreadTable::make_room(int64_t pages) {
  if (pages > pool_.num_free()) free_hidden();
}

Sharing ThreadTable::sharing() const {
  Sharing result;
  std::unordered_map<SegmentId, std::vector<PageRange>> readers;
  const int64_t page_size = pool_.page_size();
  for (const auto& [id, thread] : threads_) {
    int64_t seen = 0;
    std::unordered_map<SegmentId, int64_t> counted;  // pages of this thread's ranges before
    for (Entry entry : thread.view) {
      const Segment& segment = segments_.at(entry.segment);
      entry.hi = std::min(visible_end(entry, segment, IdleReader{thread.tail}), segment.encoded);
      if (entry.hi <= entry.lo) continue;
      seen += entry.hi - entry.lo;
      PageRange pages = shown_pages(entry, segment, page_size);
      int64_t& before = counted[entry.segment];
      pages.begin = std::max(pages.begin, before);
      before = std::max(before, pages.end);
      if (pages.begin < pages.end) readers[entry.segment].push_back(pages);
    }
    result.seen_tokens += seen;
    result.replicated_pages += (seen + page_size - 1) / page_size;
  }
  for (const auto& [id, ranges] : readers) result.shared_pages += pages_in_common(ranges);
  segments_.for_each([&](SegmentId, const Segment& segment) {
    const int64_t stored = segment.copied + segment.encoded;
    result.stored_tokens += stored;
    for (size_t i = 0; segment.dropped_pages > 0 && i < segment.pages.size(); ++i) {
      const int64_t before = static_cast<int64_t>(i) * page_size;
      if (segment.pages[i] == kNoPage) result.stored_tokens -= std::min(page_size, stored - before);
    }
  });
  return result;
}

}  // namespace apr
