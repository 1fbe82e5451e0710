// Implements the GPU back-end: for CUDA, or emulated.
#include "kernels/gpu.h"

#include "kernels/cuda/device.h"
#include "kernels/cuda/layout.h"
#include "kernels/cuda/steps.h"
#include "kernels/ranges.h"
#ifdef APR_EMULATED
#include <cstring>

#include "kernels/cuda/emulated/counts.h"
#endif

namespace apr::APR_GPU {
namespace {

int32_t log2_of(int64_t power) {
  int32_t result = 0;
  while ((int64_t{1} << result) < power) ++result;
  return result;
}

template <typename T>
Array<T> array(void* base, int64_t offset, int64_t count) {
  return {reinterpret_cast<T*>(static_cast<char*>(base) + offset), count};
}

// Lets an array stand on a slice of the buffer that begins at `base`.
template <typename T, typename U>
void place(Array<T>& array, void* base, const Slice<U>& slice) {
  array = {reinterpret_cast<U*>(static_cast<char*>(base) + slice.offset), slice.count};
}

// 16-bit numbers that an element takes: what sizes of arrays are counted in, and all that kernels
// which only copy know.
int64_t halves(DType dtype) { return element_size(dtype) / 2; }

// Elements from the first to the last of [rows, heads, dim].
int64_t extent(const Rows& rows, int64_t count, int64_t heads, int64_t dim) {
  return (count - 1) * rows.row_stride + (heads - 1) * rows.head_stride + dim;
}

AttentionWork tables_of(const Layout& layout, const AttentionKind& kind, void* base) {
  AttentionWork work{};
  place(work.counts, base, layout.counts);
  place(work.visits, base, layout.visits);
  place(work.items, base, layout.items);
  place(work.pairs, base, layout.pairs);
  place(work.runs, base, layout.runs);
  place(work.segment_pages, base, layout.segment_pages);
  place(work.page_table, base, layout.page_table);
  place(work.row_visits, base, layout.row_visits);
  place(work.view_order, base, layout.view_order);
  place(work.bounds, base, layout.bounds);
  place(work.reach, base, layout.reach);
  place(work.first_items, base, layout.first_items);
  work.alone_lanes = layout.alone_lanes;
  work.grid = static_cast<int32_t>(layout.grid);
  work.multiprocessors = static_cast<int32_t>(layout.multiprocessors);
  work.q_heads = static_cast<int32_t>(kind.q_heads);
  work.kv_heads = static_cast<int32_t>(kind.kv_heads);
  work.group = work.q_heads / work.kv_heads;
  work.head_dim_k = static_cast<int32_t>(kind.head_dim_k);
  work.head_dim_v = static_cast<int32_t>(kind.head_dim_v);
  work.page_shift = log2_of(kind.page_size);
  work.window = bounded(kind.window);
  work.chunk = bounded(kind.chunk);
  work.unit_tiles = kind.invariant ? kInvariantTiles : 1;
  work.item_rows = layout.instance->item_rows;
  work.row_begin = static_cast<int32_t>(layout.row_begin);
  work.row_count = static_cast<int32_t>(layout.row_end - layout.row_begin);
  return work;
}

void set_tensors(AttentionWork& work, const AttentionKind& kind, const AttentionCall& call,
                 const Pool& pool, int64_t rows) {
  const int64_t wide = halves(kind.dtype);
  const int64_t tokens = pool.num_pages * pool.kv_heads * pool.page_size;
  work.num_pages = static_cast<int32_t>(pool.num_pages);
  work.q = {static_cast<const uint16_t*>(call.q.data),
            extent(call.q, rows, kind.q_heads, kind.head_dim_k) * wide};
  work.out = {static_cast<uint16_t*>(call.out.data),
              extent(call.out, rows, kind.q_heads, kind.head_dim_v) * wide};
  work.k = {static_cast<const uint16_t*>(pool.k),
            tokens * pool.head_dim_k * pool.stored_size() / 2};
  work.v = {static_cast<const uint16_t*>(pool.v),
            tokens * pool.head_dim_v * pool.stored_size() / 2};
  work.codes = pool.codes;
  work.k_scales = {pool.k_scales, tokens * code_groups(pool.head_dim_k)};
  work.v_scales = {pool.v_scales, tokens * code_groups(pool.head_dim_v)};
  work.lse = {call.lse, rows * kind.q_heads};
  work.sinks = {call.sinks, kind.q_heads};
  work.cos_sin = {call.rotation.cos_sin, call.rotation.rotations * call.rotation.pairs * 2};
  work.q_row_stride = call.q.row_stride;
  work.q_head_stride = call.q.head_stride;
  work.out_row_stride = call.out.row_stride;
  work.out_head_stride = call.out.head_stride;
  work.rotation_first = static_cast<int32_t>(call.rotation.first);
  work.rotation_pairs = static_cast<int32_t>(call.rotation.pairs);
  work.interleaved = call.rotation.interleaved ? 1 : 0;
  work.factor = call.softcap != 0.f ? call.scale / call.softcap : call.scale * kLog2e;
  work.softcap = call.softcap;
}

// Emulated, whatever the kernels must write holds NaN before: what they leave out shows.
void poison(void* from, int64_t bytes) {
#ifdef APR_EMULATED
  std::memset(from, 0xff, static_cast<size_t>(bytes));
#else
  static_cast<void>(from), static_cast<void>(bytes);
#endif
}

// For counts: whose bytes are whose.
void name_arrays(const AttentionWork& work) {
#ifdef APR_EMULATED
  const auto name = [](const char* what, const auto& array) {
    name_data(what, array.data, array.size * static_cast<int64_t>(sizeof(array.data[0])));
  };
  name("queries", work.q);
  name("outputs", work.out);
  name("partial results", work.part_out);
  name("sums of partial results", work.part_sum);
  name("keys", work.k);
  name("values", work.v);
#else
  static_cast<void>(work);
#endif
}

void poison_outputs(const AttentionWork& work, int64_t wide) {
#ifdef APR_EMULATED
  poison(work.part_out.data, work.part_out.size * 4);
  poison(work.part_sum.data, work.part_sum.size * 4);
  for (int64_t row = work.row_begin; row < work.row_begin + work.row_count; ++row) {
    for (int64_t head = 0; head < work.q_heads; ++head) {
      const int64_t at = row * work.out_row_stride + head * work.out_head_stride;
      poison(work.out.at(at * wide, work.head_dim_v * wide), work.head_dim_v * wide * 2);
    }
    if (work.lse) poison(work.lse.at(row * work.q_heads, work.q_heads), work.q_heads * int64_t{4});
  }
#else
  static_cast<void>(work), static_cast<void>(wide);
#endif
}

// What a plan and views have in common: tables in device memory, and the attention over them.
template <typename Interface>
class Tables : public Interface {
 public:
  Tables(Layout layout, const AttentionKind& kind) : layout_(std::move(layout)), kind_(kind) {}

