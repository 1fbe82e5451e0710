// Writes the new keys and values of a step to their pages, and copies tokens between pages.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"

namespace apr::cpu {
namespace {

// Keys, or values: rows of one token of one head.
struct Plane {
  char* pool;
  float* scales;  // nullptr without codes
  int64_t head_dim, row_bytes, kv_heads, page_size;

  Plane(void* data, float* row_scales, const Pool& shape, int64_t dim)
      : pool(static_cast<char*>(data)),
        scales(row_scales),
        head_dim(dim),
        row_bytes(dim * shape.stored_size()),
        kv_heads(shape.kv_heads),
        page_size(shape.page_size) {}

  int64_t row(int64_t slot, int64_t head) const {
    return (slot / page_size * kv_heads + head) * page_size + slot % page_size;
  }
  char* at(int64_t row) const { return pool + row * row_bytes; }
  float* scales_at(int64_t row) const { return scales + row * code_groups(head_dim); }
};

std::array<Plane, 2> planes_of(const Pool& pool) {
  return {Plane{pool.k, pool.k_scales, pool, pool.head_dim_k},
          Plane{pool.v, pool.v_scales, pool, pool.head_dim_v}};
}

// One token of one head from the model's numbers.
void write_row(const Pool& pool, const Plane& plane, const char* from, int64_t row) {
  if (pool.codes == Codes::kNone) {
    std::memcpy(plane.at(row), from, plane.row_bytes);
    return;
  }
  thread_local std::vector<float> numbers;
  numbers.resize(static_cast<size_t>(plane.head_dim));
  const InstructionSet& set = instruction_set();
  set.load_row[static_cast<int>(pool.dtype)](from, plane.head_dim, numbers.data());
  set.encode_row(pool.codes, numbers.data(), plane.head_dim, plane.at(row), plane.scales_at(row));
}

}  // namespace

void append(const Rows& k, const Rows& v, const Pool& pool, const PlanArrays& plan, int threads) {
  const int64_t size = element_size(pool.dtype);
  const auto planes = planes_of(pool);
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
          write_row(pool, planes[side], from + element * size, planes[side].row(slot, h));
        }
      }
    }
  };
  parallel(threads, {{blocks, write}});
}

void copy_tokens(const Pool& pool, const PlanCopy* copies, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    for (const Plane& plane : planes_of(pool)) {
      for (int64_t h = 0; h < pool.kv_heads; ++h) {
        const int64_t to = plane.row(copies[i].destination, h);
        const int64_t from = plane.row(copies[i].source, h);
        std::memcpy(plane.at(to), plane.at(from), plane.row_bytes);
        if (plane.scales == nullptr) continue;
        std::copy_n(plane.scales_at(from), code_groups(plane.head_dim), plane.scales_at(to));
      }
    }
  }
}

}  // namespace apr::cpu
