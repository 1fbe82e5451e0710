// What an entry of a view shows, and where it stands: the rules and the one walk over a view. The
// device has a copy of its own for ordinary steps (kernels/cuda/view_step.cuh), tested against
// this.
#pragma once

#include <algorithm>
#include <vector>

#include "core/segment_store.h"
#include "core/types.h"

namespace apr {

// Who reads a view between steps: the thread that writes `own`, or nobody (kNone).
struct IdleReader {
  SegmentId own = kNone;
};

// Who reads a view in a forward: rows that leave `own` encoded up to `own_end`.
struct StepReader {
  SegmentId own;
  int64_t own_end;
  Visibility visibility;
  uint64_t step;  // its stamp
};

// A reader sees tokens [entry.lo, visible_end) of an entry's segment. A living writer's queued
// tokens are not there before the step that encodes them.
inline int64_t visible_end(const Entry& entry, const Segment& segment, IdleReader reader) {
  if (entry.hi != kLive) return std::min(entry.hi, segment.length());
  return entry.segment == reader.own || segment.settled() ? segment.length() : segment.encoded;
}

inline int64_t visible_end(const Entry& entry, const Segment& segment, const StepReader& reader) {
  if (entry.hi != kLive) return std::min(entry.hi, segment.encoded);
  if (entry.segment == reader.own) return reader.own_end;
  const bool now = segment.settled() || reader.visibility == Visibility::kCurrent;
  return now || segment.stamp != reader.step ? segment.encoded : segment.encoded_before;
}

// What follows an entry stands behind this many of its tokens: all that the step runs, in however
// many forwards.
inline int64_t placed_end(const Entry&, const Segment&, IdleReader, int64_t end) { return end; }

inline int64_t placed_end(const Entry& entry, const Segment& segment, const StepReader& reader,
                          int64_t end) {
  const bool grows = entry.segment == reader.own && entry.hi == kLive;
  return grows && segment.stamp == reader.step ? std::max(end, segment.required) : end;
}

// Whether an entry shows token `index` of its segment, once that is there.
inline bool shows(const Entry& entry, SegmentId segment, int64_t index) {
  return entry.segment == segment && entry.lo <= index && (entry.hi == kLive || index < entry.hi);
}

// The entry that a line continues in `view`, before `own`; null at its beginning.
inline const Entry* entry_before(const std::vector<Entry>& view, SegmentId own) {
  const Entry* last = nullptr;
  for (const Entry& entry : view) {
    if (entry.segment == own) break;
    if (entry.hi > entry.lo) last = &entry;
  }
  return last;
}

// Calls each(entry, segment, offset, end): token 0 stands at view position `offset`, the reader
// sees tokens [entry.lo, end). Returns the position after all.
template <typename Store, typename Reader, typename Each>
int64_t walk_view(Store& segments, const std::vector<Entry>& view, const Reader& reader,
                  const Each& each) {
  int64_t after = 0;
  for (const Entry& entry : view) {
    auto& segment = segments.at(entry.segment);
    const int64_t end = visible_end(entry, segment, reader);
    const int64_t first = segment.stride * std::max<int64_t>(entry.lo, 0);
    const int64_t offset = entry.offset == kMoving ? after - first : entry.offset;
    after = std::max(after, offset + segment.stride * placed_end(entry, segment, reader, end));
    each(entry, segment, offset, end);
  }
  return after;
}

// The position after all that a view shows.
template <typename Store, typename Reader>
int64_t view_end(Store& segments, const std::vector<Entry>& view, const Reader& reader) {
  return walk_view(segments, view, reader, [](const Entry&, const Segment&, int64_t, int64_t) {});
}

}  // namespace apr
