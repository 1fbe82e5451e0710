// Views of threads: what they may list, and what they add up to.
#include "core/view.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "core/error.h"
#include "core/shown.h"
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

void ThreadTable::check_given_view(const std::vector<Entry>& view, SegmentId own) const {
  if (keeps_states_ && !view.empty()) {
    invalid("view: this table keeps layer states, which have read no keys of others; fork instead");
  }
  check_view(view, own);
}

void ThreadTable::check_view(const std::vector<Entry>& view, SegmentId own) const {
  std::unordered_map<SegmentId, int64_t> seen;  // up to which token
  for (const Entry& entry : view) {
    const Segment& segment = segments_.at(entry.segment);
    const auto [found, fresh] = seen.try_emplace(entry.segment, entry.hi);
    if (!fresh) {
      if (entry.lo < found->second || entry.segment == own || entry.hi == kLive) {
        invalid("view: segment " + std::to_string(entry.segment) +
                " stands twice; expected ranges [lo, hi) that follow one another, each with its "
                "hi, of a segment that the thread does not write");
      }
      found->second = entry.hi;
    }
    const bool whole = entry.lo == 0 || entry.lo == -segment.copied;
    if (entry.lo < -segment.copied || entry.lo > segment.length() ||
        (entry.segment == own && !whole)) {
      invalid("view: got lo " + std::to_string(entry.lo) + " for segment " +
              std::to_string(entry.segment) + "; expected " + std::to_string(-segment.copied) +
              " to its length, or 0 where the thread writes it");
    }
    if (entry.hi != kLive && (entry.hi < entry.lo || entry.hi > segment.length())) {
      invalid("view: got hi " + std::to_string(entry.hi) + " for segment " +
              std::to_string(entry.segment) + "; expected " + std::to_string(entry.lo) +
              " to its length " + std::to_string(segment.length()));
    }
    if (entry.segment == own && entry.hi != kLive) {
      invalid("view: the segment that the thread writes takes no hi; leave it out");
    }
    if (lacks_pages(entry, segment, pool_.page_size())) {
      invalid("view: tokens of segment " + std::to_string(entry.segment) +
              " that no view showed any more were dropped; list what thread.view shows of it");
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

void ThreadTable::retain_view(const std::vector<Entry>& view, ThreadId reader) {
  for (const Entry& entry : view) segments_.retain(entry, reader);
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
