// Attention of up to 16 rows without tensor cores: for float32, which they would round, and for
// heads wider than 256. Four warps own four rows each and see all tokens, so that nothing is merged
// within a block; keys and values pass through a ring that all of them read.
#pragma once

#include "kernels/cuda/spans.cuh"

namespace apr::APR_GPU {

template <typename T, int kDim, int kStages>
struct PlainShape {
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  static constexpr int kRows = 16, kRowsOfWarp = kRows / kWarps;
  static constexpr int kEach = kChunkOf<T>;     // elements of a copy of 16 bytes
  static constexpr int kChunks = kDim / kEach;  // of a row
  // Tokens of a step of the block; the widest rows of float32 would not fit 164 KB by 16.
  static constexpr int kStep = kChunks > 96 ? 8 : 16;
  static constexpr int kParts = 32 / kStep;         // lanes that share a score
  static constexpr int kPitch = kChunks * 16 + 16;  // bytes of a row: no bank twice
  static constexpr int kSlice = kStep * kPitch;
  static constexpr int kRing = kRows * kPitch;
  static constexpr int kBounds = kRing + kStages * 2 * kSlice;
  static constexpr int kWeights = kBounds + kRows * 8;  // of a step: [warp, token, row]
  static constexpr int kSharedBytes = kWeights + kWarps * kStep * kRowsOfWarp * 4;
};

template <typename T, int kDim, int kStages>
class PlainAttention {
  using Shape = PlainShape<T, kDim, kStages>;
  static constexpr int kEach = Shape::kEach, kOwn = Shape::kRowsOfWarp;
  static constexpr int kColumns = (Shape::kChunks + 31) / 32;  // chunks of values that a lane owns

 public:
  APR_DEVICE explicit PlainAttention(const AttentionWork& work)
      : work_(work),
        thread_(thread_index()),
        warp_(thread_index() / 32),
        lane_(thread_index() % 32),
        shared_(shared_address(shared_memory())),
        chunks_k_(work.head_dim_k / kEach),
        chunks_v_(work.head_dim_v / kEach) {}

  APR_DEVICE void run(const Span& span) {
    span_ = span;
    item_ = work_.items[span.item];
    const auto [first, end] = steps_of<Shape::kStep>(work_, span);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fetch(first + s, s, end);
    load_queries();
    int stage = 0;
#pragma unroll 1
    for (int step = first; step < end; ++step) {
      copy_async_wait<kStages - 2>();
      sync_block();  // the stage is there, and nobody still reads the one that comes next
      fetch(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1, end);
      if (warp_ * kOwn < item_.lanes) attend(step * Shape::kStep, stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    copy_async_wait<0>();
    write_rows();
    sync_block();  // the next span writes over queries and stages
  }

 private:
  APR_DEVICE auto bounds() const { return shared_array<int32_t>(shared_ + Shape::kBounds); }
  APR_DEVICE uint32_t weights_at(int token) const {
    static_assert(kOwn == 4);
    return shared_ + Shape::kWeights +
           static_cast<uint32_t>((warp_ * Shape::kStep + token) * kOwn * 4);
  }
  APR_DEVICE uint32_t keys_at(int stage) const {
    return shared_ + Shape::kRing + static_cast<uint32_t>(stage * 2 * Shape::kSlice);
  }

  // Tokens that no row sees are zeros: what a page holds there may be no number.
  APR_DEVICE void fetch(int step, int stage, int end) {
    if (step < end) {
      const int slot = step * Shape::kStep;
      const int page = work_.page_table[span_.reach.first_page + (slot >> work_.page_shift)];
      const int64_t token =
          ((static_cast<int64_t>(page) * work_.kv_heads + span_.head) << work_.page_shift) +
          (slot & ((1 << work_.page_shift) - 1));
      const Array<const T> pool_k = work_.k.template as<const T>();
      const Array<const T> pool_v = work_.v.template as<const T>();
      for (int i = thread_; i < Shape::kStep * Shape::kChunks; i += Shape::kThreads) {
        const int r = i / Shape::kChunks, c = i % Shape::kChunks;
        const uint32_t to = keys_at(stage) + static_cast<uint32_t>(r * Shape::kPitch + c * 16);
        const bool seen = slot + r >= span_.reach.lo && slot + r < span_.reach.hi;
        if (c < chunks_k_) {
          copy_async16(to, pool_k, (token + r) * work_.head_dim_k + c * kEach, seen);
        }
        if (c < chunks_v_) {
          copy_async16(to + Shape::kSlice, pool_v, (token + r) * work_.head_dim_v + c * kEach,
                       seen);
        }
      }
    }
    copy_async_commit();
  }

  APR_DEVICE void load_queries() {
    const auto address = [this](int r, int column) {
      return shared_ + static_cast<uint32_t>(r * Shape::kPitch + column * int{sizeof(T)});
    };
    gather_queries<T, Shape::kRows, kDim>(work_, item_, span_.head, thread_, Shape::kThreads,
                                          address);
    if (thread_ < Shape::kRows) {
      const bool exists = thread_ < item_.lanes;
      const int visit = exists ? lane_of(work_, item_, span_.head, thread_).visit : 0;
      bounds()[2 * thread_] = exists ? work_.bounds[visit].lo : 0;
      bounds()[2 * thread_ + 1] = exists ? work_.bounds[visit].hi : 0;
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      max_[r] = -infinity();
      sum_[r] = 0.f;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) out_[r][j][e] = 0.f;
      }
    }
  }

