// Merges the partial results of each row and head, in the order of the row's view: a warp for each.
#pragma once

#include "kernels/cuda/spans.cuh"

namespace apr::APR_GPU {

inline constexpr int kMergeThreads = 128;
inline constexpr int kWidestHead = 256;

template <typename T>
APR_KERNEL APR_BOUNDS(kMergeThreads, 1) merge_parts(APR_GRID_CONSTANT AttentionWork work) {
  wait_for_predecessor();
  const int64_t warp =
      static_cast<int64_t>(block_index()) * (kMergeThreads / 32) + thread_index() / 32;
  const int lane = thread_index() % 32;
  if (warp >= static_cast<int64_t>(work.row_count) * work.q_heads) return;
  const auto row = work.row_begin + static_cast<int>(warp / work.q_heads);
  const auto q_head = static_cast<int>(warp % work.q_heads);
  const int head = q_head / work.group;
  const Counts counts = work.counts[0];
  const bool exists = row < counts.rows;
  const int64_t units = static_cast<int64_t>(work.prefix[counts.items]) * work.kv_heads;
  float sums[kWidestHead / 32], top = -infinity(), sum = 0.f;
#pragma unroll
  for (int i = 0; i < kWidestHead / 32; ++i) sums[i] = 0.f;
  for (int v = exists ? work.row_visits[row] : 0; v < (exists ? work.row_visits[row + 1] : 0);
       ++v) {
    const int number = work.view_order[v];
    const Visit visit = work.visits[number];
    // The item that holds this head's lane: the visit's first, unless its group was cut.
    int index = visit.item;
    Item item = work.items[index];
    int lane_in_item =
        (number - item.first_visit) * work.group + q_head % work.group - item.first_lane;
    while (lane_in_item >= item.lanes) {
      item = work.items[++index];
      lane_in_item =
          (number - item.first_visit) * work.group + q_head % work.group - item.first_lane;
    }
    const int before = work.prefix[index], count = work.prefix[index + 1] - before;
    if (count == 0) continue;
    const int64_t first =
        static_cast<int64_t>(before) * work.kv_heads + static_cast<int64_t>(head) * count;
    const int64_t begin = work.unit_tiles > 1 ? first : owner_of(units, counts.blocks, first);
    const int64_t end =
        work.unit_tiles > 1 ? first + count : owner_of(units, counts.blocks, first + count - 1) + 1;
    if (item.alone && end == begin + 1) return;  // the attention kernel wrote the row
    for (int64_t part = begin; part < end; ++part) {
      const int64_t at = part_of(work, item, head, part, part == begin, part) + lane_in_item;
      const float part_top = work.part_sum[2 * at];
      const float new_top = maximum(top, part_top);
      const float reference = new_top == -infinity() ? 0.f : new_top;
      const float old_weight = fast_exp2(top - reference);
      const float part_weight = fast_exp2(part_top - reference);
      sum = sum * old_weight + work.part_sum[2 * at + 1] * part_weight;
      top = new_top;
#pragma unroll
      for (int i = 0; i < kWidestHead / 32; ++i) {
        const int column = i * 32 + lane;
        if (column < work.head_dim_v) {
          sums[i] =
              sums[i] * old_weight + work.part_out[at * work.head_dim_v + column] * part_weight;
        }
      }
    }
  }
  const float inverse = exists ? finish<T>(work, row, q_head, top, sum, lane == 0) : 0.f;
#pragma unroll
  for (int i = 0; i < kWidestHead / 32; ++i) {
    const int column = i * 32 + lane;
    if (column < work.head_dim_v) {
      work.out[out_at(work, row, q_head) + column] = from_float<T>(sums[i] * inverse).bits;
    }
  }
}

}  // namespace apr::APR_GPU
