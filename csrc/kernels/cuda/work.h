// The work of one attention call on a GPU: what the host lays out, what the device planner fills
// in, and what kernels are given.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/array.h"
#include "kernels/params.h"

namespace apr::APR_GPU {

inline constexpr int kTile = 64;  // tokens of a tile, the unit of work
inline constexpr int kInvariantTiles =
    8;                                 // tiles of a unit where bits must not depend on neighbours
inline constexpr int kLeastTiles = 4;  // of a block: fewer partial results are worth idle blocks

// One query row looking at one segment.
struct Visit {
  int32_t pair;
  int32_t index;  // of the row in its run
  int32_t row;
  int32_t item;  // that holds the visit's first lane
};

// Lanes (visits x query heads of a group) that read a segment together. `first_lane` counts from
// the first lane of `first_visit`: a group larger than an item is cut.
struct Item {
  int32_t segment;
  int32_t first_visit;
  int32_t first_lane;
  int32_t lanes;
  int32_t lanes_before;  // of the items before this one that are not `alone`
  int32_t alone;         // its rows see this one segment only
};

// What the device planner finds out.
struct Bounds {
  int32_t lo, hi;        // visible slots of a visit
  int32_t rotation_row;  // of the rotation table, -1: the query is used as written
};
// All that a block needs to know of an item before it copies keys: two loads of 16 bytes.
struct alignas(16) Reach {
  int32_t lo, hi;          // slots that some visit of the item sees
  int32_t all_lo, all_hi;  // slots that every visit sees
  int32_t before, units;   // units of one kv head, of the items before this one and its own
  int32_t first_page;      // of its segment in the page table
};

struct Counts {
  int32_t items, visits, rows;
  int32_t units, blocks;  // of one kv head; that take part: the planner's
};

// Everything that kernels read and write. Arrays are fixed addresses: whatever changes between two
// replays of a captured graph lies behind them.
struct AttentionWork {
  // By the host, or by the view kernel.
  Array<Counts> counts;  // [1]
  Array<const Visit> visits;
  Array<const Item> items;
  Array<const PlanPair> pairs;
  Array<const PlanRun> runs;
  Array<const int32_t> segment_pages, page_table;
  Array<const int32_t> row_visits;  // [rows + 1] first entry of each row in `view_order`
  Array<const int32_t> view_order;  // visits of each row, in the order of its view
  // By the planner.
  Array<Bounds> bounds;        // [visits]
  Array<Reach> reach;          // [items]
  Array<int32_t> first_items;  // [grid] the item that each block begins with
  // Partial results of a lane: [head_dim_v] unnormalised, and (max in base 2, sum).
  Array<float> part_out, part_sum;
  int64_t alone_lanes;            // where those of items that are alone begin: two items a block
  int32_t grid, multiprocessors;  // blocks of the attention kernel, in turn on so many

  // Tensors.
  Array<const uint16_t> q, k, v;
  Array<const float> k_scales, v_scales;  // of codes
  Array<uint16_t> out;
  Array<float> lse;          // may be empty
  Array<const float> sinks;  // may be empty
  Array<const float> cos_sin;
  int64_t q_row_stride, q_head_stride, out_row_stride, out_head_stride;
  int32_t q_heads, kv_heads, group, head_dim_k, head_dim_v;
  int32_t page_shift, num_pages;
  Codes codes;
  int32_t rotation_first, rotation_pairs, interleaved;
  int32_t window, chunk;
  int32_t unit_tiles;            // 1, or kInvariantTiles
  int32_t item_rows;             // lanes of an item at most
  int32_t row_begin, row_count;  // rows to write; those from counts.rows on become zeros
  float factor;                  // makes scores logarithms to base 2, or the softcap's argument
  float softcap;                 // 0: none
};

// What the view kernels are given.
struct ViewWork {
  Array<const Counts> counts;
  Array<const DeviceRow> rows;
  Array<const DeviceEntry> entries;
  Array<DeviceSegment> segments;  // lengths grow
  Array<const int32_t> page_table;
  Array<PlanRun> runs;              // [rows]
  Array<PlanPair> pairs;            // [entries]
  Array<int64_t> slots, positions;  // [row_capacity]
  int32_t row_capacity, page_shift;
};

struct TurnWork {
  Array<const Counts> counts;
  Array<const PlanPair> pairs;
  Array<const double> inv_freq;
  Array<float> cos_sin;
  int32_t capacity;  // of pairs
  int32_t frequencies;
};

// What the kernels that write the pool are given. Those that only copy take dims and strides in
// 16-bit numbers, of which a float32 is two and two codes are one; those that encode get 16-bit
// numbers.
struct AppendWork {
  Array<const uint16_t> k, v;  // [rows, kv_heads, head_dim]
  int64_t k_row_stride, k_head_stride, v_row_stride, v_head_stride;
  Array<uint16_t> pool_k, pool_v;
  Array<float> k_scales, v_scales;  // of codes
  Array<const int64_t> slots;       // [rows]: page * page_size + slot, -1: nothing to append
  int32_t rows, kv_heads, head_dim_k, head_dim_v, page_shift;
};

struct CopyWork {
  Array<uint16_t> pool_k, pool_v;
  Array<float> k_scales, v_scales;  // of codes
  Array<const PlanCopy> copies;
  int32_t count, kv_heads, head_dim_k, head_dim_v, page_shift;
};

// What the sampler is given: rows of scores in one of the two arrays.
struct ScoreRows {
  Array<const float> floats;
  Array<const uint16_t> halves;
  int64_t stride;
  DType dtype;
};
struct SampleWork {
  ScoreRows scores, logits;
  Array<const RowDraw> draws;
  Array<int64_t> tokens;
  Array<float> logprobs, drawn_logprobs, entropies;
  int32_t rows, vocab;
};

// Where a block's share of the units begins, and which block owns a unit.
APR_INLINE int64_t share_begin(int64_t units, int64_t blocks, int64_t block) {
  return units * block / blocks;
}
APR_INLINE int64_t owner_of(int64_t units, int64_t blocks, int64_t unit) {
  return ((unit + 1) * blocks - 1) / units;
}

struct Launch {
  const char* kernel;
  int64_t blocks, threads, shared_bytes;
  void* stream;
  bool overlap;  // may start before the kernel ahead of it ends
};

// One compiled attention kernel.
struct Instance {
  const char* name;
  DType dtype;
  int head_dim;  // at most, of keys and values
  int item_rows;
  int stages;
  bool wide;   // wgmma and TMA: compute capability 9.0
  bool coded;  // reads codes of 8 bits
  int threads;
  int shared_bytes;
  void (*run)(const AttentionWork& work, const Launch& launch);
};

}  // namespace apr::APR_GPU
