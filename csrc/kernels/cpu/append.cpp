// Writes the new keys and values of a step to their pages, and copies tokens between pages.
#include <algorithm>
#include <cstring>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"

namespace apr::cpu {
namespace {

struct Plane {
  char* pool;
  int64_t row_bytes;  // one token of one head
  int64_t page_bytes;

  Plane(void* data, const Pool& shape, int64_t head_dim)
      : pool(static_cast<char*>(data)),
        row_bytes(head_dim * element_size(shape.dtype)),
        page_bytes(shape.kv_heads * shape.page_size * row_bytes) {}

  char* at(int64_t slot, int64_t head, int64_t page_size) const {
    return pool + slot / page_size * page_bytes + (head * page_size + slot % page_size) * row_bytes;
  }
};

}  // namespace

void append(const Rows& k, const Rows& v, const Pool& pool, const PlanArrays& plan, int threads) {
  const int64_t size = element_size(pool.dtype);
  const Plane planes[2] = {{pool.k, pool, pool.head_dim_k}, {pool.v, pool, pool.head_dim_v}};
  const Rows sources[2] = {k, v};
  constexpr int64_t kRowsAtOnce = 64;
  const int64_t blocks = (plan.num_rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const auto write = [&](int64_t b) {
    const int64_t end = std::min(plan.num_rows, (b + 1) * kRowsAtOnce);
    for (int64_t row = b * kRowsAtOnce; row < end; ++row) {
      const int64_t slot = plan.slots[row];
      if (slot < 0) continue;
      for (int side = 0; side < 2; ++side) {
        const char* from = static_cast<const char*>(sources[side].data);
        for (int64_t h = 0; h < pool.kv_heads; ++h) {
          const int64_t element = row * sources[side].row_stride + h * sources[side].head_stride;
          std::memcpy(planes[side].at(slot, h, pool.page_size), from + element * size,
                      planes[side].row_bytes);
        }
      }
    }
  };
  parallel(threads, {{blocks, write}});
}

void copy_tokens(const Pool& pool, const PlanCopy* copies, int64_t count) {
  const Plane planes[2] = {{pool.k, pool, pool.head_dim_k}, {pool.v, pool, pool.head_dim_v}};
  for (int64_t i = 0; i < count; ++i) {
    for (const Plane& plane : planes) {
      for (int64_t h = 0; h < pool.kv_heads; ++h) {
        std::memcpy(plane.at(copies[i].destination, h, pool.page_size),
                    plane.at(copies[i].source, h, pool.page_size), plane.row_bytes);
      }
    }
  }
}

}  // namespace apr::cpu
