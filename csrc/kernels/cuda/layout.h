// Lays out the work of a plan for a GPU: visits, items and the kernel that suits them, as bytes to
// copy to device memory and sizes of what the device adds.
#pragma once

#include <string>
#include <vector>

#include "kernels/cuda/work.h"
#include "kernels/gpu.h"

namespace apr::APR_GPU {

// Offsets in bytes into one buffer: first what the host copies there, then what the device writes.
struct Layout {
  const Instance* instance = nullptr;
  std::vector<char> upload;
  int64_t counts = 0, visits = 0, items = 0, pairs = 0, runs = 0, segment_pages = 0, page_table = 0,
          row_visits = 0, view_order = 0;     // copied
  int64_t bounds = 0, reach = 0, prefix = 0;  // written by the device
  int64_t bytes = 0;                          // of the buffer
  int64_t part_lanes = 0, alone_lanes = 0;    // of partial results
  int64_t num_visits = 0, num_items = 0, num_pairs = 0, num_runs = 0, num_segments = 0,
          num_pages = 0, num_rows = 0, num_view_order = 0;  // capacities
  int64_t rows = 0, entries = 0, segments = 0;              // of views: copied
  int64_t grid = 0;
  int64_t row_begin = 0, row_end = 0;

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

// Blocks of the attention kernel, and room for partial results when `shared` lanes are not alone.
void set_grid(Layout& layout, const AttentionKind& kind, const GpuDevice& device, int64_t shared);

}  // namespace apr::APR_GPU
