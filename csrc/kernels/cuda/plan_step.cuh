// The device planner: what each row sees, and the cut of all units into equal shares. One block,
// once a step, for all layers of one kind; lengths may have changed since the host laid out the
// items.
#pragma once

#include "kernels/cuda/primitives.cuh"
#include "kernels/cuda/work.h"
#include "kernels/ranges.h"

namespace apr::APR_GPU {

inline constexpr int kPlanThreads = 256;

// Fills `bounds` of the item's visits and returns its reach, the same on every lane; units come
// later.
APR_DEVICE Reach reach_of(const AttentionWork& work, const Item& item, int lane) {
  int lo = INT32_MAX, hi = INT32_MIN, all_lo = INT32_MIN, all_hi = INT32_MAX;
  const int first = item.first_visit + item.first_lane / work.group;
  const int last = item.first_visit + (item.first_lane + item.lanes - 1) / work.group;
  for (int v = first + lane; v <= last; v += 32) {
    const Visit visit = work.visits[v];
    const PlanPair pair = work.pairs[visit.pair];
    const SlotRange seen =
        visible_slots(pair, work.runs[pair.run], visit.index, work.window, work.chunk);
    work.bounds[v] = {seen.lo, seen.hi, pair.rotation_row};
    if (seen.hi <= seen.lo) {
      all_hi = INT32_MIN;
      continue;
    }
    lo = seen.lo < lo ? seen.lo : lo;
    hi = seen.hi > hi ? seen.hi : hi;
    all_lo = seen.lo > all_lo ? seen.lo : all_lo;
    all_hi = seen.hi < all_hi ? seen.hi : all_hi;
  }
  for (int by = 16; by > 0; by /= 2) {
    const int lo2 = shuffle_xor(lo, by), hi2 = shuffle_xor(hi, by);
    const int all_lo2 = shuffle_xor(all_lo, by), all_hi2 = shuffle_xor(all_hi, by);
    lo = lo2 < lo ? lo2 : lo;
    hi = hi2 > hi ? hi2 : hi;
    all_lo = all_lo2 > all_lo ? all_lo2 : all_lo;
    all_hi = all_hi2 < all_hi ? all_hi2 : all_hi;
  }
  const int first_page = work.segment_pages[item.segment];
  if (hi <= lo) return {0, 0, 0, 0, 0, 0, first_page};
  return {lo, hi, all_lo, all_hi, 0, 0, first_page};
}

APR_DEVICE int units_of(const Reach& reach, int unit_tiles) {
  const int tokens = unit_tiles * kTile;
  return reach.hi <= reach.lo ? 0 : (reach.hi - 1) / tokens - reach.lo / tokens + 1;
}

// Blocks that share so many tiles: as many on each multiprocessor, if there is enough for all.
APR_DEVICE int working_blocks(const AttentionWork& work, int64_t tiles) {
  int64_t blocks = (tiles + kLeastTiles - 1) / kLeastTiles;
  if (blocks > work.grid) blocks = work.grid;
  if (blocks > work.multiprocessors) blocks -= blocks % work.multiprocessors;
  return static_cast<int>(blocks < 1 ? 1 : blocks);
}

APR_KERNEL APR_BOUNDS(kPlanThreads, 1) plan_step(APR_GRID_CONSTANT AttentionWork work) {
  constexpr int kWarps = kPlanThreads / 32;
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const auto warp_sums = shared_array<int32_t>(shared_address(shared_memory()));
  const int items = work.counts[0].items;
  for (int i = warp; i < items; i += kWarps) {
    const Reach reach = reach_of(work, work.items[i], lane);
    if (lane == 0) work.reach[i] = reach;
  }
  sync_block();
  int before = 0;
  for (int first = 0; first < items; first += kPlanThreads) {
    const int i = first + thread_index();
    const int mine = i < items ? units_of(work.reach[i], work.unit_tiles) : 0;
    int sum = mine;
    for (int by = 1; by < 32; by *= 2) {
      const int below = shuffle_up(sum, by);
      if (lane >= by) sum += below;
    }
    if (lane == 31) warp_sums[warp] = sum;
    sync_block();
    int warps_before = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) warps_before += warp_sums[w];
      all += warp_sums[w];
    }
    if (i < items) {
      work.reach[i].before = before + warps_before + sum - mine;
      work.reach[i].units = mine;
    }
    before += all;
    sync_block();
  }
  const int64_t units = static_cast<int64_t>(before) * work.kv_heads;
  const int blocks = working_blocks(work, units * work.unit_tiles);
  if (thread_index() == 0) {
    work.counts[0].units = before;
    work.counts[0].blocks = blocks;
  }
  for (int block = thread_index(); block < blocks && units > 0; block += kPlanThreads) {
    const auto position = static_cast<int>(share_begin(units, blocks, block) / work.kv_heads);
    int low = 0, high = items - 1;  // the last item with no more units before it
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (work.reach[middle].before <= position) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    work.first_items[block] = low;
  }
}

}  // namespace apr::APR_GPU
