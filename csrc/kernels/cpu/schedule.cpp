// Cuts the pairs of a plan into blocks of rows and chunks of tokens, and numbers the partial
// results.
#include "kernels/cpu/schedule.h"

#include <algorithm>

#include "kernels/cpu/kernels.h"

namespace apr::cpu {
namespace {

constexpr int64_t kInvariantChunk = 512;
constexpr int64_t kSmallestChunk = 256;

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

// Visible slots of one row: the pair's range, causal in the own tail, cut by window and chunk.
Visit visit_of(const PlanPair& pair, const PlanRun& run, int64_t i, const AttentionParams& params) {
  int64_t lo = pair.lo, hi = pair.hi;
  if (pair.first_own >= 0) hi = std::min<int64_t>(hi, pair.first_own + i + 1);
  const int64_t at = run.view_position + i * run.stride;
  // First slot with a view position above p, and above or at p.
  const auto first_above = [&](int64_t p) {
    return floor_div(p - pair.view_offset, pair.stride) + 1;
  };
  if (params.window > 0) lo = std::max(lo, first_above(at - params.window));
  if (params.chunk > 0) {
    const int64_t start = floor_div(at, params.chunk) * params.chunk;
    lo = std::max(lo, first_above(start - 1));
    hi = std::min(hi, first_above(start + params.chunk - 1));
  }
  return {static_cast<int32_t>(run.row_begin + i), static_cast<int32_t>(lo),
          static_cast<int32_t>(std::max(lo, hi)), pair.rotation_row, 0};
}

void collect_blocks(const AttentionParams& params, const Pool& pool, const PlanArrays& plan,
                    Schedule& schedule) {
  const int64_t group = params.q_heads / pool.kv_heads;
  const int64_t rows_at_once = std::max<int64_t>(1, kMaxLanes / group);
  for (int64_t s = 0; s < plan.num_segments; ++s) {
    Block block{};
    const auto open = [&] {
      block = {};
      block.segment = static_cast<int32_t>(s);
      block.first_visit = static_cast<int32_t>(schedule.visits.size());
      block.lo = block.all_hi = INT32_MAX;
    };
    const auto close = [&] {
      block.end_visit = static_cast<int32_t>(schedule.visits.size());
      if (block.end_visit > block.first_visit) schedule.blocks.push_back(block);
      open();
    };
    open();
    for (int32_t p = plan.segment_pairs[s]; p < plan.segment_pairs[s + 1]; ++p) {
      const PlanPair& pair = plan.pairs[p];
      const PlanRun& run = plan.runs[pair.run];
      for (int64_t i = 0; i < run.row_count; ++i) {
        const Visit visit = visit_of(pair, run, i, params);
        if (visit.hi <= visit.lo) continue;
        if (static_cast<int64_t>(schedule.visits.size()) - block.first_visit == rows_at_once) {
          close();
        }
        schedule.visits.push_back(visit);
        block.lo = std::min(block.lo, visit.lo);
        block.hi = std::max(block.hi, visit.hi);
        block.all_lo = std::max(block.all_lo, visit.lo);
        block.all_hi = std::min(block.all_hi, visit.hi);
      }
    }
    close();
  }
}

// Enough tasks to keep every thread busy, few enough partial results to merge.
void cut_chunks(const AttentionParams& params, const Pool& pool, const PlanArrays& plan,
                Schedule& schedule) {
  int64_t tokens = 0;
  for (const Block& block : schedule.blocks) tokens += block.hi - block.lo;
  int64_t chunk = kInvariantChunk;
  if (!params.invariant) {
    chunk = std::max(kSmallestChunk, tokens * pool.kv_heads / (8 * std::max(params.threads, 1)));
    chunk = (chunk + plan.page_size - 1) / plan.page_size * plan.page_size;
  }
  schedule.block_tasks.assign(1, 0);
  for (Block& block : schedule.blocks) {
    block.chunk = static_cast<int32_t>(chunk);
    block.chunks = static_cast<int32_t>((block.hi - 1) / chunk - block.lo / chunk + 1);
    schedule.block_tasks.push_back(schedule.block_tasks.back() + block.chunks);
  }
}

void number_parts(const PlanArrays& plan, Schedule& schedule) {
  schedule.row_parts.assign(plan.num_rows + 1, 0);
  for (const Block& block : schedule.blocks) {
    for (int32_t v = block.first_visit; v < block.end_visit; ++v) {
      schedule.row_parts[schedule.visits[v].row + 1] += block.chunks;
    }
  }
  for (int64_t row = 0; row < plan.num_rows; ++row) {
    schedule.row_parts[row + 1] += schedule.row_parts[row];
  }
  std::vector<int32_t> next(schedule.row_parts.begin(), schedule.row_parts.end() - 1);
  for (const Block& block : schedule.blocks) {
    for (int32_t v = block.first_visit; v < block.end_visit; ++v) {
      Visit& visit = schedule.visits[v];
      visit.first_part = next[visit.row];
      next[visit.row] += block.chunks;
    }
  }
}

}  // namespace

Schedule make_schedule(const AttentionParams& params, const Pool& pool, const PlanArrays& plan) {
  Schedule schedule;
  collect_blocks(params, pool, plan, schedule);
  cut_chunks(params, pool, plan, schedule);
  number_parts(plan, schedule);
  return schedule;
}

}  // namespace apr::cpu
