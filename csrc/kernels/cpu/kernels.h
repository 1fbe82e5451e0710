// The CPU kernels' entry points, and the table that each instruction set fills in.
#pragma once

#include <string>
#include <vector>

#include "core/types.h"
#include "kernels/params.h"

namespace apr::cpu {

inline constexpr int64_t kTile = 64;       // tokens of a tile
inline constexpr int64_t kMaxLanes = 256;  // query rows times group that share one pass over a tile
inline constexpr int64_t kLaneAlign = 16;  // lanes are padded to a multiple of it
// The maximum of no scores: the lowest finite number, so that a fully masked row keeps sum 0 and
// makes no NaN.
inline constexpr float kNoScore = -3.4028234664e38f;

// Attention of up to kMaxLanes query rows ("lanes") over tokens [begin, end) of one segment, for
// one kv head.
struct TileJob {
  const char* k;  // pool base of this kv head: page p lies at k + p * page_bytes_k
  const char* v;
  int64_t page_bytes_k, page_bytes_v;
  Codes codes;
  const float* k_scales;  // of codes: page p's lie behind those of p * page_rows rows
  const float* v_scales;
  int64_t page_rows;
  char* decoded;  // of codes: room for a tile of keys and one of values
  const int32_t* pages;
  int64_t page_size;
  int64_t begin, end;  // slots
  // Where the tile (or chunk) of `begin` starts. Products of pairs of tokens start there when they
  // are pinned: which tokens make a pair decides the last bits.
  int64_t grid_begin;
  int64_t head_dim_k, head_dim_v;
  int64_t lanes;
  const float* q;          // [lanes padded to kLaneAlign, head_dim_k]; the padding is 0
  float factor;            // makes scores logarithms to base 2 (or the softcap's argument)
  const int32_t* lane_lo;  // visible slots of each lane; [lanes padded]
  const int32_t* lane_hi;
  int64_t all_lo, all_hi;  // slots that every lane sees
  float softcap;
  bool pinned;     // the path must not depend on the number of lanes
  float* scratch;  // scratch_floats() of them, aligned to 64 bytes
  float* out;      // [lanes, head_dim_v], not normalised
  float* max;      // [lanes padded], base 2
  float* sum;      // [lanes padded]
};

// What a TileJob's scratch must hold, in floats, for any instruction set: packed queries and sums,
// scores (then probabilities) of a panel, a packed tile of keys and one of values.
inline int64_t scratch_floats(int64_t lanes, int64_t head_dim_k, int64_t head_dim_v) {
  const int64_t dim = head_dim_k > head_dim_v ? head_dim_k : head_dim_v;
  return lanes * (head_dim_k + head_dim_v) + kTile * (32 + 2 * dim) + 1024;
}

// Partial results of one row and head, and what becomes of them.
struct MergeJob {
  const float* out;  // part i at out + i * stride * dim
  const float* max;  // part i at max + i * stride
  const float* sum;
  int64_t parts, stride, dim;
  float* merged;  // [dim], not normalised
  float merged_max, merged_sum;
};

// A row of scores, of which tokens are drawn under a temperature.
struct ScoreRow {
  const void* data;
  int64_t count;
  float temperature;
  float top;  // the highest score under the temperature
};

// Which scores of a row a token is drawn from.
struct Kept {
  bool all;
  float least;  // scores above, and of those that are equal the ones from `first_tie` on
  int32_t first_tie;
  float least_share;  // of the likeliest token's probability
};

inline constexpr int64_t kScoreBlock = 4096;  // scores whose weights are summed up together
// Groups of up to this many scores, whose highest are known: for any instruction set no more than
// score_groups.
inline constexpr int64_t kScoreGroup = 64;
inline int64_t score_groups(int64_t count) { return count / kScoreGroup + 16; }
// Bins by how far a score lies below the highest; the last one takes the rest.
inline constexpr int32_t kScoreBins = 2048;
inline constexpr float kBinsOfUnit = 64.f;
struct ScoreBin {
  int64_t mass, count;
};
struct Score {
  float score;
  int64_t weight;
};

// scores.h says what each does.
struct ScorePasses {
  float (*highest)(const ScoreRow& row, float* groups);
  int64_t (*first)(const ScoreRow& row, float score);
  int64_t (*nth_last)(const ScoreRow& row, float score, int64_t n);
  int64_t (*weigh_all)(const ScoreRow& row, double& moment);
  void (*weigh)(const ScoreRow& row, const Kept& kept, int64_t* blocks);
  int64_t (*find_weight)(const ScoreRow& row, const Kept& kept, int64_t block, int64_t target);
  int64_t (*bin)(const ScoreRow& row, float floor, bool all, ScoreBin* bins);
  void (*collect)(const ScoreRow& row, float floor, int32_t bin, Score* to);
};

struct InstructionSet {
  const char* name;
  void (*attend[3])(const TileJob&);  // by DType
  void (*merge)(MergeJob&);
  void (*load_row[3])(const void* from, int64_t count, float* to);
  void (*store_row[3])(const float* from, float factor, int64_t count, void* to);
  void (*encode_row)(Codes codes, const float* from, int64_t count, void* to, float* scales);
  ScorePasses scores[3];
};

const InstructionSet& instruction_set();                // the best that this machine runs
std::vector<const InstructionSet*> instruction_sets();  // all that were built and run here
// "" returns to the best. Also takes the emulated matrix unit, which is never chosen by itself.
void force_instruction_set(const std::string& name);

void append(const Rows& k, const Rows& v, const Pool& pool, const PlanArrays& plan, int threads);
void copy_tokens(const Pool& pool, const PlanCopy* copies, int64_t count);
void attention(const AttentionCall& params, const Pool& pool, const PlanArrays& plan);

// Merges partial results part by part: out [rows, heads, dim] with lse [rows, heads].
struct MergeParams {
  std::vector<Rows> parts;
  std::vector<const float*> part_lse;
  Rows out;
  float* lse;
  int64_t rows, heads, dim;
  DType dtype;
  int threads;
};
void merge(const MergeParams& params);

void sample(const SampleCall& call);

}  // namespace apr::cpu
