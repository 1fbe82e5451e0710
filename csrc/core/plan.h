// The plan of one packed forward: flat arrays that kernels read; made by a step or by the user's
// row sets.
#pragma once

#include <unordered_map>
#include <vector>

#include "core/types.h"

namespace apr {

struct Plan {
  int64_t page_size = 0;
  std::vector<PlanRun> runs;
  std::vector<PlanPair> pairs;         // after finish(): sorted by segment
  std::vector<int32_t> segment_pairs;  // [segments + 1] first pair of each segment
  std::vector<int32_t> segment_pages;  // [segments + 1] first entry of each in page_table
  std::vector<int32_t> page_table;
  std::vector<int64_t> slots;      // [rows] page * page_size + slot, or -1: nothing to append
  std::vector<int64_t> ids;        // [rows]
  std::vector<int64_t> positions;  // [rows] as written, what the model rotates by
  std::vector<int64_t> writers;    // [rows] thread whose token it is or was; of a step
  std::vector<int32_t> rotations;  // distinct re-rotations other than 0
  std::vector<PlanCopy> copies;    // token copies to do before the forward, in every layer

  void clear(int64_t page_size_in_tokens);
  int32_t add_segment(const std::vector<PageId>& pages);
  void finish();  // sorts pairs by segment and numbers the rotations

  int64_t num_rows() const { return static_cast<int64_t>(slots.size()); }
  int64_t num_segments() const { return static_cast<int64_t>(segment_pages.size()) - 1; }

 private:
  std::vector<PlanPair> unsorted_;
  std::unordered_map<int32_t, int32_t> rotation_rows_;
};

}  // namespace apr
