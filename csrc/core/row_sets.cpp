// Plans of row sets that somebody lays out by hand, on pages of their own: no threads, no segments.
#include "core/row_sets.h"

#include <map>

namespace apr {

void plan_row_sets(const std::vector<RowSet>& row_sets, int64_t page_size, Plan& plan) {
  plan.clear(page_size);
  std::map<std::vector<PageId>, int32_t> segments;
  for (const RowSet& rows : row_sets) {
    const int32_t run = plan.add_run(rows.query_len);
    const size_t first_pair = plan.pairs.size();
    SeenSlots own{};
    for (const SeenPages& s : rows.seen) {
      const auto [found, fresh] = segments.try_emplace(s.pages, 0);
      if (fresh) found->second = plan.add_segment(s.pages);
      const int64_t first = s.own ? s.hi - rows.query_len : kNone;
      const SeenSlots seen{found->second, s.lo, s.hi, s.offset, s.base, s.stride, first};
      plan.add_pair(run, seen);
      if (s.own) own = seen;
      for (int64_t slot = first; s.own && slot < s.hi; ++slot) {
        plan.slots.push_back(slot_of(s.pages, slot, page_size));
        plan.positions.push_back(s.base + s.stride * slot);
      }
    }
    plan.end_view(run, first_pair, own);
  }
  plan.finish();
}

}  // namespace apr
