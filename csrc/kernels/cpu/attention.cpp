// Tree attention on the CPU: each chunk of a segment is read once for all rows that see it, and the
// partial results of a row are merged by log-sum-exp in a fixed order.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/schedule.h"

namespace apr::cpu {
namespace {

// Grow-only memory, aligned for the widest vectors.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      const int64_t size = floats + floats / 2;
      const size_t bytes = (static_cast<size_t>(size) * 4 + 63) / 64 * 64;
      auto* data = static_cast<float*>(std::aligned_alloc(64, bytes));
      if (data == nullptr) throw std::bad_alloc();
      data_.reset(data);
      size_ = size;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

// Partial results: out [part, q_head, head_dim_v] unnormalised, max (base 2) and sum [part,
// q_head].
struct Parts {
  float* out;
  float* max;
  float* sum;
};

// One lane's query, turned by the pair's rotation: to [head_dim].
void gather_query(const AttentionCall& call, const Pool& pool, const Visit& visit, int64_t head,
                  float* to) {
  const int64_t at = visit.row * call.q.row_stride + head * call.q.head_stride;
  const char* q = static_cast<const char*>(call.q.data) + at * element_size(pool.dtype);
  instruction_set().load_row[static_cast<int>(pool.dtype)](q, pool.head_dim_k, to);
  const RotationTable& table = call.rotation;
  if (visit.rotation_row < 0 || table.cos_sin == nullptr) return;
  const float* cs = table.cos_sin + visit.rotation_row * table.pairs * 2;
  for (int64_t i = 0; i < table.pairs; ++i) {
    const int64_t a = table.first + (table.interleaved ? 2 * i : i);
    const int64_t b = table.interleaved ? a + 1 : a + table.pairs;
    const float x = to[a], y = to[b];
    const float c = cs[2 * i], s = cs[2 * i + 1];
    to[a] = x * c - y * s;
    to[b] = y * c + x * s;
  }
}

struct Output {
  const AttentionCall& call;
  const Pool& pool;

