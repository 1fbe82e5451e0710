// Attention of up to 128 rows on wgmma, for compute capability 9.0. One thread keeps a ring of
// tiles full by bulk copies; two groups of four warps consume it: each takes 64 rows, or, where an
// item has no more than 64, every other tile, and they merge at the end of the span.
#pragma once

#include "kernels/cuda/wide_ring.cuh"

namespace apr::APR_GPU {

template <typename T, int kDim, int kStages>
class WideAttention {
  using Shape = WideShape<kDim, kStages>;

 public:
  APR_DEVICE WideAttention(const AttentionWork& work, uint32_t shared)
      : work_(work),
        shared_(shared),
        group_(shuffle_from(thread_index() / 128, 0) - 1),  // the same for a warp, and known to be
        thread_(thread_index() % 128),
        bounds_(shared_array<int32_t>(shared + Shape::kBounds)) {}

  APR_DEVICE void run(const Span& span) {
    span_ = span;
    item_ = work_.items[span.item];
    reach_ = span.reach;
    by_rows_ = item_.lanes > 64;
    row_base_ = by_rows_ ? group_ * 64 : 0;
    load_queries();
    const Steps tiles = steps_of<kTile>(work_, span);
    if (by_rows_) {
      int before = -1;  // the stage whose values are still being multiplied
      for (int tile = tiles.first; tile < tiles.end; ++tile) {
        barrier_wait(Shape::filled(shared_, ring_.stage), ring_.parity);
        attend(tile, before);
        before = ring_.stage;
        ring_.advance();
      }
      finish_products();
      release(before);
    } else {
      for (int tile = tiles.first; tile < tiles.end; ++tile) {
        barrier_wait(Shape::filled(shared_, ring_.stage), ring_.parity);
        if ((tile - tiles.first) % 2 == group_) {
          attend(tile, -1);
          finish_products();  // the ring may be too short to hold a stage for two tiles
        }
        release(ring_.stage);
        ring_.advance();
      }
    }
    finish_span();
  }

 private:
  // Named barriers; 0 is the block's. Threads [0, 128) load, two groups of 128 compute.
  static constexpr int kGroups = 1, kFirstGroup = 2;
  // Both groups, and only they, meet.
  APR_DEVICE void sync_groups() { sync_some(kGroups, 128, 256); }
  APR_DEVICE void sync_group() { sync_some(kFirstGroup + group_, 128 + 128 * group_, 128); }

  APR_DEVICE void release(int stage) {
    sync_warp();  // a lane that is late would take the stage's next phase for this one
    if (thread_ % 32 == 0) barrier_arrive(Shape::emptied(shared_, stage));
  }

  APR_DEVICE void finish_products() {
    products_wait<0>();
#pragma unroll
    for (int j = 0; j < Shape::kBoxes; ++j) keep_order(out_[j]);
  }

  APR_DEVICE void load_queries() {
    const auto address = [this](int r, int column) {
      return shared_ + static_cast<uint32_t>(column / 64 * Shape::kRows * 128) +
             in_rows_of_128(r, column % 64);
    };
    const int thread = group_ * 128 + thread_;
    gather_queries<T, Shape::kRows, kDim>(work_, item_, span_.head, thread, 256, address);
    for (int r = thread; r < Shape::kRows; r += 256) {
      const bool exists = r < item_.lanes;
      const int visit = exists ? lane_of(work_, item_, span_.head, r).visit : 0;
      bounds_[2 * r] = exists ? work_.bounds[visit].lo : 0;
      bounds_[2 * r + 1] = exists ? work_.bounds[visit].hi : 0;
    }
    publish_shared();
    sync_groups();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      max_[h] = -infinity();
      sum_[h] = 0.f;
    }
#pragma unroll
    for (int j = 0; j < Shape::kBoxes; ++j) {
#pragma unroll
      for (int e = 0; e < 32; ++e) out_[j][e] = 0.f;
    }
  }

