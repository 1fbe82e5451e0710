// Lays out the work of a plan for a GPU: visits, items and the kernel that suits them, as bytes to
// copy to device memory and sizes of what the device adds.
#pragma once

#include <string>
#include <vector>

#include "kernels/cuda/bytes.h"
#include "kernels/cuda/work.h"
#include "kernels/gpu.h"

namespace apr::APR_GPU {

// Slices of one buffer: first what the host copies there, then what the device writes.
struct Layout {
  const Instance* instance = nullptr;
  std::vector<char> upload;
  Slice<Counts> counts;  // copied
  Slice<Visit> visits;
  Slice<Item> items;
  Slice<PlanPair> pairs;  // of views: written by the device
  Slice<PlanRun> runs;
  Slice<int32_t> segment_pages, page_table, row_visits, view_order;
  Slice<DeviceRow> rows;  // of views
  Slice<DeviceEntry> entries;
  Slice<DeviceSegment> segments;
  Slice<Bounds> bounds;  // written by the device
  Slice<Reach> reach;
  Slice<int32_t> first_items;
  int64_t bytes = 0;                        // of the buffer
  int64_t part_lanes = 0, alone_lanes = 0;  // of partial results
  int64_t num_rows = 0, row_begin = 0, row_end = 0;
  int64_t grid = 0, multiprocessors = 0;
  int64_t units = 0;  // of a plan; below 2^31, which spans count to

  int64_t part_floats(const AttentionKind& kind) const {
    return part_lanes * (kind.head_dim_v + 2);
  }
};

// The kernels of this build, and the one for a kind whose fullest segment has `lanes` lanes. Throws
// std::invalid_argument where there is none.
const std::vector<const Instance*>& instances();
const Instance& choose_instance(const AttentionKind& kind, int64_t lanes, const GpuDevice& device);

// Rows [row_begin, row_end) of a plan.
Layout lay_out(const PlanArrays& plan, const AttentionKind& kind, const GpuDevice& device,
               int64_t row_begin, int64_t row_end);
// All rows, in as many passes as keep the partial results of each within bounds.
std::vector<Layout> lay_out_passes(const PlanArrays& plan, const AttentionKind& kind,
                                   const GpuDevice& device);

// Views, with room for others of the same capacity: which kernel runs, the grid and all offsets
// depend on the capacity alone.
Layout lay_out_views(const ViewArrays& views, const AttentionKind& kind, const GpuDevice& device,
                     const ViewCapacity& capacity);

// Puts neighbouring visits into items while `joins(first, next)` and there is room; a group of
// heads that is larger than an item is cut. An item is alone where all its visits are. Returns the
// lanes of those that are not.
template <typename SegmentOf, typename Joins, typename Alone>
int32_t collect_items(std::vector<Visit>& visits, std::vector<Item>& items, int64_t group,
                      int64_t item_rows, const SegmentOf& segment_of, const Joins& joins,
                      const Alone& alone) {
  const size_t count = visits.size();
  const auto most = static_cast<size_t>(item_rows / group > 1 ? item_rows / group : 1);
  int32_t shared = 0;
  for (size_t first = 0, end = 0; first < count; first = end) {
    end = first + 1;
    while (end < count && end - first < most && joins(first, end)) ++end;
    bool is_alone = true;
    for (size_t v = first; v < end; ++v) {
      visits[v].item = static_cast<int32_t>(items.size());
      is_alone &= alone(visits[v]);
    }
    const int64_t lanes = static_cast<int64_t>(end - first) * group;
    for (int64_t lane = 0; lane < lanes; lane += item_rows) {
      const int64_t rest = lanes - lane;
      items.push_back({segment_of(first), static_cast<int32_t>(first), static_cast<int32_t>(lane),
                       static_cast<int32_t>(rest < item_rows ? rest : item_rows), shared,
                       is_alone ? 1 : 0});
      shared += is_alone ? 0 : items.back().lanes;
    }
  }
  return shared;
}

// Blocks of the attention kernel, and room for partial results when `shared` lanes are not alone.
void set_grid(Layout& layout, const AttentionKind& kind, const GpuDevice& device, int64_t shared);

}  // namespace apr::APR_GPU
