// Cuts the pairs of a plan into items of rows and chunks of tokens, and numbers the partial
// results.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/params.h"

namespace apr::cpu {

// One query row looking at one segment.
struct Visit {
  int32_t row;
  int32_t lo, hi;        // visible slots
  int32_t rotation_row;  // -1: the query is used as written
  int32_t order;         // place of the segment in the row's view
  int32_t first_part;    // number of the row's first partial result in its item, -1: its only one
};

// Rows that share each pass over a segment's tiles. What they see is connected: each slot of the
// item is seen by one of them at least, so that no slot is read that nobody has written.
struct Item {
  int32_t segment;
  int32_t first_visit, end_visit;
  int32_t lo, hi;          // union of the visits' slots
  int32_t all_lo, all_hi;  // slots that each of them sees
  int32_t chunk;           // tokens of a chunk; chunks start at multiples of it
  int32_t chunks;
};

struct Schedule {
  std::vector<Visit> visits;
  std::vector<Item> items;
  // [rows + 1]: a row's partial results lie side by side, in the order of its view. The order of
  // the step's segments would do for a sum, but not for its bits.
  std::vector<int32_t> row_parts;
  std::vector<int32_t> merged_rows;  // those that do not come from one partial result
  std::vector<int32_t> item_tasks;   // [items + 1]: first (chunk) task of each item
};

// The schedule of rows [row_begin, row_end).
Schedule make_schedule(const AttentionCall& call, const Pool& pool, const PlanArrays& plan,
                       int64_t row_begin, int64_t row_end);

}  // namespace apr::cpu
