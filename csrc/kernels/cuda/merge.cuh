// Merges the partial results of each row and head, in the order of the row's view: a warp for each.
#pragma once

#include "kernels/cuda/spans.cuh"

namespace apr::APR_GPU {

inline constexpr int kMergeThreads = 128;
// Columns that a lane adds up of each 128: enough for all heads but the widest, and for those.
inline constexpr int kQuads = 2, kMostQuads = 5;

// Where the partial results of one visit of a row and head lie: part i at `first + i * step`, but
// for part 0 of an item that is alone, which lies `back` further.
struct Parts {
  int64_t first = 0, step = 0, back = 0;
  int count = 0;
  bool direct = false;  // the attention kernel wrote the row
};

APR_DEVICE Parts parts_of(const AttentionWork& work, const Counts& counts, int64_t units,
                          int number, int q_head) {
  const int head = q_head / work.group, in_group = q_head % work.group;
  int index = work.visits[number].item;
  Item item = work.items[index];
  // The item that holds this head's lane: the visit's first, unless its group was cut.
  int lane = (number - item.first_visit) * work.group + in_group - item.first_lane;
  while (lane >= item.lanes) {
    item = work.items[++index];
    lane = (number - item.first_visit) * work.group + in_group - item.first_lane;
  }
  const Reach reach = work.reach[index];
  const int before = reach.before, count = reach.units;
  Parts parts;
  if (count == 0) return parts;
  const int64_t first =
      static_cast<int64_t>(before) * work.kv_heads + static_cast<int64_t>(head) * count;
  int64_t begin = first, end = first + count;  // units, or the blocks that own them
  if (work.unit_tiles == 1) {
    begin = owner_of(units, counts.blocks, first);
    end = owner_of(units, counts.blocks, first + count - 1) + 1;
  }
  parts.count = static_cast<int>(end - begin);
  parts.direct = item.alone != 0 && parts.count == 1;
  parts.first = part_of(work, item, head, begin, false, begin) + lane;
  parts.back = part_of(work, item, head, begin, true, begin) + lane - parts.first;
  parts.step = part_of(work, item, head, begin + 1, false, begin + 1) + lane - parts.first;
  return parts;
}

// A warp's view of the partial results of one row and head: each lane resolves one of 32 visits,
// then each takes one of 32 partial results, so that no load waits for another of its kind.
class RowParts {
 public:
  APR_DEVICE RowParts(const AttentionWork& work, const Counts& counts, int row, int q_head,
                      int lane)
      : work_(work), counts_(counts), q_head_(q_head), lane_(lane) {
    units_ = static_cast<int64_t>(counts.units) * work.kv_heads;
    first_visit_ = row < counts.rows ? work.row_visits[row] : 0;
    end_visit_ = row < counts.rows ? work.row_visits[row + 1] : 0;
  }

  // Calls `use(at, exists)` on all lanes for every 32 partial results, in the order of the view;
  // `at` is the lane's own. False where the attention kernel wrote the row.
  template <typename Use>
  APR_DEVICE bool for_each(Use use) {
    for (int first = first_visit_; first < end_visit_; first += 32) {
      Parts mine;
      if (first + lane_ < end_visit_) {
        mine = parts_of(work_, counts_, units_, work_.view_order[first + lane_], q_head_);
      }
      int upto = mine.count;  // partial results of the lanes up to this one
      for (int by = 1; by < 32; by *= 2) {
        const int below = shuffle_up(upto, by);
        if (lane_ >= by) upto += below;
      }
      if (shuffle_from(mine.direct ? 1 : 0, 0) != 0) return false;
      const int all = shuffle_from(upto, 31);
      for (int begin = 0; begin < all; begin += 32) {
        const int number = begin + lane_;
        int visit = 0;  // the lane whose visit the number belongs to
        for (int i = 0; i < 31; ++i) visit += number >= shuffle_from(upto, i) ? 1 : 0;
        const int within = number - (shuffle_from(upto, visit) - shuffle_from(mine.count, visit));
        const int64_t back = shuffle_from(mine.back, visit);
        const int64_t at = shuffle_from(mine.first, visit) +
                           within * shuffle_from(mine.step, visit) + (within == 0 ? back : 0);
        use(at, number < all);
      }
    }
    return true;
  }

 private:
  const AttentionWork& work_;
  Counts counts_;
  int q_head_, lane_, first_visit_, end_visit_;
  int64_t units_;
};

template <typename T>
APR_DEVICE void store_four(T* to, const float (&x)[4], float times) {
  if constexpr (kChunkOf<T> == 4) {
    *reinterpret_cast<float4*>(to) = {x[0] * times, x[1] * times, x[2] * times, x[3] * times};
  } else {
    const auto pairs = reinterpret_cast<uint32_t*>(to);
    pairs[0] = pack<T>(x[0] * times, x[1] * times);
    pairs[1] = pack<T>(x[2] * times, x[3] * times);
  }
}

// The maximum of all partial results comes first: it is exact in any order, and parts of weight 0
// then change no bit of the sums, which are taken part by part.
template <typename T, int kQuads>
APR_KERNEL APR_BOUNDS(kMergeThreads, 1) merge_parts(APR_GRID_CONSTANT AttentionWork work) {
  const int64_t warp =
      static_cast<int64_t>(block_index()) * (kMergeThreads / 32) + thread_index() / 32;
  const int lane = thread_index() % 32;
  if (warp >= static_cast<int64_t>(work.row_count) * work.q_heads) return;
  const auto row = work.row_begin + static_cast<int>(warp / work.q_heads);
  const auto q_head = static_cast<int>(warp % work.q_heads);
  RowParts parts(work, work.counts[0], row, q_head, lane);
  wait_for_predecessor();  // the tables are older than the kernel ahead; the partial results are
                           // its own
  float top = -infinity();
  const bool merged = parts.for_each([&](int64_t at, bool exists) {
    if (exists) top = maximum(top, work.part_sum[2 * at]);
  });
  if (!merged) return;
  for (int by = 16; by > 0; by /= 2) top = maximum(top, shuffle_xor(top, by));
  // A lane holds four neighbouring columns of each 128.
  float sums[kQuads][4] = {}, sum = 0.f;
  parts.for_each([&](int64_t at, bool exists) {
    float weight = 0.f, weighed = 0.f;
    if (exists) {
      weight = weight_under(top, work.part_sum[2 * at]);
      weighed = work.part_sum[2 * at + 1] * weight;
    }
    const int64_t mine = exists ? at : -1;
#pragma unroll 4
    for (int i = 0; i < 32; ++i) {
      const int64_t from = shuffle_from(mine, i);
      const float part_weight = shuffle_from(weight, i);
      sum += shuffle_from(weighed, i);
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        const int column = quad * 128 + lane * 4;
        if (from < 0 || column >= work.head_dim_v) continue;
        const float4 part =
            *reinterpret_cast<const float4*>(work.part_out.at(from * work.head_dim_v + column, 4));
        sums[quad][0] += part.x * part_weight;
        sums[quad][1] += part.y * part_weight;
        sums[quad][2] += part.z * part_weight;
        sums[quad][3] += part.w * part_weight;
      }
    }
  });
  // Rows beyond those that there are saw nothing: zeros.
  const float inverse = finish<T>(work, row, q_head, top, sum, lane == 0);
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    const int column = quad * 128 + lane * 4;
    if (column >= work.head_dim_v) continue;
    store_four<T>(work.out.template as<T>().at(out_at(work, row, q_head) + column, 4), sums[quad],
                  inverse);
  }
}

}  // namespace apr::APR_GPU
