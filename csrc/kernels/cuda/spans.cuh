// What all attention kernels share: a block's spans of units, the gather of queries, the way
// results are written.
#pragma once

#include "kernels/cuda/primitives.cuh"
#include "kernels/cuda/softmax.cuh"
#include "kernels/cuda/work.h"

namespace apr::APR_GPU {

template <typename T>
inline constexpr DType kNumber = DType::kFloat16;
template <>
inline constexpr DType kNumber<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kNumber<Float32> = DType::kFloat32;

// Numbers in 16 bytes, what a thread copies at once.
template <typename T>
inline constexpr int kChunkOf = 16 / static_cast<int>(sizeof(T));

template <typename T>
APR_DEVICE void unpack_chunk(const uint4& chunk, float (&x)[kChunkOf<T>]) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kChunkOf<T> == 4) {
      x[i] = float_of_bits(words[i]);
    } else {
      x[2 * i] = unpack<T>(words[i], 0);
      x[2 * i + 1] = unpack<T>(words[i], 1);
    }
  }
}
template <typename T>
APR_DEVICE uint4 pack_chunk(const float (&x)[kChunkOf<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kChunkOf<T> == 4) {
      words[i] = bits_of_float(x[i]);
    } else {
      words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Consecutive units of one (item, kv head) that one block works on.
struct Span {
  int item, head;
  int begin, end;  // units of this (item, head)
  Reach reach;

  APR_DEVICE bool whole() const { return begin == 0 && end == reach.units; }
};

// The steps of kStep tokens that a span covers, counted from slot 0 of its segment.
struct Steps {
  int first, end;
};
template <int kStep>
APR_DEVICE Steps steps_of(const AttentionWork& work, const Span& span) {
  const Reach& reach = span.reach;
  const int unit = work.unit_tiles * kTile, base = reach.lo / unit * unit;
  const int first = (base + span.begin * unit) / kStep, end = (base + span.end * unit) / kStep;
  const int used_first = reach.lo / kStep, used_end = (reach.hi - 1) / kStep + 1;
  return {first > used_first ? first : used_first, end < used_end ? end : used_end};
}

// The units of a block, span by span. In order: items, then kv heads, then units. There are fewer
// than 2^31: longer plans run in passes (layout.cpp).
class Spans {
 public:
  APR_DEVICE explicit Spans(const AttentionWork& work) : work_(work) {
    const Counts counts = work.counts[0];
    const int64_t units = static_cast<int64_t>(counts.units) * work.kv_heads;
    next_ = end_ = item_ = 0;
    item_end_ = -1;
    if (units == 0 || block_index() >= counts.blocks) return;
    next_ = static_cast<int>(share_begin(units, counts.blocks, block_index()));
    end_ = static_cast<int>(share_begin(units, counts.blocks, block_index() + 1));
    item_ = work.first_items[block_index()];
  }

  APR_DEVICE bool next(Span& span) {
    if (next_ >= end_) return false;
    note_span();
    if (next_ == item_end_) ++item_;
    span.reach = work_.reach[item_];
    while (span.reach.units == 0) span.reach = work_.reach[++item_];
    item_end_ = (span.reach.before + span.reach.units) * work_.kv_heads;
    span.item = item_;
    const int within = next_ - span.reach.before * work_.kv_heads;
    span.head = within / span.reach.units;
    span.begin = within % span.reach.units;
    const int left = end_ - next_, rest = span.reach.units - span.begin;
    int count = left < rest ? left : rest;
    if (work_.unit_tiles > 1) count = 1;  // each unit gives a partial result of its own
    span.end = span.begin + count;
    next_ += count;
    return true;
  }

 private:
  const AttentionWork& work_;
  int next_, end_, item_, item_end_;
};

// The first lane of a partial result. (item, head) and block both only grow along the units, so
// that the lanes of the one and whole items for the other add up to a place of its own for each
// span; items that are alone leave at most two rests a block.
APR_DEVICE int64_t part_of(const AttentionWork& work, const Item& item, int head, int64_t block,
                           bool begins, int64_t unit) {
  if (work.unit_tiles > 1) return unit * work.item_rows;
  if (item.alone) return work.alone_lanes + (2 * block + (begins ? 1 : 0)) * work.item_rows;
  return static_cast<int64_t>(item.lanes_before) * work.kv_heads + head * item.lanes +
         block * work.item_rows;
}

// Where the block leaves what it found out in a span.
APR_DEVICE int64_t part_of(const AttentionWork& work, const Item& item, const Span& span) {
  const int64_t unit = static_cast<int64_t>(span.reach.before) * work.kv_heads +
                       static_cast<int64_t>(span.head) * span.reach.units + span.begin;
  return part_of(work, item, span.head, block_index(), span.begin == 0, unit);
}

// Row r of an item.
struct Lane {
  int visit, row, q_head;
};
APR_DEVICE Lane lane_of(const AttentionWork& work, const Item& item, int head, int r) {
  const int lane = item.first_lane + r;
  const int visit = item.first_visit + lane / work.group;
  return {visit, work.visits[visit].row, head * work.group + lane % work.group};
}

// What a row of unnormalised sums is multiplied by, sinks included; the first of its threads writes
// the log-sum-exp.
template <typename T>
APR_DEVICE float finish(const AttentionWork& work, int row, int q_head, float max, float sum,
                        bool first_thread) {
  float weight = 1.f;
  if (work.sinks) {
    const float sink = work.sinks[q_head] * kLog2e;
    const float top = maximum(max, sink);
    weight = advance(max, sum, top, weight_under(top, sink));
  }
  const bool number = sum == sum;
  if (work.lse && first_thread) {
    work.lse[static_cast<int64_t>(row) * work.q_heads + q_head] =
        sum > 0.f ? (max + fast_log2(sum)) * kLn2 : (number ? -infinity() : sum);
  }
  return sum > 0.f ? weight / sum : (number ? 0.f : sum);
}

APR_DEVICE int64_t out_at(const AttentionWork& work, int row, int q_head) {
  return row * work.out_row_stride + q_head * work.out_head_stride;
}

// One dimension of a query, turned with its partner.
template <typename T>
APR_DEVICE float turned(const AttentionWork& work, int64_t query, int turn, int column, float own) {
  const int pairs = work.rotation_pairs, in_turn = column - work.rotation_first;
  if (in_turn < 0 || in_turn >= 2 * pairs) return own;
  const int pair = work.interleaved ? in_turn / 2 : in_turn % pairs;
  const bool second = work.interleaved ? in_turn % 2 != 0 : in_turn >= pairs;
  const int distance = work.interleaved ? 1 : pairs;
  const float other =
      to_float(work.q.template as<const T>()[query + column + (second ? -distance : distance)]);
  const float* cs = work.cos_sin.at((static_cast<int64_t>(turn) * pairs + pair) * 2, 2);
  return second ? own * cs[0] + other * cs[1] : own * cs[0] - other * cs[1];
}

// The query rows of an item to shared memory, turned by their rotation. `address(row, column)` is
// where an element goes, in bytes; those of a chunk lie together. Rows that do not exist and
// columns from head_dim on are 0. All `threads` from thread 0 on take part and must meet
// afterwards.
template <typename T, int kRows, int kDim, typename Address>
APR_DEVICE void gather_queries(const AttentionWork& work, const Item& item, int head, int thread,
                               int threads, Address address) {
  constexpr int kEach = kChunkOf<T>, kChunks = kDim / kEach;
  for (int i = thread; i < kRows * kChunks; i += threads) {
    const int r = i / kChunks, column = i % kChunks * kEach;
    uint4 chunk{0, 0, 0, 0};
    if (r < item.lanes && column < work.head_dim_k) {
      const Lane lane = lane_of(work, item, head, r);
      const int64_t query = lane.row * work.q_row_stride + lane.q_head * work.q_head_stride;
      chunk =
          *reinterpret_cast<const uint4*>(work.q.template as<const T>().at(query + column, kEach));
      const int turn = work.cos_sin ? work.bounds[lane.visit].rotation_row : -1;
      if (turn >= 0) {
        float x[kEach];
        unpack_chunk<T>(chunk, x);
#pragma unroll
        for (int e = 0; e < kEach; ++e) x[e] = turned<T>(work, query, turn, column + e, x[e]);
        chunk = pack_chunk<T>(x);
      }
    }
    shared_array<uint4>(address(r, column))[0] = chunk;
  }
}

}  // namespace apr::APR_GPU