  APR_DEVICE void attend(int tile, int before) {
    const uint32_t keys =
        shared_ + Shape::kRing + static_cast<uint32_t>(ring_.stage * Shape::kStageBytes);
    const uint32_t values = keys + Shape::kBoxes * Shape::kBoxBytes;
    const int slot = tile * kTile;
    clear_unseen(values, slot);
    float score[32];
    const uint64_t query =
        matrix_descriptor(shared_ + static_cast<uint32_t>(row_base_ * 128), 1024);
    const uint64_t key = matrix_descriptor(keys, 1024), value = matrix_descriptor(values, 1024);
    products_begin();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      multiply_shared<T>(score, advanced(query, k / 4 * Shape::kRows * 128 + k % 4 * 32),
                         advanced(key, k / 4 * Shape::kBoxBytes + k % 4 * 32), k > 0);
    }
    products_commit();
    finish_products();  // also those of the tile before: its stage may be filled again
    keep_order(score);
    if (before >= 0) release(before);
    scale(score);
    if (slot < reach_.all_lo || slot + kTile > reach_.all_hi) mask(slot, score);
    soften(score);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      weights_[k][0] = pack<T>(score[8 * k], score[8 * k + 1]);
      weights_[k][1] = pack<T>(score[8 * k + 2], score[8 * k + 3]);
      weights_[k][2] = pack<T>(score[8 * k + 4], score[8 * k + 5]);
      weights_[k][3] = pack<T>(score[8 * k + 6], score[8 * k + 7]);
    }
#pragma unroll
    for (int j = 0; j < Shape::kBoxes; ++j) keep_order(out_[j]);
    products_begin();
#pragma unroll
    for (int j = 0; j < Shape::kBoxes; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        multiply_registers<T>(out_[j], weights_[k],
                              advanced(value, j * Shape::kBoxBytes + k * 16 * 128));
      }
    }
    products_commit();
  }

  // Values that no row sees become zeros: what a page holds there may be no number, and 0 times
  // that is none. Both groups may clear the same tile; they write the same.
  APR_DEVICE void clear_unseen(uint32_t values, int slot) {
    if (slot >= reach_.lo && slot + kTile <= reach_.hi) return;
    for (int i = thread_; i < kTile * 8 * Shape::kBoxes; i += 128) {
      const int r = i / 8 % kTile;
      if (slot + r >= reach_.lo && slot + r < reach_.hi) continue;
      const auto box = static_cast<uint32_t>(i / (8 * kTile) * Shape::kBoxBytes);
      shared_array<uint4>(values + box + in_rows_of_128(r, i % 8 * 8))[0] = uint4{0, 0, 0, 0};
    }
    publish_shared();
    sync_group();
  }

  APR_DEVICE void scale(float (&score)[32]) {
    const float factor = work_.factor, cap = work_.softcap * kLog2e;
#pragma unroll
    for (int e = 0; e < 32; ++e) score[e] *= factor;
    if (work_.softcap == 0.f) return;  // the cap comes before the logarithm's base and the mask
#pragma unroll
    for (int e = 0; e < 32; ++e) score[e] = tanh_of(score[e]) * cap;
  }

  APR_DEVICE int row_of(int h) const {  // of the two that this thread holds
    return row_base_ + thread_ / 32 * 16 + h * 8 + thread_ % 32 / 4;
  }

  APR_DEVICE void mask(int slot, float (&score)[32]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row_of(h);
      const int lo = bounds_[2 * r] - slot, hi = bounds_[2 * r + 1] - slot;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = n * 8 + thread_ % 4 * 2 + e;
          if (token < lo || token >= hi) score[4 * n + 2 * h + e] = -infinity();
        }
      }
    }
  }

  APR_DEVICE void soften(float (&score)[32]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = max_[h];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        top = maximum(top, maximum(score[4 * n + 2 * h], score[4 * n + 2 * h + 1]));
      }
      top = maximum(top, shuffle_xor(top, 1));
      top = maximum(top, shuffle_xor(top, 2));
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight = weight_under(top, score[4 * n + 2 * h + e]);
          score[4 * n + 2 * h + e] = weight;
          sum += weight;
        }
      }
      // Sums are of this lane's tokens; lanes add up at the end.
      const float shrink = advance(max_[h], sum_[h], top, sum);
