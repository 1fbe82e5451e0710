// The plain data that the core hands to kernels and bindings: entries of views and the plan of a
// step.
#pragma once

#include <cstdint>
#include <limits>

namespace apr {

using PageId = int32_t;
inline constexpr PageId kNoPage = -1;    // nobody sees what stood there
inline constexpr PageId kAwayPage = -2;  // its contents lie outside of the pool
using SegmentId = int64_t;
using ThreadId = int64_t;

inline constexpr int64_t kNone = -1;
// Offset of an entry whose tokens start at the running maximum of the ends of the entries before
// it.
inline constexpr int64_t kMoving = std::numeric_limits<int64_t>::min();
// Upper bound of an entry that follows the growth of its segment.
inline constexpr int64_t kLive = std::numeric_limits<int64_t>::max();

enum class Visibility : uint8_t { kPrevious, kCurrent };
enum class JoinPositions : uint8_t { kMax, kSum, kKeep };

// One line of a view: tokens [lo, hi) of a segment, its token 0 standing at view position `offset`.
struct Entry {
  SegmentId segment = kNone;
  int64_t offset = kMoving;
  // Negative where the segment begins with copied tokens of its owner's ancestor.
  int64_t lo = 0;
  int64_t hi = kLive;
  bool inherited = false;  // came with the fork, so it is no part of what a join returns
};

// Consecutive query rows of one writer.
struct PlanRun {
  int32_t row_begin;
  int32_t row_count;
  int32_t view_position;  // of the first row
  int32_t stride;         // view positions from one row to the next
};

// A run and a segment that it sees. Slots are physical: slot j of the segment's own pages.
struct PlanPair {
  int32_t run;
  int32_t segment;
  int32_t lo, hi;        // visible slots [lo, hi)
  int32_t view_offset;   // view position of slot 0
  int32_t stride;        // view positions from one slot to the next
  int32_t rotation;      // re-rotation of the query, in positions
  int32_t rotation_row;  // row of the table of distinct rotations, -1 where rotation == 0
  int32_t order;         // place of the segment in the run's view
  int32_t first_own;     // slot that the run's row 0 writes (rows are causal from there), else -1
};

// The views of threads that each write one token a step, as a device keeps them: it works out by
// itself what each step sees while only lengths change.
inline constexpr int32_t kMovingOffset = std::numeric_limits<int32_t>::min();
inline constexpr int32_t kLiveEnd = std::numeric_limits<int32_t>::max();

struct DeviceSegment {
  int32_t base, stride, copied;
  int32_t length;      // encoded tokens; grows by one each step if some row writes the segment
  int32_t first_page;  // in the page table
  int32_t writer;      // row, or -1
};

struct DeviceEntry {
  int32_t segment;  // local number
  int32_t offset;   // kMovingOffset: the running maximum of the ends before it
  int32_t lo, hi;   // tokens; kLiveEnd: all that the row sees
  int32_t pair;     // place among all entries, sorted by segment
};

struct DeviceRow {
  int32_t first_entry, num_entries;
  int32_t own;      // entry of the segment that the row writes, counted from first_entry
  int32_t current;  // sees what other rows write in the same step
};

// Copy of already encoded tokens from one segment's slots to another's, for all layers.
struct PlanCopy {
  int64_t source;  // page * page_size + slot
  int64_t destination;
};

}  // namespace apr
