// Plans of row sets that somebody lays out by hand, on pages of their own: no threads, no segments.
#pragma once

#include <vector>

#include "core/plan.h"

namespace apr {

// What a row set sees of one segment, given by its pages: slots [lo, hi); slot 0 stands at view
// position `offset` and was written at `base`.
struct SeenPages {
  std::vector<PageId> pages;
  int64_t lo, hi, offset, base, stride;
  bool own;  // the row set's queries are the last slots of it, each seeing none after its own
};

struct RowSet {
  int64_t query_len;
  std::vector<SeenPages> seen;
};

// Equal page lists are one segment, read once for all.
void plan_row_sets(const std::vector<RowSet>& row_sets, int64_t page_size, Plan& plan);

}  // namespace apr
