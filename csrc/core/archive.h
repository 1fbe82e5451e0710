// Threads and segments as a row of integers, and back.
#pragma once

#include <cstdint>
#include <vector>

#include "core/thread_table.h"

namespace apr {

struct Archive {
  std::vector<int64_t> numbers;
  std::vector<PageId> pages;    // those of the segments, in the order of the archive
  std::vector<int64_t> filled;  // slots of each that hold a token
};

// These threads and segments, and what they lead to. Nothing is changed, but for pages that were
// granted ahead. Without keys there are no segments, and of what the threads lead to only what one
// of them sees.
Archive save(ThreadTable& table, const std::vector<ThreadId>& threads,
             const std::vector<SegmentId>& segments, bool keys);

// Where the keys and values of a thread's visible tokens lie, in view order, as page * page_size +
// slot; those of queued tokens lie nowhere.
std::vector<int64_t> stored_slots(const ThreadTable& table, ThreadId id);

// The same in an empty table, with pages of its own. Throws kInvalidInput for what no save wrote,
// kOutOfPages where the pool is too small; the table is then empty again.
Archive load(ThreadTable& table, const std::vector<int64_t>& numbers);

}  // namespace apr
