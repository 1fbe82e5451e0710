// What each row of an ordinary step sees, worked out on the device from the rows' views and the
// lengths so far, by the rules of docs/semantics.md; then the lengths grow. No host takes part.
#pragma once

#include "kernels/cuda/primitives.cuh"
#include "kernels/cuda/work.h"

namespace apr::APR_GPU {

inline constexpr int kViewThreads = 512;
inline constexpr int kTurnThreads = 256;

// How an entry moves the end of what stands before it: end -> max(end + add, least). Such maps
// compose, so that a warp finds all offsets of a view by one scan.
struct EndMap {
  int add, least;
};
inline constexpr int kNoLeast = -(1 << 30);

APR_DEVICE EndMap compose(const EndMap& first, const EndMap& second) {
  const int moved = first.least == kNoLeast ? kNoLeast : first.least + second.add;
  return {first.add + second.add, moved > second.least ? moved : second.least};
}
APR_DEVICE int apply(const EndMap& map, int end) {
  return end + map.add > map.least ? end + map.add : map.least;
}

// Tokens of an entry that its row sees in this step.
APR_DEVICE int visible_end(const DeviceEntry& entry, const DeviceSegment& segment, bool own,
                           bool current) {
  if (own) return segment.length + 1;
  if (entry.hi != kLiveEnd) return entry.hi;
  return segment.length + (current && segment.writer >= 0 ? 1 : 0);
}

APR_DEVICE void see(const ViewWork& work, int row, int lane) {
  const DeviceRow view = work.rows[row];
  int end = 0, own_difference = 0, own_offset = 0;
  for (int first = 0; first < view.num_entries; first += 32) {
    const int i = first + lane;
    const bool exists = i < view.num_entries, own = i == view.own;
    DeviceEntry entry{};
    DeviceSegment segment{};
    EndMap map{0, kNoLeast};
    int hi = 0, first_shown = 0;
    const bool moving = exists && work.entries[view.first_entry + i].offset == kMovingOffset;
    if (exists) {
      entry = work.entries[view.first_entry + i];
      segment = work.segments[entry.segment];
      hi = visible_end(entry, segment, own, view.current != 0);
      first_shown = segment.stride * (entry.lo > 0 ? entry.lo : 0);
      const int length = segment.stride * hi - (moving ? first_shown : 0);
      map = moving ? EndMap{length > 0 ? length : 0, kNoLeast} : EndMap{0, entry.offset + length};
    }
    EndMap before{0, kNoLeast}, all = map;  // of the entries before this one, and with it
    for (int by = 1; by < 32; by *= 2) {
      const EndMap below{shuffle_up(all.add, by), shuffle_up(all.least, by)};
      if (lane >= by) all = compose(below, all);
    }
    const EndMap below{shuffle_up(all.add, 1), shuffle_up(all.least, 1)};
    if (lane > 0) before = below;
    const int offset = moving ? apply(before, end) - first_shown : entry.offset;
    end = apply({shuffle_from(all.add, 31), shuffle_from(all.least, 31)}, end);
    if (exists) {
      PlanPair pair{};
      pair.run = row;
      pair.segment = entry.segment;
      pair.lo = segment.copied + entry.lo;
      pair.hi = segment.copied + hi;
      pair.view_offset = offset - segment.stride * segment.copied;
      pair.stride = segment.stride;
      pair.rotation = segment.base - offset;  // the own difference is added below
      pair.order = i;
      pair.first_own = own ? segment.copied + segment.length : -1;
      work.pairs[entry.pair] = pair;
    }
    const int at = view.own - first;
    if (at >= 0 && at < 32) {
      own_offset = shuffle_from(offset, at);
      own_difference = shuffle_from(offset - segment.base, at);
    }
  }
  for (int i = lane; i < view.num_entries; i += 32) {
    const int number = work.entries[view.first_entry + i].pair;
    PlanPair& pair = work.pairs[number];
    pair.rotation += own_difference;
    pair.rotation_row = pair.rotation == 0 ? -1 : number;
  }
  if (lane != 0) return;
  const DeviceSegment tail = work.segments[work.entries[view.first_entry + view.own].segment];
  work.runs[row] = {row, 1, own_offset + tail.stride * tail.length, tail.stride};
  const int slot = tail.copied + tail.length;
  const int64_t page = work.page_table[tail.first_page + (slot >> work.page_shift)];
  work.slots[row] = (page << work.page_shift) + (slot & ((1 << work.page_shift) - 1));
  work.positions[row] = tail.base + static_cast<int64_t>(tail.stride) * tail.length;
}

APR_KERNEL APR_BOUNDS(kViewThreads, 1) view_step(APR_GRID_CONSTANT ViewWork work) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int rows = work.counts[0].rows;
  for (int row = warp; row < rows; row += kViewThreads / 32) see(work, row, lane);
  for (int row = rows + thread_index(); row < work.row_capacity; row += kViewThreads) {
    work.slots[row] = -1;
    work.positions[row] = 0;
  }
  sync_block();
  for (int row = thread_index(); row < rows; row += kViewThreads) {
    const DeviceRow view = work.rows[row];
    work.segments[work.entries[view.first_entry + view.own].segment].length += 1;
  }
}

// cos and sin of each pair's rotation. The product is taken in double precision: at far distances a
// float's angle would be off by more than its neighbour.
APR_KERNEL APR_BOUNDS(kTurnThreads, 1) turn_pairs(APR_GRID_CONSTANT TurnWork work) {
  const int64_t i = static_cast<int64_t>(block_index()) * kTurnThreads + thread_index();
  const auto pair = static_cast<int>(i / work.frequencies);
  const auto frequency = static_cast<int>(i % work.frequencies);
  if (pair >= work.counts[0].visits) return;
  const int rotation = work.pairs[pair].rotation;
  if (rotation == 0) return;
  const CosSin turn = cos_sin_of(rotation * work.inv_freq[frequency]);
  work.cos_sin[2 * i] = turn.cos;
  work.cos_sin[2 * i + 1] = turn.sin;
}

}  // namespace apr::APR_GPU
