// The ring of copies that feeds a warp of attention_small.cuh: keys and values of 16 tokens a
// stage. Codes pass through it as they lie in their pages; a warp decodes the tokens that it comes
// to.
#pragma once

#include "kernels/cuda/codes.cuh"
#include "kernels/cuda/spans.cuh"

namespace apr::APR_GPU {

// Byte of 16-byte chunk c of row r: chunks of eight rows change places so that neither copies nor
// ldmatrix meet on a bank.
template <int kDim>
APR_DEVICE uint32_t swizzled(int r, int c) {
  return static_cast<uint32_t>(r * (kDim * 2) + ((c ^ (r & 7)) << 4));
}

template <typename T, int kDim, int kStages, bool kCoded>
class SmallRing {
  static constexpr int kColumns = kDim / 8;  // chunks of a row of numbers
  static constexpr int kCodes = 16 * kDim;   // bytes of 16 tokens, behind which
  static constexpr int kCodesAndScales = kCodes + kCodes / kCodeGroup * 4;  // their scales lie

 public:
  static constexpr int kSlice = 16 * kDim * 2;  // bytes of a warp's keys, or values, as numbers
  static constexpr int kStored = kCoded ? kCodesAndScales : kSlice;  // the same in a stage
  static constexpr int kBytes = kStages * 2 * kStored + (kCoded ? 2 * kSlice : 0);

  APR_DEVICE SmallRing(const AttentionWork& work, uint32_t address, int lane)
      : work_(work), address_(address), lane_(lane) {}

  // Starts the copies of tokens [slot, slot + 16). Those that no row sees become zeros: what a page
  // holds there may be no number, and 0 times that is none.
  APR_DEVICE void fetch(const Reach& reach, int head, int slot, int stage) {
    int page = 0;  // past the end there may be none
    if (slot < reach.hi) {
      page = work_.page_table[reach.first_page + (slot >> work_.page_shift)];
    }
    const int64_t first =
        ((static_cast<int64_t>(page) * work_.kv_heads + head) << work_.page_shift) +
        (slot & ((1 << work_.page_shift) - 1));
    if constexpr (kCoded) {
      fetch_codes(reach, slot, first, stored_at(stage));
    } else {
      fetch_numbers(reach, slot, first, stored_at(stage));
    }
  }

  // Where the keys of a stage lie as numbers; values follow after kSlice bytes. All lanes of the
  // warp call it when the copies are there.
  APR_DEVICE uint32_t numbers(const Reach& reach, int slot, int stage) const {
    if constexpr (kCoded) {
      const uint32_t to = stored_at(kStages);
      if (work_.codes == Codes::kInt8) {
        decode<Codes::kInt8>(reach, slot, stored_at(stage), to);
      } else {
        decode<Codes::kFloat8>(reach, slot, stored_at(stage), to);
      }
      sync_warp();
      return to;
    } else {
      static_cast<void>(reach), static_cast<void>(slot);
      return stored_at(stage);
    }
  }

 private:
  APR_DEVICE uint32_t stored_at(int stage) const {
    return address_ + static_cast<uint32_t>(stage * 2 * kStored);
  }

  // `first` is the row of the pool that the first of the tokens has.
  APR_DEVICE void fetch_numbers(const Reach& reach, int slot, int64_t first, uint32_t keys) {
    // A lane copies one chunk of every kRowsAtOnce rows: known to the compiler, so that it keeps no
    // counter and works out one address.
    constexpr int kRowsAtOnce = 32 / kColumns;
    const int row = lane_ / kColumns, column = lane_ % kColumns * 8;
    const int64_t token = first + row;
    int64_t key = token * work_.head_dim_k + column, value = token * work_.head_dim_v + column;
    const auto seen = static_cast<uint32_t>(reach.hi - reach.lo);
    const uint32_t seen_keys = column < work_.head_dim_k ? seen : 0;
    const uint32_t seen_values = column < work_.head_dim_v ? seen : 0;
#pragma unroll
    for (int r = 0; r < 16; r += kRowsAtOnce) {
      const uint32_t to = keys + swizzled<kDim>(row + r, column / 8);
      const auto in_reach = static_cast<uint32_t>(slot + row + r - reach.lo);
      copy_async16(to, work_.k, key, in_reach < seen_keys);
      copy_async16(to + kSlice, work_.v, value, in_reach < seen_values);
      key += kRowsAtOnce * work_.head_dim_k;
      value += kRowsAtOnce * work_.head_dim_v;
    }
  }

