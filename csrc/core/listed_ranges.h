// Numbers of the segments that the readers of a plan see. Kernels know a segment at most once in a
// view, so a further range of it counts as a segment of its own, the same one for all readers.
#pragma once

#include <atomic>
#include <map>
#include <utility>

#include "core/segment_store.h"

namespace apr {

// Stamps mark scratch fields of segments as belonging to one step, forward or set of tables; never
// used twice, so never cleared.
inline uint64_t fresh_stamp() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

class ListedRanges {
 public:
  void clear() {
    stamp_ = fresh_stamp();
    further_.clear();
  }
  // The number of a segment that reader `reader` lists next; `add` makes one.
  template <typename Add>
  int32_t number(SegmentId id, Segment& segment, int32_t reader, const Add& add) {
    if (segment.listed_stamp != stamp_) {
      segment.listed_stamp = stamp_;
      segment.local = add();
      segment.listed_by = -1;
    }
    segment.times_listed = segment.listed_by == reader ? segment.times_listed + 1 : 0;
    segment.listed_by = reader;
    if (segment.times_listed == 0) return segment.local;
    const auto [found, fresh] = further_.try_emplace({id, segment.times_listed}, 0);
    if (fresh) found->second = add();
    return found->second;
  }

 private:
  uint64_t stamp_ = fresh_stamp();
  std::map<std::pair<SegmentId, int32_t>, int32_t> further_;  // by how many ranges before
};

}  // namespace apr
