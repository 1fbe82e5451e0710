// The CPU kernels' entry points, and the table that each instruction set fills in.
#pragma once

#include <string>
#include <vector>

#include "core/types.h"
#include "kernels/params.h"

namespace apr::cpu {

inline constexpr int64_t kTile = 64;       // tokens of a tile
inline constexpr int64_t kMaxLanes = 256;  // query rows times group that share one pass over a tile

// Attention of up to kMaxLanes lanes over tokens [begin, end) of one segment, for one kv head.
// Lanes are the innermost dimension everywhere and padded to a multiple of kLaneAlign.
inline constexpr int64_t kLaneAlign = 16;

struct TileJob {
  const char* k;  // pool base of this kv head: page p lies at k + p * page_bytes_k
  const char* v;
  int64_t page_bytes_k, page_bytes_v;
  const int32_t* pages;
  int64_t page_size;
  int64_t begin, end;  // slots
  int64_t head_dim_k, head_dim_v;
  int64_t lanes;
  const float* q;          // [head_dim_k, lanes], scaled to base 2 (or to the softcap's argument)
  const int32_t* lane_lo;  // [lanes] visible slots of each lane
  const int32_t* lane_hi;
  int64_t all_lo, all_hi;  // slots that every lane sees
  float softcap;
  float* scores;  // scratch [kTile, lanes]
  float* wide;    // scratch [kTile, max(head_dim_k, head_dim_v)]
  float* out;     // [head_dim_v, lanes], not normalised
  float* max;     // [lanes], base 2
  float* sum;     // [lanes]
};

struct InstructionSet {
  const char* name;
  void (*attend[3])(const TileJob&);  // by DType
};

const InstructionSet& instruction_set();                // the best that this machine runs
std::vector<const InstructionSet*> instruction_sets();  // all that were built and run here
void force_instruction_set(const std::string& name);    // "" returns to the best

void append(const Rows& k, const Rows& v, const Pool& pool, const PlanArrays& plan, int threads);
void copy_tokens(const Pool& pool, const PlanCopy* copies, int64_t count);
void attention(const AttentionParams& params, const Pool& pool, const PlanArrays& plan);

// Merges partial results part by part: out [rows, heads, dim] with lse [rows, heads].
struct MergeParams {
  std::vector<Rows> parts;
  std::vector<const float*> part_lse;
  Rows out;
  float* lse;
  int64_t rows, heads, dim;
  DType dtype;
};
void merge(const MergeParams& params);

}  // namespace apr::cpu
