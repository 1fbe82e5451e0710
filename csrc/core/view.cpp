// Views of threads: where their entries stand, what they may list, and what they add up to.
#include <algorithm>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "core/error.h"
#include "core/thread_table.h"

namespace apr {

int64_t ThreadTable::visible_end(const Entry& entry, SegmentId own) const {
  const Segment& segment = segments_.at(entry.segment);
  if (entry.hi != kLive) return std::min(entry.hi, segment.length());
  // A living writer's queued tokens are not there before the step that encodes them.
  return entry.segment == own || segment.settled() ? segment.length() : segment.encoded;
}

std::vector<int64_t> ThreadTable::offsets(const std::vector<Entry>& view, SegmentId own) const {
  std::vector<int64_t> result(view.size());
  int64_t end = 0;
  for (size_t i = 0; i < view.size(); ++i) {
    const Segment& segment = segments_.at(view[i].segment);
    result[i] = view[i].offset == kMoving ? end : view[i].offset;
    end = std::max(end, result[i] + segment.stride * visible_end(view[i], own));
  }
  return result;
}

int64_t ThreadTable::view_end(const std::vector<Entry>& view, SegmentId own) const {
  const std::vector<int64_t> start = offsets(view, own);
  int64_t end = 0;
  for (size_t i = 0; i < view.size(); ++i) {
    const Segment& segment = segments_.at(view[i].segment);
    end = std::max(end, start[i] + segment.stride * visible_end(view[i], own));
  }
  return end;
}

void ThreadTable::check_view(const std::vector<Entry>& view, SegmentId own) const {
  std::unordered_set<SegmentId> seen;
  for (const Entry& entry : view) {
    const Segment& segment = segments_.at(entry.segment);
    if (!seen.insert(entry.segment).second) {
      invalid("view: segment " + std::to_string(entry.segment) +
              " stands twice; a segment may stand once in a view");
    }
    if (entry.hi != kLive && (entry.hi < entry.lo || entry.hi > segment.length())) {
      invalid("view: got hi " + std::to_string(entry.hi) + " for segment " +
              std::to_string(entry.segment) + "; expected 0 to its length " +
              std::to_string(segment.length()));
    }
    if (entry.lo != 0 && entry.lo != -segment.head) {
      invalid("view: got lo " + std::to_string(entry.lo) + "; expected 0 or " +
              std::to_string(-segment.head));
    }
    if (entry.segment == own && entry.hi != kLive) {
      invalid("view: the segment that the thread writes takes no hi; leave it out");
    }
  }
}

void ThreadTable::check_rotation(const std::vector<Entry>& view, SegmentId own) const {
  if (can_rotate_) return;
  const std::vector<int64_t> start = offsets(view, own);
  int64_t own_difference = 0;
  for (size_t i = 0; i < view.size(); ++i) {
    if (view[i].segment == own) own_difference = start[i] - segments_.at(own).base;
  }
  for (size_t i = 0; i < view.size(); ++i) {
    const Segment& segment = segments_.at(view[i].segment);
    if (visible_end(view[i], own) <= view[i].lo) continue;
    if (start[i] - segment.base != own_difference) {
      throw Error(ErrorKind::kUnsupportedRope,
                  "this model's positions cannot be re-rotated: a segment written at position " +
                      std::to_string(segment.base) + " would be read at " +
                      std::to_string(start[i] - own_difference) +
                      "; keep keys where they were written (fork, or join with positions=\"max\" "
                      "or reencode=True)");
    }
  }
}

void ThreadTable::retain_view(const std::vector<Entry>& view) {
  for (const Entry& entry : view) segments_.retain(entry.segment);
}

void ThreadTable::release_view(const std::vector<Entry>& view) {
  for (const Entry& entry : view) segments_.release(entry.segment);
}

int64_t ThreadTable::length(ThreadId id) const {
  const Thread& thread = at(id);
  int64_t total = 0;
  for (const Entry& entry : thread.view) {
    total += std::max<int64_t>(visible_end(entry, thread.tail) - entry.lo, 0);
  }
  return total;
}

int64_t ThreadTable::position(ThreadId id) const {
  const Thread& thread = at(id);
  const Segment& tail = segments_.at(thread.tail);
  return offsets(thread.view, thread.tail)[thread.tail_entry()] + tail.stride * tail.length();
}

Sharing ThreadTable::sharing() {
  Sharing result;
  std::unordered_map<SegmentId, std::pair<int64_t, int64_t>> readers;  // count, furthest token
  const int64_t page_size = pool_.page_size();
  for (const auto& [id, thread] : threads_) {
    int64_t seen = 0;
    for (const Entry& entry : thread.view) {
      const Segment& segment = segments_.at(entry.segment);
      const int64_t hi = std::min(visible_end(entry, thread.tail), segment.encoded);
      if (hi <= entry.lo) continue;
      seen += hi - entry.lo;
      auto& [count, furthest] = readers[entry.segment];
      furthest = count == 0 ? hi : std::min(furthest, hi);
      ++count;
    }
    result.seen_tokens += seen;
    result.replicated_pages += (seen + page_size - 1) / page_size;
  }
  for (const auto& [id, reader] : readers) {
    const Segment& segment = segments_.at(id);
    if (reader.first > 1) {
      result.shared_pages += (segment.head + reader.second + page_size - 1) / page_size;
    }
  }
  segments_.for_each([&](SegmentId, const Segment& segment) {
    result.stored_tokens += segment.head + segment.encoded;
  });
  return result;
}

std::vector<int32_t> ThreadTable::tokens(ThreadId id) const {
  const Thread& thread = at(id);
  std::vector<int32_t> result;
  for (const Entry& entry : thread.view) {
    const Segment& segment = segments_.at(entry.segment);
    const int64_t hi = visible_end(entry, thread.tail);
    if (hi > entry.lo) {
      result.insert(result.end(), segment.tokens.begin() + segment.head + entry.lo,
                    segment.tokens.begin() + segment.head + hi);
    }
  }
  return result;
}

}  // namespace apr