  // Writes one row of one head from an unnormalised sum, its maximum (base 2) and its weight.
  void write(int64_t row, int64_t head, const float* o, float max, float sum) const {
    float weight = 1.f;
    if (call.sinks != nullptr) {
      const float sink = call.sinks[head] * kLog2e, top = std::max(max, sink);
      weight = std::exp2(max - top);
      sum = sum * weight + std::exp2(sink - top);
      max = top;
    }
    const float inverse = sum > 0.f ? weight / sum : (sum == sum ? 0.f : sum);
    const int64_t at = row * call.out.row_stride + head * call.out.head_stride;
    char* out = static_cast<char*>(call.out.data) + at * element_size(pool.dtype);
    instruction_set().store_row[static_cast<int>(pool.dtype)](o, inverse, pool.head_dim_v, out);
    if (call.lse != nullptr) {
      call.lse[row * call.q_heads + head] =
          sum > 0.f ? (max + std::log2(sum)) * kLn2 : (sum == sum ? -INFINITY : sum);
    }
  }
};

// What a task needs of the rows of its item: queries [lanes, head_dim_k] and what they see.
void gather_lanes(const AttentionCall& call, const Pool& pool, const Schedule& schedule,
                  const Item& item, int64_t kv_head, float* q, int32_t* lo, int32_t* hi) {
  const int64_t group = call.q_heads / pool.kv_heads;
  int64_t lane = 0;
  for (int32_t v = item.first_visit; v < item.end_visit; ++v) {
    const Visit& visit = schedule.visits[v];
    for (int64_t g = 0; g < group; ++g, ++lane) {
      lo[lane] = visit.lo;
      hi[lane] = visit.hi;
      gather_query(call, pool, visit, kv_head * group + g, q + lane * pool.head_dim_k);
    }
  }
  for (; lane % kLaneAlign != 0; ++lane) {
    lo[lane] = item.lo;
    hi[lane] = item.hi;
    std::fill_n(q + lane * pool.head_dim_k, pool.head_dim_k, 0.f);
  }
}

void run_task(const AttentionCall& call, const Pool& pool, const PlanArrays& plan,
              const Schedule& schedule, const Parts& parts, int64_t item_index, int64_t chunk,
              int64_t kv_head) {
  const Item& item = schedule.items[item_index];
  const int64_t group = call.q_heads / pool.kv_heads;
  const int64_t lanes = (item.end_visit - item.first_visit) * group;
  const int64_t padded = (lanes + kLaneAlign - 1) / kLaneAlign * kLaneAlign;
  const int64_t floats = scratch_floats(padded, pool.head_dim_k, pool.head_dim_v);
  const int64_t dims = pool.head_dim_k + pool.head_dim_v;
  const int64_t decoded = pool.codes == Codes::kNone ? 0 : kTile * dims;

  thread_local Scratch memory;
  TileJob job{};
  job.scratch = memory.get(floats + padded * (dims + 4) + decoded);
  job.out = job.scratch + floats;
  float* q = job.out + padded * pool.head_dim_v;
  job.max = q + padded * pool.head_dim_k;
  job.sum = job.max + padded;
  auto* lane_lo = reinterpret_cast<int32_t*>(job.sum + padded);
  int32_t* lane_hi = lane_lo + padded;
  job.decoded = reinterpret_cast<char*>(lane_hi + padded);
  gather_lanes(call, pool, schedule, item, kv_head, q, lane_lo, lane_hi);

  const int64_t size = pool.stored_size();
  const int64_t first_chunk = item.lo / item.chunk;
  job.q = q;
  job.lane_lo = lane_lo;
  job.lane_hi = lane_hi;
  job.all_lo = item.all_lo;
  job.all_hi = item.all_hi;
  const int64_t chunk_begin = (first_chunk + chunk) * item.chunk;
  job.begin = std::max<int64_t>(item.lo, chunk_begin);
  job.grid_begin = std::max(chunk_begin, job.begin - job.begin % pool.page_size % kTile);
  job.end = std::min<int64_t>(item.hi, (first_chunk + chunk + 1) * item.chunk);
  job.head_dim_k = pool.head_dim_k;
  job.head_dim_v = pool.head_dim_v;
  job.lanes = lanes;
  job.factor = call.softcap != 0.f ? call.scale / call.softcap : call.scale * kLog2e;
  job.softcap = call.softcap;
  job.pinned = call.invariant;
  job.page_size = pool.page_size;
  job.pages = plan.page_table + plan.segment_pages[item.segment];
  job.page_bytes_k = pool.kv_heads * pool.page_size * pool.head_dim_k * size;
  job.page_bytes_v = pool.kv_heads * pool.page_size * pool.head_dim_v * size;
  job.k = static_cast<const char*>(pool.k) + kv_head * pool.page_size * pool.head_dim_k * size;
  job.v = static_cast<const char*>(pool.v) + kv_head * pool.page_size * pool.head_dim_v * size;
  job.codes = pool.codes;
  job.page_rows = pool.kv_heads * pool.page_size;
  if (pool.codes != Codes::kNone) {
    job.k_scales = pool.k_scales + kv_head * pool.page_size * code_groups(pool.head_dim_k);
    job.v_scales = pool.v_scales + kv_head * pool.page_size * code_groups(pool.head_dim_v);
  }
  instruction_set().attend[static_cast<int>(pool.dtype)](job);

  const Output output{call, pool};
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const Visit& visit = schedule.visits[item.first_visit + lane / group];
    const int64_t head = kv_head * group + lane % group;
    const float* out = job.out + lane * pool.head_dim_v;
    if (visit.first_part < 0) {
      output.write(visit.row, head, out, job.max[lane], job.sum[lane]);
      continue;
    }
    const int64_t part = (visit.first_part + chunk) * call.q_heads + head;
    std::copy(out, out + pool.head_dim_v, parts.out + part * pool.head_dim_v);
    parts.max[part] = job.max[lane];
    parts.sum[part] = job.sum[lane];
  }
}

void merge_row(const AttentionCall& call, const Pool& pool, const Schedule& schedule,
               const Parts& parts, int64_t row, int64_t head) {
  const int64_t first = schedule.row_parts[row], count = schedule.row_parts[row + 1] - first;
  thread_local Scratch scratch;
  MergeJob job{};
  job.parts = count;
  job.stride = call.q_heads;
  job.dim = pool.head_dim_v;
  job.out = parts.out + (first * call.q_heads + head) * pool.head_dim_v;
  job.max = parts.max + first * call.q_heads + head;
  job.sum = parts.sum + first * call.q_heads + head;
  job.merged = scratch.get(pool.head_dim_v);
  instruction_set().merge(job);
  Output{call, pool}.write(row, head, job.merged, job.merged_max, job.merged_sum);
}

// Below this many products, about ten microseconds, waking other threads costs more than it gains.
constexpr int64_t kWorkAlone = int64_t{1} << 20;

// Partial results of a pass, at most; longer plans are run in several passes over the rows.
constexpr int64_t kMostPartBytes = int64_t{1} << 28;

void attend_rows(const AttentionCall& call, const Pool& pool, const PlanArrays& plan,
                 int64_t row_begin, int64_t row_end) {
  const Schedule schedule = make_schedule(call, pool, plan, row_begin, row_end);
  const int64_t count = schedule.row_parts.back() * call.q_heads;
  const int64_t floats = count * (pool.head_dim_v + 2);
  if (floats * 4 > kMostPartBytes && row_end - row_begin > 1) {
    const int64_t middle = (row_begin + row_end) / 2;
    attend_rows(call, pool, plan, row_begin, middle);
    attend_rows(call, pool, plan, middle, row_end);
    return;
  }
  thread_local Scratch scratch;
  float* memory = scratch.get(floats);
  const Parts parts{memory, memory + count * pool.head_dim_v,
                    memory + count * (pool.head_dim_v + 1)};
  const auto attend = [&](int64_t i) {
    const int64_t task = i / pool.kv_heads;
    const auto after =
        std::upper_bound(schedule.item_tasks.begin(), schedule.item_tasks.end(), task);
    const int64_t item = after - schedule.item_tasks.begin() - 1;
    run_task(call, pool, plan, schedule, parts, item, task - schedule.item_tasks[item],
             i % pool.kv_heads);
  };
  constexpr int64_t kHeadsAtOnce = 8;
  const int64_t head_blocks = (call.q_heads + kHeadsAtOnce - 1) / kHeadsAtOnce;
  const auto merge = [&](int64_t i) {
    const int64_t first = i % head_blocks * kHeadsAtOnce;
    const int64_t end = std::min(first + kHeadsAtOnce, call.q_heads);
    for (int64_t head = first; head < end; ++head) {
      merge_row(call, pool, schedule, parts, schedule.merged_rows[i / head_blocks], head);
    }
  };
  int64_t work = 0;  // multiplications and additions, in lanes that are padded
  for (const Item& item : schedule.items) {
    const int64_t lanes = (item.end_visit - item.first_visit) * call.q_heads / pool.kv_heads;
    work += (item.hi - item.lo) * (lanes + kLaneAlign);
  }
  work *= pool.kv_heads * (pool.head_dim_k + pool.head_dim_v);
  const int threads = work < kWorkAlone ? 1 : call.threads;
  const int64_t tasks = schedule.item_tasks.back() * pool.kv_heads;
  const int64_t merges = static_cast<int64_t>(schedule.merged_rows.size()) * head_blocks;
  parallel(threads, {{tasks, attend}, {merges, merge}});
}

}  // namespace

void attention(const AttentionCall& call, const Pool& pool, const PlanArrays& plan) {
  attend_rows(call, pool, plan, 0, plan.num_rows);
}

}  // namespace apr::cpu
