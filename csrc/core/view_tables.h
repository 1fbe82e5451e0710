// Flat tables of the views of threads that each have one token queued: what a device needs to work
// out step after step by itself, and the host's part of such a step.
#pragma once

#include <cstdint>
#include <vector>

#include "core/listed_ranges.h"
#include "core/thread_table.h"

namespace apr {

class ViewTables {
 public:
  // Readies the tables for a step of these threads. False where the step is no ordinary one: it has
  // more to run than one token a thread, or copies, or re-rotations that the model does not have,
  // or somebody else waits for its logits. Throws kOutOfPages before anything is granted.
  bool refresh(ThreadTable& table, const std::vector<ThreadId>& threads);
  // Whether the last refresh made the tables anew: the device's copy is out of date.
  bool changed() const { return changed_; }
  // Layer states, where the table keeps them: what each thread goes on from, and, named before the
  // step is committed, what it leaves.
  const std::vector<StateId>& starts() const { return starts_; }
  const std::vector<StateId>& name_ends(ThreadTable& table);
  void commit(ThreadTable& table);  // the step has run: lengths grow, here as on the device
  // The step has not run, or nobody knows: pages go back, and the next refresh makes the tables
  // anew.
  void forget(ThreadTable& table);

  const std::vector<DeviceRow>& rows() const { return rows_; }
  const std::vector<DeviceEntry>& entries() const { return entries_; }
  const std::vector<DeviceSegment>& segments() const { return segments_; }
  const std::vector<int32_t>& page_table() const { return page_table_; }
  const std::vector<int64_t>& ids() const { return ids_; }  // of the queued tokens
  int64_t max_position() const { return max_position_; }    // as written
  int64_t page_size() const { return page_size_; }
  uint64_t digest() const;  // of who runs what and sees what, whichever pages hold it

 private:
  static constexpr uint64_t kNever = ~uint64_t{0};

  bool build(ThreadTable& table, const std::vector<ThreadId>& threads);
  bool add_row(ThreadTable& table, const Thread& thread);
  void check(const ThreadTable& table) const;
  void release_ends(ThreadTable& table);
  bool find_starts(const ThreadTable& table);
  void commit_states(ThreadTable& table);
  bool awaited(ThreadTable& table, ThreadId writer) const;
  void grant_pages(ThreadTable& table);
  bool turns(const ThreadTable& table, const Thread& thread) const;

  uint64_t version_ = kNever;
  const ThreadTable* table_ = nullptr;  // that was refreshed from
  bool ready_ = false;                  // refreshed, and not committed since
  bool changed_ = false;
  std::vector<ThreadId> threads_;
  std::vector<Segment*> tails_;
  std::vector<DeviceRow> rows_;
  std::vector<DeviceEntry> entries_;
  std::vector<DeviceSegment> segments_;
  std::vector<SegmentId> segment_ids_;
  ListedRanges listed_;
  std::vector<int32_t> page_table_;
  std::vector<int64_t> ids_;
  std::vector<StateId> starts_, ends_;
  int64_t max_position_ = 0;
  int64_t page_size_ = 0;
};

}  // namespace apr
