// What kernels are given: raw pointers, shapes and plain options. Nothing here knows a thread.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace apr {

// Scores are logarithms to base 2 inside of kernels, natural ones outside.
inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// How a pool keeps numbers: as they are, or as codes of 8 bits with a scale for each group of 32 of
// a token and head. A code stands for code * scale, rounded to the pool's dtype; float8 is e4m3
// (arXiv 2209.05433), whose NaN nobody writes: it may be read as any number.
enum class Codes : int32_t { kNone, kInt8, kFloat8 };

inline constexpr int kCodeGroup = 32;
constexpr int64_t code_groups(int64_t dim) { return (dim + kCodeGroup - 1) / kCodeGroup; }
// A scale is the largest magnitude of its group over this.
template <Codes kCodes>
inline constexpr float kHighestCode = kCodes == Codes::kInt8 ? 127.f : 448.f;

// The flat arrays of a Plan (core/plan.h).
struct PlanArrays {
  const PlanRun* runs;
  const PlanPair* pairs;         // sorted by segment
  const int32_t* segment_pairs;  // [segments + 1]
  const int32_t* segment_pages;  // [segments + 1]
  const int32_t* page_table;
  const int64_t* slots;  // [rows], -1: nothing to append
  int64_t num_runs;
  int64_t num_segments;
  int64_t num_rows;
  int64_t page_size;
};

// The flat arrays of ViewTables (core/view_tables.h).
struct ViewArrays {
  const DeviceRow* rows;
  const DeviceEntry* entries;
  const DeviceSegment* segments;
  const int32_t* page_table;
  int64_t num_rows, num_entries, num_segments, num_pages;
};

// Keys and values of one layer: [page, kv_head, page_size, head_dim], contiguous; scales of codes
// [page, kv_head, page_size, groups].
struct Pool {
  void* k;
  void* v;
  float* k_scales;  // nullptr without codes
  float* v_scales;
  int64_t num_pages;
  int64_t kv_heads;
  int64_t page_size;
  int64_t head_dim_k;
  int64_t head_dim_v;
  DType dtype;
  Codes codes;

  int64_t stored_size() const { return codes == Codes::kNone ? element_size(dtype) : 1; }
};

// [rows, heads, dim] with the last dimension contiguous; strides in elements.
struct Rows {
  void* data;
  int64_t row_stride;
  int64_t head_stride;
};

// cos and sin of each distinct re-rotation: [rotations, pairs, 2]. Dimension `first + i` turns with
// `first + pairs + i` (half layout) or the neighbours turn together (interleaved).
struct RotationTable {
  const float* cos_sin;  // nullptr: no pair of the plan turns, or the model has no positions
  int64_t rotations;
  int64_t first;
  int64_t pairs;
  bool interleaved;
};

// Attention of one layer.
struct AttentionCall {
  Rows q;      // [rows, q_heads, head_dim_k]
  Rows out;    // [rows, q_heads, head_dim_v]
  float* lse;  // [rows, q_heads] natural logarithm, or nullptr
  int64_t q_heads;
  float scale;
  float softcap;       // 0: none
  int64_t window;      // 0: none; else keys with query position - key position < window
  int64_t chunk;       // 0: none; else keys of the query's own chunk of this many positions
  const float* sinks;  // [q_heads] or nullptr
  RotationTable rotation;
  bool invariant;  // cut at fixed 512-token chunks of each segment
  int threads;
};

// How a token of one row is drawn; Python has it as a record (ops/draws.py).
struct RowDraw {
  uint64_t key, count;  // of the random number
  double tail;          // 1 - top_p; 0: none
  float temperature;    // 0: the likeliest token
  float min_p;          // 0: none
  int32_t top_k;        // 0: none
};

// Scores become tokens. Outputs are [rows]; a row that has nothing to draw from (NaN, +inf, or
// -inf alone) gets token -1.
struct SampleCall {
  const void* scores;  // [rows, vocab], what tokens are drawn by
  int64_t row_stride;  // in elements
  DType dtype;
  const void* logits;  // the same before processors, whose log-probabilities are told
  int64_t logits_stride;
  DType logits_dtype;
  int64_t rows, vocab;
  const RowDraw* draws;
  int64_t* tokens;
  float* logprobs;        // of the token by `logits`
  float* drawn_logprobs;  // of the token among those that were left
  float* entropies;       // of `logits`, natural logarithm
  int threads;
};

}  // namespace apr
