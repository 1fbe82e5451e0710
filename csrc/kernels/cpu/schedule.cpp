// Cuts the pairs of a plan into items of rows and chunks of tokens, and numbers the partial
// results.
#include "kernels/cpu/schedule.h"

#include <algorithm>

#include "kernels/cpu/kernels.h"
#include "kernels/ranges.h"

namespace apr::cpu {
namespace {

constexpr int64_t kInvariantChunk = 512;
constexpr int64_t kSmallestChunk = 256;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
void collect_items(const AttentionCall& call, const Pool& pool, const PlanArrays& plan,
                   int64_t row_begin, int64_t row_end, Schedule& schedule) {
  const int64_t group = call.q_heads / pool.kv_heads;
  const int64_t rows_at_once = std::max<int64_t>(1, kMaxLanes / group);
  const int32_t window = bounded(call.window), chunk = bounded(call.chunk);
  for (int64_t s = 0; s < plan.num_segments; ++s) {
    Item item{};
    const auto open = [&] {
      item = {};
      item.segment = static_cast<int32_t>(s);
      item.first_visit = static_cast<int32_t>(schedule.visits.size());
      item.lo = item.all_hi = INT32_MAX;
    };
    const auto close = [&] {
      item.end_visit = static_cast<int32_t>(schedule.visits.size());
      if (item.end_visit > item.first_visit) schedule.items.push_back(item);
      open();
    };
    open();
    for (int32_t p = plan.segment_pairs[s]; p < plan.segment_pairs[s + 1]; ++p) {
      const PlanPair& pair = plan.pairs[p];
      const PlanRun& run = plan.runs[pair.run];
      const int64_t first = std::max<int64_t>(row_begin - run.row_begin, 0);
      const int64_t end = std::min<int64_t>(row_end - run.row_begin, run.row_count);
      for (int64_t i = first; i < end; ++i) {
        const SlotRange seen = visible_slots(pair, run, static_cast<int32_t>(i), window, chunk);
        const Visit visit{static_cast<int32_t>(run.row_begin + i),
                          seen.lo,
                          seen.hi,
                          pair.rotation_row,
                          pair.order,
                          0};
        if (visit.hi <= visit.lo) continue;
        const auto rows = static_cast<int64_t>(schedule.visits.size()) - item.first_visit;
        const bool apart = rows > 0 && (visit.lo > item.hi || visit.hi < item.lo);
        if (rows == rows_at_once || apart) close();
        schedule.visits.push_back(visit);
        item.lo = std::min(item.lo, visit.lo);
        item.hi = std::max(item.hi, visit.hi);
        item.all_lo = std::max(item.all_lo, visit.lo);
        item.all_hi = std::min(item.all_hi, visit.hi);
      }
    }
    close();
  }
}

// Enough tasks to keep every thread busy, few enough partial results to merge.
void cut_chunks(const AttentionCall& call, const Pool& pool, const PlanArrays& plan,
                Schedule& schedule) {
  int64_t tokens = 0;
  for (const Item& item : schedule.items) tokens += item.hi - item.lo;
  int64_t chunk = kInvariantChunk;
  if (!call.invariant) {
    chunk = std::max(kSmallestChunk, tokens * pool.kv_heads / (8 * std::max(call.threads, 1)));
  }
  schedule.item_tasks.assign(1, 0);
  for (Item& item : schedule.items) {
    int64_t size = chunk;
    if (!call.invariant) {  // even chunks, so that the last one is seldom a small rest
      const int64_t length = item.hi - item.lo, count = (length + chunk - 1) / chunk;
      size = round_up((length + count - 1) / count, plan.page_size);
    }
    item.chunk = static_cast<int32_t>(size);
    item.chunks = static_cast<int32_t>((item.hi - 1) / size - item.lo / size + 1);
    schedule.item_tasks.push_back(schedule.item_tasks.back() + item.chunks);
  }
}

void number_parts(const PlanArrays& plan, int64_t row_begin, int64_t row_end, Schedule& schedule) {
  // Where each row's visits stand, in the order of its view.
  std::vector<int32_t> run_pairs(plan.num_runs, 0);
  for (int64_t p = 0; p < plan.segment_pairs[plan.num_segments]; ++p) {
    ++run_pairs[plan.pairs[p].run];
  }
  std::vector<int64_t> first_place(plan.num_rows + 1, 0);
  for (int64_t r = 0; r < plan.num_runs; ++r) {
    const PlanRun& run = plan.runs[r];
    for (int64_t row = run.row_begin; row < run.row_begin + run.row_count; ++row) {
      first_place[row + 1] = row >= row_begin && row < row_end ? run_pairs[r] : 0;
    }
  }
  for (int64_t row = 0; row < plan.num_rows; ++row) first_place[row + 1] += first_place[row];
  struct Place {
    int32_t visit = -1, chunks = 0;
  };
  std::vector<Place> places(first_place.back());
  for (const Item& item : schedule.items) {
    for (int32_t v = item.first_visit; v < item.end_visit; ++v) {
      const Visit& visit = schedule.visits[v];
      places[first_place[visit.row] + visit.order] = {v, item.chunks};
    }
  }
  schedule.row_parts.assign(plan.num_rows + 1, 0);
  for (int64_t row = 0; row < plan.num_rows; ++row) {
    const auto begin = places.begin() + first_place[row],
               end = places.begin() + first_place[row + 1];
    int32_t count = 0;
    for (auto place = begin; place != end; ++place) count += place->chunks;
    const bool direct = count == 1;
    int32_t next = schedule.row_parts[row];
    for (auto place = begin; place != end; ++place) {
      if (place->visit < 0) continue;
      schedule.visits[place->visit].first_part = direct ? -1 : next;
      next += direct ? 0 : place->chunks;
    }
    schedule.row_parts[row + 1] = next;
    if (!direct && row >= row_begin && row < row_end) {
      schedule.merged_rows.push_back(static_cast<int32_t>(row));
    }
  }
}

}  // namespace

Schedule make_schedule(const AttentionCall& call, const Pool& pool, const PlanArrays& plan,
                       int64_t row_begin, int64_t row_end) {
  Schedule schedule;
  collect_items(call, pool, plan, row_begin, row_end, schedule);
  cut_chunks(call, pool, plan, schedule);
  number_parts(plan, row_begin, row_end, schedule);
  return schedule;
}

}  // namespace apr::cpu
