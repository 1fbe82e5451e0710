// Tree attention on the CPU: each chunk of a segment is read once for all rows that see it, and the
// partial results of a row are merged by log-sum-exp in a fixed order.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/schedule.h"

namespace apr::cpu {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

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

// The query of one lane, scaled, turned by the pair's rotation, as a column of q [head_dim, lanes].
template <typename T>
void gather_query(const AttentionParams& params, const Pool& pool, const Visit& visit, int64_t head,
                  float factor, float* column, int64_t lanes) {
  const auto* q = static_cast<const typename T::Storage*>(params.q.data) +
                  visit.row * params.q.row_stride + head * params.q.head_stride;
  for (int64_t d = 0; d < pool.head_dim_k; ++d) column[d * lanes] = T::load(q[d]) * factor;
  const RotationTable& table = params.rotation;
  if (visit.rotation_row < 0 || table.cos_sin == nullptr) return;
  const float* cs = table.cos_sin + visit.rotation_row * table.pairs * 2;
  for (int64_t i = 0; i < table.pairs; ++i) {
    const int64_t a = table.first + (table.interleaved ? 2 * i : i);
    const int64_t b = table.interleaved ? a + 1 : a + table.pairs;
    const float x = column[a * lanes], y = column[b * lanes];
    const float c = cs[2 * i], s = cs[2 * i + 1];
    column[a * lanes] = x * c - y * s;
    column[b * lanes] = y * c + x * s;
  }
}

struct Output {
  const AttentionParams& params;
  const Pool& pool;

  // Writes one row of one head from an unnormalised sum, its maximum (base 2) and its weight.
  void write(int64_t row, int64_t head, const float* o, int64_t stride, float max,
             float sum) const {
    float weight = 1.f;
    if (params.sinks != nullptr) {
      const float sink = params.sinks[head] * kLog2e, top = std::max(max, sink);
      weight = std::exp2(max - top);
      sum = sum * weight + std::exp2(sink - top);
      max = top;
    }
    const float inverse = sum > 0.f ? weight / sum : (sum == sum ? 0.f : sum);
    dispatch(pool.dtype, [&](auto type) {
      using T = decltype(type);
      auto* out = static_cast<typename T::Storage*>(params.out.data) + row * params.out.row_stride +
                  head * params.out.head_stride;
      for (int64_t d = 0; d < pool.head_dim_v; ++d) out[d] = T::store(o[d * stride] * inverse);
    });
    if (params.lse != nullptr) {
      params.lse[row * params.q_heads + head] =
          sum > 0.f ? (max + std::log2(sum)) * kLn2 : (sum == sum ? -INFINITY : sum);
    }
  }
};

void run_task(const AttentionParams& params, const Pool& pool, const PlanArrays& plan,
              const Schedule& schedule, const Parts& parts, int64_t block_index, int64_t chunk,
              int64_t kv_head) {
  const Block& block = schedule.blocks[block_index];
  const int64_t group = params.q_heads / pool.kv_heads;
  const int64_t used = (block.end_visit - block.first_visit) * group;
  const int64_t lanes = (used + kLaneAlign - 1) / kLaneAlign * kLaneAlign;
  const int64_t dim = std::max(pool.head_dim_k, pool.head_dim_v);

  thread_local Scratch scratch;
  float* memory =
      scratch.get(lanes * (pool.head_dim_k + pool.head_dim_v + kTile + 4) + kTile * dim + 16);
  TileJob job{};
  float* q = memory;
  job.out = q + pool.head_dim_k * lanes;
  job.scores = job.out + pool.head_dim_v * lanes;
  job.max = job.scores + kTile * lanes;
  job.sum = job.max + lanes;
  auto* lane_lo = reinterpret_cast<int32_t*>(job.sum + lanes);
  int32_t* lane_hi = lane_lo + lanes;
  job.wide = reinterpret_cast<float*>(lane_hi + lanes);

  const float factor =
      params.softcap != 0.f ? params.scale / params.softcap : params.scale * kLog2e;
  for (int64_t lane = 0; lane < used; ++lane) {
    const Visit& visit = schedule.visits[block.first_visit + lane / group];
    lane_lo[lane] = visit.lo;
    lane_hi[lane] = visit.hi;
    dispatch(pool.dtype, [&](auto type) {
      gather_query<decltype(type)>(params, pool, visit, kv_head * group + lane % group, factor,
                                   q + lane, lanes);
    });
  }
  for (int64_t lane = used; lane < lanes; ++lane) {
    lane_lo[lane] = block.lo;
    lane_hi[lane] = block.hi;
    for (int64_t d = 0; d < pool.head_dim_k; ++d) q[d * lanes + lane] = 0.f;
  }

  const int64_t size = element_size(pool.dtype);
  const int64_t first_chunk = block.lo / block.chunk;
  job.q = q;
  job.lane_lo = lane_lo;
  job.lane_hi = lane_hi;
  job.all_lo = block.all_lo;
  job.all_hi = block.all_hi;
  job.begin = std::max<int64_t>(block.lo, (first_chunk + chunk) * block.chunk);
  job.end = std::min<int64_t>(block.hi, (first_chunk + chunk + 1) * block.chunk);
  job.head_dim_k = pool.head_dim_k;
  job.head_dim_v = pool.head_dim_v;
  job.lanes = lanes;
  job.softcap = params.softcap;
  job.page_size = pool.page_size;
  job.pages = plan.page_table + plan.segment_pages[block.segment];
  job.page_bytes_k = pool.kv_heads * pool.page_size * pool.head_dim_k * size;
  job.page_bytes_v = pool.kv_heads * pool.page_size * pool.head_dim_v * size;
  job.k = static_cast<const char*>(pool.k) + kv_head * pool.page_size * pool.head_dim_k * size;
  job.v = static_cast<const char*>(pool.v) + kv_head * pool.page_size * pool.head_dim_v * size;
  instruction_set().attend[static_cast<int>(pool.dtype)](job);

  const Output output{params, pool};
  for (int64_t lane = 0; lane < used; ++lane) {
    const Visit& visit = schedule.visits[block.first_visit + lane / group];
    const int64_t head = kv_head * group + lane % group;
    if (schedule.row_parts[visit.row + 1] - schedule.row_parts[visit.row] == 1) {
      output.write(visit.row, head, job.out + lane, lanes, job.max[lane], job.sum[lane]);
      continue;
    }
    const int64_t part = (visit.first_part + chunk) * params.q_heads + head;
    for (int64_t d = 0; d < pool.head_dim_v; ++d) {
      parts.out[part * pool.head_dim_v + d] = job.out[d * lanes + lane];
    }
    parts.max[part] = job.max[lane];
    parts.sum[part] = job.sum[lane];
  }
}

void merge_row(const AttentionParams& params, const Pool& pool, const Schedule& schedule,
               const Parts& parts, int64_t row) {
  const int64_t first = schedule.row_parts[row], end = schedule.row_parts[row + 1];
  if (end - first == 1) return;
  thread_local Scratch scratch;
  float* o = scratch.get(pool.head_dim_v);
  for (int64_t head = 0; head < params.q_heads; ++head) {
    float max = -1e30f, sum = 0.f;
    for (int64_t p = first; p < end; ++p) max = std::max(max, parts.max[p * params.q_heads + head]);
    std::fill(o, o + pool.head_dim_v, 0.f);
    for (int64_t p = first; p < end; ++p) {
      const int64_t part = p * params.q_heads + head;
      const float weight = std::exp2(parts.max[part] - max);
      sum += weight * parts.sum[part];
      for (int64_t d = 0; d < pool.head_dim_v; ++d) {
        o[d] += weight * parts.out[part * pool.head_dim_v + d];
      }
    }
    Output{params, pool}.write(row, head, o, 1, max, sum);
  }
}

}  // namespace