#pragma unroll
      for (int j = 0; j < Shape::kBoxes; ++j) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          out_[j][4 * n + 2 * h] *= shrink;
          out_[j][4 * n + 2 * h + 1] *= shrink;
        }
      }
    }
  }

  APR_DEVICE void finish_span() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum_[h] += shuffle_xor(sum_[h], 1);
      sum_[h] += shuffle_xor(sum_[h], 2);
    }
    sync_groups();  // nobody reads queries any more
    if (!by_rows_) {
      // The second group's sums go where the queries were; threads of both hold the same elements.
      const auto sums = shared_array<float>(shared_);
      const auto stats = shared_array<float>(shared_ + Shape::kStats);
      if (group_ == 1) {
#pragma unroll
        for (int j = 0; j < Shape::kBoxes; ++j) {
#pragma unroll
          for (int e = 0; e < 32; ++e) sums[(j * 32 + e) * 128 + thread_] = out_[j][e];
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          stats[h * 128 + thread_] = max_[h];
          stats[(2 + h) * 128 + thread_] = sum_[h];
        }
      }
      sync_groups();
      if (group_ == 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float other = stats[h * 128 + thread_], top = maximum(max_[h], other);
          const float theirs = weight_under(top, other);
          const float mine =
              advance(max_[h], sum_[h], top, stats[(2 + h) * 128 + thread_] * theirs);
#pragma unroll
          for (int j = 0; j < Shape::kBoxes; ++j) {
#pragma unroll
            for (int n = 0; n < 8; ++n) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const int e = 4 * n + 2 * h + i;
                out_[j][e] = out_[j][e] * mine + sums[(j * 32 + e) * 128 + thread_] * theirs;
              }
            }
          }
        }
      }
    }
    if (by_rows_ || group_ == 0) write_rows();
    sync_groups();  // the next span's queries take the place of the sums
  }

  APR_DEVICE void write_rows() {
    const bool direct = item_.alone && span_.whole();
    const int64_t first_part = part_of(work_, item_, span_);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row_of(h);
      if (r >= item_.lanes) continue;
      const Lane lane = lane_of(work_, item_, span_.head, r);
      const bool leads = thread_ % 4 == 0;
      const float inverse =
          direct ? finish<T>(work_, lane.row, lane.q_head, max_[h], sum_[h], leads) : 1.f;
      const int64_t part = first_part + r;
#pragma unroll
      for (int j = 0; j < Shape::kBoxes; ++j) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const int column = j * 64 + n * 8 + thread_ % 4 * 2;
          if (column >= work_.head_dim_v) continue;
          const float x = out_[j][4 * n + 2 * h] * inverse;
          const float y = out_[j][4 * n + 2 * h + 1] * inverse;
          if (direct) {
            *reinterpret_cast<uint32_t*>(
                work_.out.at(out_at(work_, lane.row, lane.q_head) + column, 2)) = pack<T>(x, y);
          } else {
            *reinterpret_cast<float2*>(work_.part_out.at(part * work_.head_dim_v + column, 2)) = {
                x, y};
          }
        }
      }
      if (!direct && leads) {
        work_.part_sum[2 * part] = max_[h];
        work_.part_sum[2 * part + 1] = sum_[h];
      }
    }
  }

  const AttentionWork& work_;
  uint32_t shared_;
  int group_, thread_;
  decltype(shared_array<int32_t>(0)) bounds_;
  Ring<kStages> ring_;
  Span span_;
  Item item_;
  Reach reach_;
  bool by_rows_ = false;
  int row_base_ = 0;
  float out_[Shape::kBoxes][32], max_[2], sum_[2];
  uint32_t weights_[4][4];
};

template <typename T, int kDim, int kStages>
APR_KERNEL APR_BOUNDS(384, 1)
    attention_wide(APR_GRID_CONSTANT AttentionWork work, APR_GRID_CONSTANT PoolMaps maps) {
  using Shape = WideShape<kDim, kStages>;
  const uint32_t shared = shared_address(shared_memory());
  launch_dependents();  // they wait for the end of this kernel
  if (thread_index() == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(Shape::filled(shared, stage), 1);
      barrier_init(Shape::emptied(shared, stage), 8);  // a lane of each warp that computes
    }
    barrier_init_done();
  }
  sync_block();
  if (thread_index() < 128) {
    give_registers<40>();
    if (thread_index() == 0) fill_ring<kDim, kStages>(work, maps, shared);
  } else {
    take_registers<232>();
    WideAttention<T, kDim, kStages> attention(work, shared);
    Spans spans(work);
    Span span;
    while (spans.next(span)) attention.run(span);
  }
}

}  // namespace apr::APR_GPU
