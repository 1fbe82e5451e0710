// Views of threads: what they may list, and what they add up to.
#include "core/view.h"

#include <algorithm>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "core/error.h"
#include "core/thread_table.h"

namespace apr {

int64_t ThreadTable::tail_offset(const Thread& thread) const {
  int64_t found = 0;
  walk_view(segments_, thread.view, IdleReader{thread.tail},
            [&](const Entry& entry, const Segment&, int64_t offset, int64_t) {
              if (entry.segment == thread.tail) found = offset;
            });
  return found;
}

void ThreadTable::check_view(const std::vector<Entry>& view, SegmentId own) const {
  if (keeps_states_ && !view.empty()) {
    invalid("view: this table keeps layer states, which have read no keys of others; fork instead");
  }
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
    if (entry.lo != 0 && entry.lo != -segment.copied) {
      invalid("view: got lo " + std::to_string(entry.lo) + "; expected 0 or " +
              std::to_string(-segment.copied));
    }
    if (entry.segment == own && entry.hi != kLive) {
      invalid("view: the segment that the thread writes takes no hi; leave it out");
    }
  }
}

void ThreadTable::check_rotation(const std::vector<Entry>& view, SegmentId own) const {
  if (can_rotate_) return;
  int64_t own_difference = 0;
  walk_view(segments_, view, IdleReader{own},
            [&](const Entry& entry, const Segment& segment, int64_t offset, int64_t) {
              if (entry.segment == own) own_difference = offset - segment.base;
            });
  walk_view(segments_, view, IdleReader{own},
            [&](const Entry& entry, const Segment& segment, int64_t offset, int64_t end) {
              if (end <= entry.lo || offset - segment.base == own_difference) return;
              throw Error(ErrorKind::kUnsupportedRope,
                          "this model's positions cannot be re-rotated: a segment written at "
                          "position " +
                              std::to_string(segment.base) + " would be read at " +
                              std::to_string(offset - own_difference) +
                              "; keep keys where they were written (fork, or join with "
                              "positions=\"max\" or reencode=True)");
            });
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
    const Segment& segment = segments_.at(entry.segment);
    total += std::max<int64_t>(visible_end(entry, segment, IdleReader{thread.tail}) - entry.lo, 0);
  }
  return total;
}

int64_t ThreadTable::position(ThreadId id) const {
  const Thread& thread = at(id);
  const Segment& tail = segments_.at(thread.tail);
  return tail_offset(thread) + tail.stride * tail.length();
}

Sharing ThreadTable::sharing() {
  Sharing result;
  std::unordered_map<SegmentId, std::pair<int64_t, int64_t>> readers;  // count, furthest token
  const int64_t page_size = pool_.page_size();
  for (const auto& [id, thread] : threads_) {
    int64_t seen = 0;
    for (const Entry& entry : thread.view) {
      const Segment& segment = segments_.at(entry.segment);
      const int64_t hi =
          std::min(visible_end(entry, segment, IdleReader{thread.tail}), segment.encoded);
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
      result.shared_pages += (segment.copied + reader.second + page_size - 1) / page_size;
    }
  }
  segments_.for_each([&](SegmentId, const Segment& segment) {
    result.stored_tokens += segment.copied + segment.encoded;
  });
  return result;
}

std::vector<int32_t> ThreadTable::tokens(ThreadId id) const {
  const Thread& thread = at(id);
  std::vector<int32_t> result;
  for (const Entry& entry : thread.view) {
    const Segment& segment = segments_.at(entry.segment);
    const int64_t hi = visible_end(entry, segment, IdleReader{thread.tail});
    if (hi > entry.lo) {
      result.insert(result.end(), segment.tokens.begin() + segment.copied + entry.lo,
                    segment.tokens.begin() + segment.copied + hi);
    }
  }
  return result;
}

}  // namespace apr