  APR_DEVICE void attend(int slot, int stage) {
    float weight[kOwn] = {};
    scores(keys_at(stage), weight);
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int row = warp_ * kOwn + r, token = slot + lane_ % Shape::kStep;
      float score = weight[r] * work_.factor;
      if (work_.softcap != 0.f) score = tanh_of(score) * work_.softcap * kLog2e;
      if (token < bounds()[2 * row] || token >= bounds()[2 * row + 1]) score = -infinity();
      float top = score;
#pragma unroll
      for (int by = 1; by < Shape::kStep; by *= 2) top = maximum(top, shuffle_xor(top, by));
      top = maximum(top, max_[r]);
      weight[r] = weight_under(top, score);
      // The sum is of this lane's tokens; lanes add up at the end.
      const float shrink = advance(max_[r], sum_[r], top, weight[r]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) out_[r][j][e] *= shrink;
      }
    }
    sync_warp();  // nobody still reads the weights of the step before
    if (lane_ < Shape::kStep) {
      shared_array<float4>(weights_at(lane_))[0] = {weight[0], weight[1], weight[2], weight[3]};
    }
    sync_warp();
    accumulate(keys_at(stage) + Shape::kSlice);
  }

  // Each lane takes a token and every kParts-th chunk of its key.
  APR_DEVICE void scores(uint32_t keys, float (&score)[kOwn]) {
    const uint32_t key = keys + static_cast<uint32_t>(lane_ % Shape::kStep * Shape::kPitch);
    const uint32_t query = shared_ + static_cast<uint32_t>(warp_ * kOwn * Shape::kPitch);
    for (int c = lane_ / Shape::kStep; c < chunks_k_; c += Shape::kParts) {
      const auto at = static_cast<uint32_t>(c * 16);
      float k[kEach], q[kEach];
      unpack_chunk<T>(shared_array<uint4>(key + at)[0], k);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        unpack_chunk<T>(
            shared_array<uint4>(query + at + static_cast<uint32_t>(r * Shape::kPitch))[0], q);
#pragma unroll
        for (int e = 0; e < kEach; ++e) score[r] += q[e] * k[e];
      }
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
#pragma unroll
      for (int by = Shape::kStep; by < 32; by *= 2) score[r] += shuffle_xor(score[r], by);
    }
  }

  APR_DEVICE void accumulate(uint32_t values) {
#pragma unroll 4
    for (int token = 0; token < Shape::kStep; ++token) {
      const float4 weight = shared_array<float4>(weights_at(token))[0];
      const float w[kOwn] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int c = j * 32 + lane_;
        if (c >= chunks_v_) continue;
        float v[kEach];
        unpack_chunk<T>(
            shared_array<uint4>(values + static_cast<uint32_t>(token * Shape::kPitch + c * 16))[0],
            v);
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
#pragma unroll
          for (int e = 0; e < kEach; ++e) out_[r][j][e] += w[r] * v[e];
        }
      }
    }
  }

  APR_DEVICE void write_rows() {
    const bool direct = item_.alone && span_.whole();
    const int64_t first_part = part_of(work_, item_, span_);
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
#pragma unroll
      for (int by = 1; by < Shape::kStep; by *= 2) sum_[r] += shuffle_xor(sum_[r], by);
      const int row = warp_ * kOwn + r;
      if (row >= item_.lanes) continue;
      const Lane lane = lane_of(work_, item_, span_.head, row);
      const float inverse =
          direct ? finish<T>(work_, lane.row, lane.q_head, max_[r], sum_[r], lane_ == 0) : 1.f;
      const int64_t part = first_part + row;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int c = j * 32 + lane_;
        if (c >= chunks_v_) continue;
#pragma unroll
        for (int e = 0; e < kEach; ++e) out_[r][j][e] *= inverse;
        if (direct) {
          const int64_t at = out_at(work_, lane.row, lane.q_head) + c * kEach;
          *reinterpret_cast<uint4*>(work_.out.template as<T>().at(at, kEach)) =
              pack_chunk<T>(out_[r][j]);
        } else {
          float* to = work_.part_out.at(part * work_.head_dim_v + c * kEach, kEach);
#pragma unroll
          for (int e = 0; e < kEach; e += 4) {
            *reinterpret_cast<float4*>(to + e) = {out_[r][j][e], out_[r][j][e + 1],
                                                  out_[r][j][e + 2], out_[r][j][e + 3]};
          }
        }
      }
      if (!direct && lane_ == 0) {
        work_.part_sum[2 * part] = max_[r];
        work_.part_sum[2 * part + 1] = sum_[r];
      }
    }
  }

  const AttentionWork& work_;
  int thread_, warp_, lane_;
  uint32_t shared_;
  int chunks_k_, chunks_v_;
  Span span_;
  Item item_;
  float out_[kOwn][kColumns][kEach], max_[kOwn], sum_[kOwn];
};

template <typename T, int kDim, int kStages>
APR_KERNEL APR_BOUNDS((PlainShape<T, kDim, kStages>::kThreads), 1)
    attention_plain(APR_GRID_CONSTANT AttentionWork work) {
  launch_dependents();  // they wait for the end of this kernel
  PlainAttention<T, kDim, kStages> attention(work);
  Spans spans(work);
  Span span;
  while (spans.next(span)) attention.run(span);
}

}  // namespace apr::APR_GPU
