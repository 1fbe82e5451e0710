// The ring of tiles that feeds attention_wide.cuh: its layout in shared memory, and the thread that
// keeps it full by bulk copies.
#pragma once

#include "kernels/cuda/bulk.cuh"
#include "kernels/cuda/spans.cuh"

namespace apr::APR_GPU {

template <int kDim, int kStages>
struct WideShape {
  static constexpr int kThreads = 384;  // a group that copies, two that compute
  static constexpr int kRows = 128;
  static constexpr int kBoxes = kDim / 64;
  static constexpr int kBoxBytes = 64 * 64 * 2;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kStageBytes = 2 * kBoxes * kBoxBytes;
  static constexpr int kStatsBytes = 128 * 4 * 4;
  static constexpr int kBoundsBytes = kRows * 8;
  static constexpr int kBarrierBytes = 2 * kStages * 8;
  static constexpr int kRing = kQueryBytes;
  static constexpr int kStats = kRing + kStages * kStageBytes;
  static constexpr int kBounds = kStats + kStatsBytes;
  static constexpr int kBarriers = kBounds + kBoundsBytes;
  static constexpr int kSharedBytes = kBarriers + kBarrierBytes;

  // The barriers of a stage: its tiles have come, and everybody has read them.
  APR_DEVICE static uint32_t filled(uint32_t shared, int stage) {
    return shared + kBarriers + static_cast<uint32_t>(stage * 8);
  }
  APR_DEVICE static uint32_t emptied(uint32_t shared, int stage) {
    return filled(shared, kStages + stage);
  }
};

// Where the ring stands: the same sequence of stages for the thread that fills and those that empty
// it.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  APR_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The pool in boxes of a tile, or of a page where that is smaller; and of a few tokens: the rows
// after which the exchange of chunks repeats.
inline constexpr int kFew = 8;
struct PoolMaps {
  TensorMap keys, values, few_keys, few_values;
};
APR_INLINE int box_tokens(const AttentionWork& work) {
  return (1 << work.page_shift) < kTile ? 1 << work.page_shift : kTile;
}

// The thread that fills the ring.
template <int kDim, int kStages>
APR_DEVICE void fill_ring(const AttentionWork& work, const PoolMaps& maps, uint32_t shared) {
  using Shape = WideShape<kDim, kStages>;
  const int box = box_tokens(work);
  Ring<kStages> ring;
  Spans spans(work);
  Span span;
  while (spans.next(span)) {
    const Steps tiles = steps_of<kTile>(work, span);
    for (int tile = tiles.first; tile < tiles.end; ++tile) {
      const int slot = tile * kTile;
      const uint32_t filled = Shape::filled(shared, ring.stage);
      // In the first round nobody has to empty the stage: the phase before the first one is over.
      barrier_wait(Shape::emptied(shared, ring.stage), ring.parity ^ 1);
      // What no row sees is not read: a fork's own few tokens would cost as much as a tile.
      const int lo = span.reach.lo > slot ? span.reach.lo - slot : 0;
      const int hi = span.reach.hi - slot < kTile ? span.reach.hi - slot : kTile;
      const int end = (hi + kFew - 1) / kFew * kFew;
      int at = lo / kFew * kFew;
      barrier_expect(filled, 2 * Shape::kBoxes * (end - at) * 128);
      uint32_t to = shared + Shape::kRing + static_cast<uint32_t>(ring.stage * Shape::kStageBytes);
      to += static_cast<uint32_t>(at * 128);
      while (at < end) {
        const bool whole = at % box == 0 && at + box <= end;
        const int page = work.page_table[span.reach.first_page + ((slot + at) >> work.page_shift)];
        const int token = (slot + at) & ((1 << work.page_shift) - 1);
        for (int i = 0; i < 2 * Shape::kBoxes; ++i) {
          const bool key = i < Shape::kBoxes;
          const TensorMap& map =
              whole ? (key ? maps.keys : maps.values) : (key ? maps.few_keys : maps.few_values);
          copy_box(to + static_cast<uint32_t>(i * Shape::kBoxBytes), map, i % Shape::kBoxes * 64,
                   token, span.head, page, filled);
        }
        at += whole ? box : kFew;
        to += static_cast<uint32_t>((whole ? box : kFew) * 128);
      }
      ring.advance();
    }
  }
}

}  // namespace apr::APR_GPU
