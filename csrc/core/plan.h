// The plan of one packed forward: flat arrays that kernels read; made by a step or by the user's
// row sets.
#pragma once

#include <cstddef>
#include <unordered_map>
#include <vector>

#include "core/types.h"

namespace apr {

// What a run sees of a segment: slots [lo, hi) of its pages. Slot 0 stands at view position
// `offset` and was written at `base`.
struct SeenSlots {
  int32_t segment;  // of the plan
  int64_t lo, hi, offset, base, stride;
  int64_t first_own;  // slot that the run's first row writes, or kNone: not its own segment
};

// Where slot `slot` of a segment lies: page * page_size + slot of the page.
inline int64_t slot_of(const std::vector<PageId>& pages, int64_t slot, int64_t page_size) {
  return pages[slot / page_size] * page_size + slot % page_size;
}

struct Plan {
  int64_t page_size = 0;
  std::vector<PlanRun> runs;
  std::vector<PlanPair> pairs;           // after finish(): sorted by segment
  std::vector<int32_t> segment_pairs;    // [segments + 1] first pair of each segment
  std::vector<int32_t> segment_pages;    // [segments + 1] first entry of each in page_table
  std::vector<int64_t> segment_numbers;  // [segments] in the table; of a step
  std::vector<int32_t> page_table;
  std::vector<int64_t> slots;      // [rows] page * page_size + slot, or -1: nothing to append
  std::vector<int64_t> ids;        // [rows]
  std::vector<int64_t> positions;  // [rows] as written, what the model rotates by
  std::vector<int64_t> writers;    // [rows] thread whose token it is or was; of a step
  std::vector<int32_t> rotations;  // distinct re-rotations other than 0
  std::vector<PlanCopy> copies;    // token copies to do before the forward, in every layer

  void clear(int64_t page_size_in_tokens);
  int32_t add_segment(const std::vector<PageId>& pages);
  int32_t add_run(int64_t rows);  // of the next rows; their slots and positions are the caller's
  // What a run sees, in the order of its view; its own segment is among it. After all of them,
  // end_view.
  void add_pair(int32_t run, const SeenSlots& seen) {
    pairs.push_back({run, seen.segment, static_cast<int32_t>(seen.lo),
                     static_cast<int32_t>(seen.hi), static_cast<int32_t>(seen.offset),
                     static_cast<int32_t>(seen.stride),
                     static_cast<int32_t>(seen.base - seen.offset), -1, 0,
                     static_cast<int32_t>(seen.first_own)});
  }
  void end_view(int32_t run, std::size_t first_pair, const SeenSlots& own);
  void finish();  // sorts pairs by segment and numbers the rotations

  // Of who runs what and sees what, whichever pages hold it.
  uint64_t digest() const;

  int64_t num_rows() const { return static_cast<int64_t>(slots.size()); }
  int64_t num_segments() const { return static_cast<int64_t>(segment_pages.size()) - 1; }

 private:
  std::vector<PlanPair> unsorted_;
  std::unordered_map<int32_t, int32_t> rotation_rows_;
};

}  // namespace apr
