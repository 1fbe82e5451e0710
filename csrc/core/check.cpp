// Whether the table is whole: every page, reference and writer where it belongs. What is found here
// is a fault of ours.
#include <algorithm>
#include <unordered_map>

#include "core/error.h"
#include "core/shown.h"
#include "core/thread_table.h"
#include "core/view.h"

namespace apr {
namespace {

using Found = std::vector<std::string>;

std::string segment_name(SegmentId id) { return "segment " + std::to_string(id); }

void check_segment(SegmentId id, const Segment& segment, int64_t page_size, bool granted,
                   Found& found) {
  if (segment.encoded < -segment.copied || segment.encoded > segment.length()) {
    found.push_back(segment_name(id) + " has " + std::to_string(segment.encoded) +
                    " encoded tokens of " + std::to_string(segment.length()));
  }
  const int64_t slots = segment.copied + segment.encoded;
  const int64_t pages = (slots + page_size - 1) / page_size;
  const int64_t held = std::ssize(segment.pages);
  if (held < pages || (held > pages && !granted)) {
    found.push_back(segment_name(id) + " has " + std::to_string(held) + " pages for " +
                    std::to_string(slots) + " tokens");
  }
  if (std::count(segment.pages.begin(), segment.pages.end(), kAwayPage) != segment.away_pages) {
    found.push_back(segment_name(id) + " does not know how many of its pages are away");
  }
  const auto dropped = std::count(segment.pages.begin(), segment.pages.end(), kNoPage);
  if (dropped > 0 && segment.queued() > 0) {
    found.push_back(segment_name(id) + " lacks pages that its queued tokens will see");
  }
  if (dropped != segment.dropped_pages) {
    found.push_back(segment_name(id) + " lacks " + std::to_string(dropped) + " pages, and counts " +
                    std::to_string(segment.dropped_pages));
  }
}

}  // namespace

std::vector<std::string> ThreadTable::check(int64_t handles) const {
  Found found;
  std::vector<int> owners(static_cast<size_t>(pool_.num_pages()), 0);
  for (const PageId page : pool_.free_pages()) ++owners.at(static_cast<size_t>(page));
  std::unordered_map<SegmentId, int64_t> references;
  std::unordered_map<SegmentId, std::unordered_map<SegmentId, int32_t>> holders;

  const auto see = [&](const std::string& reader, const Entry& entry) {
    if (!segments_.contains(entry.segment)) return;
    if (lacks_pages(entry, segments_.at(entry.segment), pool_.page_size())) {
      found.push_back(reader + " sees tokens whose pages were dropped");
    }
  };
  const auto know_reader = [&](ThreadId reader, const Entry& entry) {
    if (!segments_.contains(entry.segment)) return;
    const Segment& segment = segments_.at(entry.segment);
    if (segment.writer == kNone || segment.writer == reader) return;
    if (entry.hi == kLive ? !segment.followed : entry.hi > segment.pinned) {
      found.push_back(segment_name(entry.segment) + " does not know who reads it");
    }
  };

  for (const auto& [id, thread] : threads_) {
    for (const Entry& entry : thread.view) {
      ++references[entry.segment];
      see(thread_name(id), entry);
      know_reader(id, entry);
    }
    if (!segments_.contains(thread.tail)) {
      found.push_back(thread_name(id) + " writes a segment that is not there");
      continue;
    }
    const bool listed = std::any_of(thread.view.begin(), thread.view.end(),
                                    [&](const Entry& e) { return e.segment == thread.tail; });
    if (!listed || segments_.at(thread.tail).writer != id) {
      found.push_back(thread_name(id) + " does not list what it writes, or another writes it");
    }
    for (size_t i = 0; i < thread.children.size(); ++i) {
      const ThreadId child = thread.children[i];
      if (!alive(child) || at(child).parent != id || at(child).place != i) {
        found.push_back(thread_name(id) + " has a child that is not its own");
      }
    }
    if (thread.parent == kNone) continue;
    if (!alive(thread.parent)) {
      found.push_back(thread_name(id) + " has a parent that was released");
      continue;
    }
    const std::vector<ThreadId>& siblings = at(thread.parent).children;
    if (thread.place >= siblings.size() || siblings[thread.place] != id) {
      found.push_back(thread_name(id) + " is no child of its parent");
    }
  }
  segments_.for_each([&](SegmentId id, const Segment& segment) {
    check_segment(id, segment, pool_.page_size(), granted_, found);
    for (const PageId page : segment.pages) {
      if (page >= 0) ++owners.at(static_cast<size_t>(page));
    }
    for (const PageId page : segment.place) ++owners.at(static_cast<size_t>(page));
    for (const Entry& entry : segment.context) {
      if (entry.segment != id) ++holders[entry.segment][id];
      see(segment_name(id), entry);
      if (entry.segment != id) know_reader(kNone, entry);
    }
    if (segment.writer != kNone && (!alive(segment.writer) || at(segment.writer).tail != id)) {
      found.push_back(segment_name(id) + " is written by a thread that writes another, or none");
    }
  });
  int64_t held = 0;
  segments_.for_each([&](SegmentId id, const Segment& segment) {
    const int64_t beyond_views = segment.references - references[id];
    held += beyond_views;
    if (beyond_views < 0 || segment.holders != holders[id]) {
      found.push_back(segment_name(id) + " is held by others than it knows of");
    }
    references.erase(id);
    holders.erase(id);
  });
  if (!references.empty() || !holders.empty()) {
    found.push_back("a view lists a segment that is not there");
  }
  if (held != handles) {
    found.push_back(std::to_string(held) + " references of segments for " +
                    std::to_string(handles) + " handles");
  }
  const auto wrong = std::count_if(owners.begin(), owners.end(), [](int n) { return n != 1; });
  if (wrong > 0) {
    found.push_back(std::to_string(wrong) + " pages have no owner, or several");
  }
  return found;
}

}  // namespace apr
