// Which pages of a segment an entry of a view shows.
#pragma once

#include "core/segment_store.h"
#include "core/types.h"

namespace apr {

struct PageRange {
  int64_t begin, end;  // of the segment's own pages
};

// Of what is encoded by now.
PageRange shown_pages(const Entry& entry, const Segment& segment, int64_t page_size);
// Whether some of them were dropped, as nobody saw them, or, where they are wanted `now`, lie
// elsewhere.
bool lacks_pages(const Entry& entry, const Segment& segment, int64_t page_size, bool now = false);

}  // namespace apr