  APR_DEVICE void fetch_codes(const Reach& reach, int slot, int64_t first, uint32_t keys) {
    constexpr int kChunks = kDim / 16, kRowsAtOnce = 32 / kChunks;
    const int row = lane_ / kChunks, column = lane_ % kChunks * 16;
    const int64_t token = first + row;
    int64_t key = token * work_.head_dim_k + column, value = token * work_.head_dim_v + column;
#pragma unroll
    for (int r = 0; r < 16; r += kRowsAtOnce) {
      const uint32_t to = keys + static_cast<uint32_t>((row + r) * kDim + column);
      const bool seen = sees(reach, slot + row + r);
      copy_async16(to, work_.k.as<const uint8_t>(), key, seen && column < work_.head_dim_k);
      copy_async16(to + kStored, work_.v.as<const uint8_t>(), value,
                   seen && column < work_.head_dim_v);
      key += kRowsAtOnce * work_.head_dim_k;
      value += kRowsAtOnce * work_.head_dim_v;
    }
    const int groups_k = groups_of(work_.head_dim_k), groups_v = groups_of(work_.head_dim_v);
    const uint32_t to = keys + static_cast<uint32_t>(kCodes + lane_ * 16);
    if (lane_ < 4 * groups_k) {  // four scales each
      copy_async16(to, work_.k_scales, first * groups_k + lane_ * 4,
                   sees_scales(reach, slot, groups_k));
    }
    if (lane_ < 4 * groups_v) {
      copy_async16(to + kStored, work_.v_scales, first * groups_v + lane_ * 4,
                   sees_scales(reach, slot, groups_v));
    }
  }

  // Whether some token is seen of those whose scales this lane copies.
  APR_DEVICE bool sees_scales(const Reach& reach, int slot, int groups) const {
    const int first = slot + lane_ * 4 / groups, last = slot + (lane_ * 4 + 3) / groups;
    return first < reach.hi && last >= reach.lo;
  }

  APR_DEVICE static bool sees(const Reach& reach, int slot) {
    return static_cast<uint32_t>(slot - reach.lo) < static_cast<uint32_t>(reach.hi - reach.lo);
  }

  // Eight numbers a lane, so that lanes that store together meet on no bank. The scales of tokens
  // that no row sees may be no numbers, and behind head_dim there are none.
  template <Codes kKind>
  APR_DEVICE void decode(const Reach& reach, int slot, uint32_t from, uint32_t to) const {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int groups = groups_of(side == 0 ? work_.head_dim_k : work_.head_dim_v);
#pragma unroll 4
      for (int i = 0; i < 16 * kColumns; i += 32) {
        const int row = (i + lane_) / kColumns, chunk = (i + lane_) % kColumns;
        const uint2 codes =
            shared_array<uint2>(from + static_cast<uint32_t>(row * kDim + chunk * 8))[0];
        const int group = chunk * 8 / kCodeGroup;
        float scale = 0.f;
        if (group < groups && sees(reach, slot + row)) {
          scale = shared_array<float>(from + static_cast<uint32_t>(kCodes))[row * groups + group];
        }
        shared_array<uint4>(to + swizzled<kDim>(row, chunk))[0] =
            decode_chunk<T, kKind>(codes, scale);
      }
      from += kStored;
      to += kSlice;
    }
  }

  const AttentionWork& work_;
  uint32_t address_;
  int lane_;
};

}  // namespace apr::APR_GPU