  const std::vector<char>& upload() const override { return layout_.upload; }
  int64_t table_bytes() const override { return layout_.bytes; }
  int64_t part_bytes() const override { return layout_.part_floats(kind_) * 4; }
  const char* kernel() const override { return layout_.instance->name; }

  void prepare(void* tables, void* stream) const override {
    const AttentionWork work = work_of(tables, nullptr);
    poison(work.bounds.data, layout_.bytes - layout_.bounds.offset);
    run_plan_step(work, stream);
  }

  void attention(void* tables, void* parts, const AttentionCall& call, const Pool& pool,
                 void* stream) const override {
    AttentionWork work = work_of(tables, parts);
    set_tensors(work, kind_, call, pool, layout_.num_rows);
    poison_outputs(work, halves(kind_.dtype));
    const Instance& instance = *layout_.instance;
    name_arrays(work);
    instance.run(
        work, {instance.name, work.grid, instance.threads, instance.shared_bytes, stream, false});
    run_merge(work, kind_.dtype, true, stream);
  }

 protected:
  AttentionWork work_of(void* base, void* parts) const {
    AttentionWork work = tables_of(layout_, kind_, base);
    const int64_t lanes = layout_.part_lanes;
    work.part_out = array<float>(parts, 0, lanes * kind_.head_dim_v);
    work.part_sum = array<float>(parts, lanes * kind_.head_dim_v * 4, lanes * 2);
    return work;
  }