void attention(const AttentionParams& params, const Pool& pool, const PlanArrays& plan) {
  const Schedule schedule = make_schedule(params, pool, plan);
  // Rows with one part write straight to the output: their share of this memory is never touched.
  const int64_t count = schedule.row_parts.back() * params.q_heads;
  thread_local Scratch scratch;
  float* memory = scratch.get(count * (pool.head_dim_v + 2));
  const Parts parts{memory, memory + count * pool.head_dim_v,
                    memory + count * (pool.head_dim_v + 1)};
  std::vector<int32_t> task_block;
  for (size_t b = 0; b < schedule.blocks.size(); ++b) {
    task_block.insert(task_block.end(), schedule.blocks[b].chunks, static_cast<int32_t>(b));
  }
  const int64_t tasks = static_cast<int64_t>(task_block.size());
  parallel_for(tasks * pool.kv_heads, params.threads, [&](int64_t i) {
    const int64_t task = i / pool.kv_heads;
    const int64_t block = task_block[task];
    run_task(params, pool, plan, schedule, parts, block, task - schedule.block_tasks[block],
             i % pool.kv_heads);
  });
  constexpr int64_t kRowsAtOnce = 16;
  parallel_for((plan.num_rows + kRowsAtOnce - 1) / kRowsAtOnce, params.threads, [&](int64_t b) {
    const int64_t end = std::min(plan.num_rows, (b + 1) * kRowsAtOnce);
    for (int64_t row = b * kRowsAtOnce; row < end; ++row) {
      merge_row(params, pool, schedule, parts, row);
    }
  });
}

}  // namespace apr::cpu
