// Writes new keys and values to their pages, and copies tokens between pages.
#pragma once

#include "kernels/cuda/codes.cuh"
#include "kernels/cuda/work.h"

namespace apr::APR_GPU {

inline constexpr int kCopyThreads = 256;

// The pool's element 0 of one token and head.
APR_DEVICE int64_t pool_at(int64_t slot, int head, int heads, int page_shift, int head_dim) {
  const int64_t page = slot >> page_shift, in_page = slot & ((int64_t{1} << page_shift) - 1);
  return (((page * heads + head) << page_shift) + in_page) * head_dim;
}

APR_DEVICE void copy16(const uint16_t* from, uint16_t* to) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

// A thread moves 16 bytes of keys or values.
APR_KERNEL APR_BOUNDS(kCopyThreads, 1) append_tokens(APR_GRID_CONSTANT AppendWork work) {
  const int chunks_k = work.head_dim_k / 8, chunks = chunks_k + work.head_dim_v / 8;
  const int i = block_index() * kCopyThreads + thread_index();  // below 2^31: steps.cu sees to it
  if (i >= work.rows * work.kv_heads * chunks) return;
  const int chunk = i % chunks, head = i / chunks % work.kv_heads;
  const int64_t row = i / chunks / work.kv_heads, slot = work.slots[row];
  if (slot < 0) return;
  if (chunk < chunks_k) {
    const int64_t to = pool_at(slot, head, work.kv_heads, work.page_shift, work.head_dim_k);
    copy16(work.k.at(row * work.k_row_stride + head * work.k_head_stride + chunk * 8, 8),
           work.pool_k.at(to + chunk * 8, 8));
  } else {
    const int64_t to = pool_at(slot, head, work.kv_heads, work.page_shift, work.head_dim_v);
    const int column = (chunk - chunks_k) * 8;
    copy16(work.v.at(row * work.v_row_stride + head * work.v_head_stride + column, 8),
           work.pool_v.at(to + column, 8));
  }
}

// A warp encodes a token of a head of keys or values (cpu/codes.h says how), eight numbers a lane.
template <typename T, Codes kCodes>
APR_KERNEL APR_BOUNDS(kCopyThreads, 1) append_codes(APR_GRID_CONSTANT AppendWork work) {
  const int lane = thread_index() % 32, column = lane * 8;
  const int i = (block_index() * kCopyThreads + thread_index()) / 32;
  if (i >= work.rows * work.kv_heads * 2) return;
  const int side = i % 2, head = i / 2 % work.kv_heads;
  const int64_t row = i / 2 / work.kv_heads, slot = work.slots[row];
  if (slot < 0) return;
  const int dim = side == 0 ? work.head_dim_k : work.head_dim_v;
  float x[8] = {}, top = 0.f;
  if (column < dim) {
    const int64_t at = side == 0 ? row * work.k_row_stride + head * work.k_head_stride
                                 : row * work.v_row_stride + head * work.v_head_stride;
    const uint4 numbers =
        *reinterpret_cast<const uint4*>((side == 0 ? work.k : work.v).at(at + column, 8));
    const uint32_t words[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[e] = unpack<T>(words[e / 2], e % 2);
      const float size = x[e] < 0.f ? -x[e] : x[e];
      top = size < infinity() ? maximum(top, size) : infinity();
    }
  }
#pragma unroll
  for (int by = 1; by < kCodeGroup / 8; by *= 2) top = maximum(top, shuffle_xor(top, by));
  constexpr float highest = kHighestCode<kCodes>;
  const float scale = top < infinity() ? top / highest : infinity() - infinity();
  const int64_t to = pool_at(slot, head, work.kv_heads, work.page_shift, 1);
  if (column >= dim) return;
  if (column % kCodeGroup == 0) {
    (side == 0 ? work.k_scales : work.v_scales)[to * groups_of(dim) + column / kCodeGroup] = scale;
  }
  uint32_t codes[2] = {0, 0};
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    float y = scale > 0.f ? x[e] / scale : 0.f;
    y = y > highest ? highest : y;
    y = y < -highest ? -highest : y;
    codes[e / 4] |= code_of<kCodes>(y) << (e % 4 * 8);
  }
  const Array<uint8_t> pool = (side == 0 ? work.pool_k : work.pool_v).template as<uint8_t>();
  *reinterpret_cast<uint2*>(pool.at(to * dim + column, 8)) = {codes[0], codes[1]};
}

// Sources are encoded before the step and destinations are new: no copy reads what another writes.
APR_KERNEL APR_BOUNDS(kCopyThreads, 1) copy_tokens(APR_GRID_CONSTANT CopyWork work) {
  const int chunks_k = work.head_dim_k / 8, chunks = chunks_k + work.head_dim_v / 8;
  const int i = block_index() * kCopyThreads + thread_index();
  if (i >= work.count * work.kv_heads * chunks) return;
  const int chunk = i % chunks, head = i / chunks % work.kv_heads;
  const PlanCopy copy = work.copies[i / chunks / work.kv_heads];
  const bool keys = chunk < chunks_k;
  const int dim = keys ? work.head_dim_k : work.head_dim_v;
  const int64_t column = (keys ? chunk : chunk - chunks_k) * 8;
  const Array<uint16_t>& pool = keys ? work.pool_k : work.pool_v;
  const int64_t from = pool_at(copy.source, head, work.kv_heads, work.page_shift, dim) + column;
  const int64_t to = pool_at(copy.destination, head, work.kv_heads, work.page_shift, dim) + column;
  copy16(pool.at(from, 8), pool.at(to, 8));
  const Array<float>& scales = keys ? work.k_scales : work.v_scales;
  if (!scales || column * 2 % kCodeGroup != 0) return;  // two codes in 16 bits
  const int64_t groups = groups_of(dim * 2), group = column * 2 / kCodeGroup;
  scales[to / dim * groups + group] = scales[from / dim * groups + group];
}

}  // namespace apr::APR_GPU