  Layout layout_;
  AttentionKind kind_;
};

using Pass = Tables<GpuPlan>;

class Views final : public Tables<GpuViews> {
 public:
  Views(const ViewArrays& views, const AttentionKind& kind, const ViewCapacity& capacity,
        const GpuDevice& device)
      : Tables(lay_out_views(views, kind, device, capacity), kind),
        capacity_(capacity),
        device_(device) {}

  void update(const ViewArrays& views) override {
    layout_ = lay_out_views(views, kind_, device_, capacity_);
  }

  void step(void* tables, int64_t* slots, int64_t* positions, void* stream) const override {
    ViewWork work{};
    place(work.counts, tables, layout_.counts);
    place(work.rows, tables, layout_.rows);
    place(work.entries, tables, layout_.entries);
    place(work.segments, tables, layout_.segments);
    place(work.page_table, tables, layout_.page_table);
    place(work.runs, tables, layout_.runs);
    place(work.pairs, tables, layout_.pairs);
    work.slots = {slots, capacity_.rows};
    work.positions = {positions, capacity_.rows};
    work.row_capacity = static_cast<int32_t>(capacity_.rows);
    work.page_shift = log2_of(kind_.page_size);
    poison(work.pairs.data, layout_.bounds.offset - layout_.pairs.offset);
    run_view_step(work, stream);
    prepare(tables, stream);
  }

  void turn(void* tables, const double* inv_freq, int64_t pairs, float* cos_sin,
            void* stream) const override {
    TurnWork work{};
    place(work.counts, tables, layout_.counts);
    place(work.pairs, tables, layout_.pairs);
    work.inv_freq = {inv_freq, pairs};
    work.cos_sin = {cos_sin, capacity_.entries * pairs * 2};
    work.capacity = static_cast<int32_t>(capacity_.entries);
    work.frequencies = static_cast<int32_t>(pairs);
    run_turn(work, stream);
  }

 private:
  ViewCapacity capacity_;
  GpuDevice device_;
};

// The pool that AppendWork and CopyWork write, from elements of `size` bytes.
template <typename Work>
void set_pool(Work& work, const Pool& pool, int64_t size) {
  const int64_t tokens = pool.num_pages * pool.kv_heads * pool.page_size;
  work.pool_k = {static_cast<uint16_t*>(pool.k), tokens * pool.head_dim_k * pool.stored_size() / 2};
  work.pool_v = {static_cast<uint16_t*>(pool.v), tokens * pool.head_dim_v * pool.stored_size() / 2};
  work.k_scales = {pool.k_scales, tokens * code_groups(pool.head_dim_k)};
  work.v_scales = {pool.v_scales, tokens * code_groups(pool.head_dim_v)};
  work.kv_heads = static_cast<int32_t>(pool.kv_heads);
  work.head_dim_k = static_cast<int32_t>(pool.head_dim_k * size / 2);
  work.head_dim_v = static_cast<int32_t>(pool.head_dim_v * size / 2);
  work.page_shift = log2_of(pool.page_size);
}

class Backend final : public GpuBackend {
 public:
  std::string architectures() const override { return built_architectures(); }

  std::vector<GpuKernel> kernels() const override {
    std::vector<GpuKernel> all;
    for (const Instance* one : instances()) {
      all.push_back({one->name, one->head_dim, one->item_rows, one->stages, one->threads,
                     one->shared_bytes, one->wide, one->coded});
    }
    return all;
  }

