// Merges attention results over disjoint sets of keys by their log-sum-exp.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"

namespace apr::cpu {
namespace {

// What one row and head of all parts need: the parts in float, and their weights as a MergeJob's.
struct Memory {
  std::vector<float> parts, max, sum, merged;
};

void merge_head(const MergeParams& params, int64_t row, int64_t head, Memory& memory) {
  const InstructionSet& set = instruction_set();
  const int dtype = static_cast<int>(params.dtype);
  const int64_t size = element_size(params.dtype), at = row * params.heads + head;
  const auto place = [&](const Rows& rows) {
    return static_cast<char*>(rows.data) + (row * rows.row_stride + head * rows.head_stride) * size;
  };
  float top = -INFINITY;
  for (const float* lse : params.part_lse) top = std::max(top, lse[at]);
  MergeJob job{};
  for (size_t p = 0; p < params.parts.size(); ++p) {
    const float lse = params.part_lse[p][at];
    if (lse == -INFINITY) continue;  // nothing was visible, whatever its output holds
    memory.max[job.parts] = (lse - top) * kLog2e;
    set.load_row[dtype](place(params.parts[p]), params.dim,
                        memory.parts.data() + job.parts * params.dim);
    ++job.parts;
  }
  job.out = memory.parts.data();
  job.max = memory.max.data();
  job.sum = memory.sum.data();
  job.stride = 1;
  job.dim = params.dim;
  job.merged = memory.merged.data();
  set.merge(job);
  const bool empty = job.parts == 0;
  set.store_row[dtype](job.merged, empty ? 0.f : 1.f / job.merged_sum, params.dim,
                       place(params.out));
  params.lse[at] = empty ? -INFINITY : top + std::log(job.merged_sum);
}

}  // namespace

void merge(const MergeParams& params) {
  constexpr int64_t kHeadsAtOnce = 64;
  const int64_t heads = params.rows * params.heads, count = params.parts.size();
  const auto some = [&](int64_t i) {
    Memory memory{std::vector<float>(count * params.dim), std::vector<float>(count),
                  std::vector<float>(count, 1.f), std::vector<float>(params.dim)};
    const int64_t end = std::min(heads, (i + 1) * kHeadsAtOnce);
    for (int64_t at = i * kHeadsAtOnce; at < end; ++at) {
      merge_head(params, at / params.heads, at % params.heads, memory);
    }
  };
  parallel(params.threads, {{(heads + kHeadsAtOnce - 1) / kHeadsAtOnce, some}});
}

}  // namespace apr::cpu
