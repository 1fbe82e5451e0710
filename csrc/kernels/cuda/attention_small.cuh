// Attention of up to 32 rows on mma.sync, from compute capability 8.0 on. Each warp owns 16 of
// every kWarps * 16 tokens and a ring of copies of its own, so that the loop over keys needs no
// barrier of the block; warps merge once a span, in a fixed order.
#pragma once

#include "kernels/cuda/small_ring.cuh"

namespace apr::APR_GPU {

template <typename T, int kDim, int kRowTiles, int kStages, bool kCoded>
struct SmallShape {
  using Ring = SmallRing<T, kDim, kStages, kCoded>;
  static constexpr int kWarps = kDim > 128 ? 2 : 4;  // two fit 99 KB at 256 dimensions
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRows = kRowTiles * 16;
  static constexpr int kStep = kWarps * 16;     // tokens of a step of the block
  static constexpr int kSteps = kTile / kStep;  // steps of a tile
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kRingBytes = kWarps * Ring::kBytes;
  static constexpr int kPitch = kDim + 8;  // floats of a row of sums in the merge: no bank twice
  static constexpr int kMergeBytes = kWarps * kRows * (kPitch + 2) * 4;
  static constexpr int kBody =
      kQueryBytes + kRingBytes > kMergeBytes ? kQueryBytes + kRingBytes : kMergeBytes;
  static constexpr int kBoundsBytes = kRows * 8;
  static constexpr int kSharedBytes = kBody + kBoundsBytes;
};

template <typename T, int kDim, int kRowTiles, int kStages, bool kCoded>
class SmallAttention {
  using Shape = SmallShape<T, kDim, kRowTiles, kStages, kCoded>;
  static constexpr int kDepth = kDim / 16, kColumns = kDim / 8;
  // Queries stay in registers where there are enough: 32 rows of 128 are read again from shared
  // memory.
  static constexpr int kKept = kRowTiles * kDim > 128 && kRowTiles > 1 ? 0 : kDepth;

 public:
  APR_DEVICE explicit SmallAttention(const AttentionWork& work)
      : work_(work),
        warp_(thread_index() / 32),
        lane_(thread_index() % 32),
        shared_(shared_address(shared_memory())),
        ring_(work,
              shared_ + Shape::kQueryBytes + static_cast<uint32_t>(warp_ * Shape::Ring::kBytes),
              lane_) {}

  APR_DEVICE void run(const Span& span) {
    span_ = span;
    reach_ = span.reach;
    const auto [first, end] = steps_of<Shape::kStep>(work_, span);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fetch(first + s, s, end);
    load_queries();
    attend(first, end);
    merge_warps();
  }

 private:
  // lo and hi of each row.
  APR_DEVICE auto bounds() const { return shared_array<int32_t>(shared_ + Shape::kBody); }

  APR_DEVICE int slot_of(int step) const { return step * Shape::kStep + warp_ * 16; }

  // The warp's tokens of a step, while the queries are still on their way.
  APR_DEVICE void fetch(int step, int stage, int end) {
    if (step < end) ring_.fetch(reach_, span_.head, slot_of(step), stage);
    copy_async_commit();
  }