  GpuDevice device(int index) const override { return device_of(index); }

  void check(const AttentionKind& kind, int device_index) const override {
    static_cast<void>(choose_instance(kind, 1, device_of(device_index)));
  }

  std::vector<std::unique_ptr<GpuPlan>> plan(const PlanArrays& plan, const AttentionKind& kind,
                                             int device_index) const override {
    std::vector<std::unique_ptr<GpuPlan>> passes;
    for (Layout& layout : lay_out_passes(plan, kind, device_of(device_index))) {
      passes.push_back(std::make_unique<Pass>(std::move(layout), kind));
    }
    return passes;
  }

  std::unique_ptr<GpuViews> views(const ViewArrays& views, const AttentionKind& kind,
                                  const ViewCapacity& capacity, int device_index) const override {
    return std::make_unique<Views>(views, kind, capacity, device_of(device_index));
  }

  void append(const Rows& k, const Rows& v, const Pool& pool, const int64_t* slots, int64_t rows,
              void* stream) const override;
  void copy_tokens(const Pool& pool, const PlanCopy* copies, int64_t count,
                   void* stream) const override;
  void sample(const SampleCall& call, void* stream) const override;
};

void Backend::append(const Rows& k, const Rows& v, const Pool& pool, const int64_t* slots,
                     int64_t rows, void* stream) const {
  AppendWork work{};
  const int64_t wide = halves(pool.dtype);
  work.k = {static_cast<const uint16_t*>(k.data),
            extent(k, rows, pool.kv_heads, pool.head_dim_k) * wide};
  work.v = {static_cast<const uint16_t*>(v.data),
            extent(v, rows, pool.kv_heads, pool.head_dim_v) * wide};
  work.k_row_stride = k.row_stride * wide;
  work.k_head_stride = k.head_stride * wide;
  work.v_row_stride = v.row_stride * wide;
  work.v_head_stride = v.head_stride * wide;
  set_pool(work, pool, element_size(pool.dtype));
  work.slots = {slots, rows};
  work.rows = static_cast<int32_t>(rows);
  if (pool.codes == Codes::kNone) {
    run_append(work, stream);
  } else {
    run_append_codes(work, pool.dtype, pool.codes, stream);
  }
}

void Backend::copy_tokens(const Pool& pool, const PlanCopy* copies, int64_t count,
                          void* stream) const {
  CopyWork work{};
  set_pool(work, pool, pool.stored_size());
  work.copies = {copies, count};
  work.count = static_cast<int32_t>(count);
  run_copy(work, stream);
}

void Backend::sample(const SampleCall& call, void* stream) const {
  const auto rows_of = [&](const void* data, int64_t stride, DType dtype) {
    const int64_t size = call.rows == 0 ? 0 : (call.rows - 1) * stride + call.vocab;
    const bool wide = dtype == DType::kFloat32;
    return ScoreRows{{static_cast<const float*>(wide ? data : nullptr), wide ? size : 0},
                     {static_cast<const uint16_t*>(wide ? nullptr : data), wide ? 0 : size},
                     stride,
                     dtype};
  };
  SampleWork work{};
  work.scores = rows_of(call.scores, call.row_stride, call.dtype);
  work.logits = rows_of(call.logits, call.logits_stride, call.logits_dtype);
  work.draws = {call.draws, call.rows};
  work.tokens = {call.tokens, call.rows};
  work.logprobs = {call.logprobs, call.rows};
  work.drawn_logprobs = {call.drawn_logprobs, call.rows};
  work.entropies = {call.entropies, call.rows};
  work.rows = static_cast<int32_t>(call.rows);
  work.vocab = static_cast<int32_t>(call.vocab);
  run_sample(work, stream);
}

}  // namespace

const GpuBackend& backend() {
  static const Backend the;
  return the;
}

}  // namespace apr::APR_GPU