  APR_DEVICE void load_queries() {
    const Item item = work_.items[span_.item];
    const auto address = [this](int r, int column) {
      return shared_ + swizzled<kDim>(r, column / 8) + static_cast<uint32_t>(column % 8 * 2);
    };
    gather_queries<T, Shape::kRows, kDim>(work_, item, span_.head, thread_index(), Shape::kThreads,
                                          address);
    for (int r = thread_index(); r < Shape::kRows; r += Shape::kThreads) {
      const bool exists = r < item.lanes;
      const int visit = exists ? lane_of(work_, item, span_.head, r).visit : 0;
      bounds()[2 * r] = exists ? work_.bounds[visit].lo : 0;
      bounds()[2 * r + 1] = exists ? work_.bounds[visit].hi : 0;
    }
    sync_block();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int k = 0; k < kKept; ++k) load_query(m, k, q_[m][k]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        max_[m][h] = -infinity();
        sum_[m][h] = 0.f;
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out_[m][n][e] = 0.f;
      }
    }
  }

  APR_DEVICE void load_query(int m, int k, uint32_t (&q)[4]) {
    load_matrices(q, shared_ + swizzled<kDim>(m * 16 + (lane_ & 15), k * 2 + (lane_ >> 4)));
  }

  APR_DEVICE void attend(int first, int end) {
    int stage = 0;
#pragma unroll 1
    for (int step = first; step < end; ++step) {
      copy_async_wait<kStages - 2>();
      sync_warp();  // every lane's copies are there, and nobody still reads the stage that comes
                    // next
      fetch(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1, end);
      const int slot = slot_of(step);
      const uint32_t keys = ring_.numbers(reach_, slot, stage);
      float score[kRowTiles][2][4];
      scores(keys, score);
      // Stream-K may begin inside a step of 256 dimensions only at a whole tile, so no unit is cut
      // here.
      if (slot < reach_.all_lo || slot + 16 > reach_.all_hi) mask(slot, score);
      uint32_t weights[kRowTiles][4];
      soften(score, weights);
      accumulate(keys + Shape::Ring::kSlice, weights);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    copy_async_wait<0>();
  }

  APR_DEVICE void scores(uint32_t keys, float (&score)[kRowTiles][2][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int e = 0; e < 8; ++e) score[m][e / 4][e % 4] = 0.f;
    }
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      uint32_t b[4];  // 16 tokens, 16 dimensions
      load_matrices(
          b, keys + swizzled<kDim>((lane_ & 7) + ((lane_ >> 4) << 3), k * 2 + ((lane_ >> 3) & 1)));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if constexpr (kKept == kDepth) {
          multiply_16x8x16<T>(score[m][0], q_[m][k], b[0], b[1]);
          multiply_16x8x16<T>(score[m][1], q_[m][k], b[2], b[3]);
        } else {
          uint32_t q[4];
          load_query(m, k, q);
          multiply_16x8x16<T>(score[m][0], q, b[0], b[1]);
          multiply_16x8x16<T>(score[m][1], q, b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float x = score[m][e / 4][e % 4] * work_.factor;
        // The cap comes before the logarithm's base and the mask. Hoisted, the test makes registers
        // spill.
        if (work_.softcap != 0.f) x = tanh_of(x) * work_.softcap * kLog2e;
        score[m][e / 4][e % 4] = x;
      }
    }
  }

  APR_DEVICE void mask(int slot, float (&score)[kRowTiles][2][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = m * 16 + h * 8 + lane_ / 4;
        const int lo = bounds()[2 * r] - slot, hi = bounds()[2 * r + 1] - slot;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int token = n * 8 + lane_ % 4 * 2 + e;
            if (token < lo || token >= hi) score[m][n][h * 2 + e] = -infinity();
          }
        }
      }
    }
  }

  // Scores become weights; sums so far move to the new maximum.
  APR_DEVICE void soften(float (&score)[kRowTiles][2][4], uint32_t (&weights)[kRowTiles][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = maximum(maximum(score[m][0][h * 2], score[m][0][h * 2 + 1]),
                            maximum(score[m][1][h * 2], score[m][1][h * 2 + 1]));
        top = maximum(top, shuffle_xor(top, 1));
        top = maximum(top, shuffle_xor(top, 2));
        top = maximum(top, max_[m][h]);
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float weight = weight_under(top, score[m][n][h * 2 + e]);
            score[m][n][h * 2 + e] = weight;
            sum += weight;
          }
        }
        // Sums are of this lane's tokens; lanes add up at the end.
        const float shrink = advance(max_[m][h], sum_[m][h], top, sum);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          out_[m][n][h * 2] *= shrink;
          out_[m][n][h * 2 + 1] *= shrink;
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        weights[m][2 * n] = pack<T>(score[m][n][0], score[m][n][1]);
        weights[m][2 * n + 1] = pack<T>(score[m][n][2], score[m][n][3]);
      }
    }
  }

  APR_DEVICE void accumulate(uint32_t values, const uint32_t (&weights)[kRowTiles][4]) {
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t b[4];
      load_matrices(b, values + swizzled<kDim>(lane_ & 15, n * 2 + (lane_ >> 4)), true);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply_16x8x16<T>(out_[m][2 * n], weights[m], b[0], b[1]);
        multiply_16x8x16<T>(out_[m][2 * n + 1], weights[m], b[2], b[3]);
      }
    }
  }

  // Warp by warp, always in the same order; the ring is the scratch.
  APR_DEVICE void merge_warps() {
    const auto sums = shared_array<float>(shared_);
    const auto stats = shared_array<float>(
        shared_ + static_cast<uint32_t>(Shape::kWarps * Shape::kRows * Shape::kPitch * 4));
    sync_block();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = sum_[m][h];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const int at = warp_ * Shape::kRows + m * 16 + h * 8 + lane_ / 4;
        if (lane_ % 4 == 0) {
          stats[2 * at] = max_[m][h];
          stats[2 * at + 1] = sum;
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const int column = n * 8 + lane_ % 4 * 2;
          shared_array<float2>(shared_ +
                               static_cast<uint32_t>((at * Shape::kPitch + column) * 4))[0] = {
              out_[m][n][h * 2], out_[m][n][h * 2 + 1]};
        }
      }
    }
    sync_block();
    const Item item = work_.items[span_.item];  // read again: kept, it costs registers in the loop
    const bool direct = item.alone && span_.whole();
    const int64_t first_part = part_of(work_, item, span_);
    for (int r = warp_; r < item.lanes; r += Shape::kWarps) {
      float top = -infinity();
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w) {
        top = maximum(top, stats[2 * (w * Shape::kRows + r)]);
      }
      float weight[Shape::kWarps], sum = 0.f;
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w) {
        weight[w] = weight_under(top, stats[2 * (w * Shape::kRows + r)]);
        sum += weight[w] * stats[2 * (w * Shape::kRows + r) + 1];
      }
      const Lane lane = lane_of(work_, item, span_.head, r);
      const float inverse =
          direct ? finish<T>(work_, lane.row, lane.q_head, top, sum, lane_ == 0) : 1.f;
      const int64_t part = first_part + r;
      for (int column = lane_; column < work_.head_dim_v; column += 32) {
        float x = 0.f;
#pragma unroll
        for (int w = 0; w < Shape::kWarps; ++w) {
          x += weight[w] * sums[(w * Shape::kRows + r) * Shape::kPitch + column];
        }
        if (direct) {
          work_.out[out_at(work_, lane.row, lane.q_head) + column] =
              from_float<T>(x * inverse).bits;
        } else {
          work_.part_out[part * work_.head_dim_v + column] = x;
        }
      }
      if (!direct && lane_ == 0) {
        work_.part_sum[2 * part] = top;
        work_.part_sum[2 * part + 1] = sum;
      }
    }
    sync_block();  // the next span writes over the scratch
  }

  const AttentionWork& work_;
  int warp_, lane_;
  uint32_t shared_;
  typename Shape::Ring ring_;
  Span span_;
  Reach reach_;
  uint32_t q_[kRowTiles][kKept > 0 ? kKept : 1][4];
  float out_[kRowTiles][kColumns][4], max_[kRowTiles][2], sum_[kRowTiles][2];
};

template <typename T, int kDim, int kRowTiles, int kStages, bool kCoded>
APR_KERNEL APR_BOUNDS((SmallShape<T, kDim, kRowTiles, kStages, kCoded>::kThreads), 1)
    attention_small(APR_GRID_CONSTANT AttentionWork work) {
  launch_dependents();  // they wait for the end of this kernel
  SmallAttention<T, kDim, kRowTiles, kStages, kCoded> attention(work);
  Spans spans(work);
  Span span;
  while (spans.next(span)) attention.run(span);
}

}  // namespace apr::APR_GPU
