// The primitives of bulk.cuh, executed by the emulator: descriptors and tensor maps are read as the
// hardware reads them, swizzling included.
#pragma once

#include <algorithm>

#include "kernels/cuda/emulated/primitives.h"

namespace apr::cuda_emulated {

// A tensor [pages, kv_heads, tokens, dims] of 16-bit numbers, in boxes of some tokens by 64
// dimensions.
struct TensorMap {
  const uint16_t* base;
  int64_t dims, tokens, heads, pages;
  int box;  // tokens
};

inline void barrier_init(uint32_t barrier, int arrivals) {
  block().init_barrier(barrier, arrivals);
}
inline void barrier_init_done() {}
inline void barrier_arrive(uint32_t barrier) {
  PhaseBarrier& b = block().phase_barrier(barrier);
  --b.pending;
  block().advance(b);
}
inline void barrier_expect(uint32_t barrier, int bytes) {
  block().phase_barrier(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(uint32_t barrier, int parity) { block().wait_phase(barrier, parity); }

inline void copy_box(uint32_t to, const TensorMap& map, int dim, int token, int head, int page,
                     uint32_t barrier) {
  Block& b = block();
  const int bytes = map.box * 128;
  char* target = b.shared_at(to, bytes, 1024);
  if (page < 0 || page >= map.pages || head < 0 || head >= map.heads || token < 0 || dim < 0) {
    throw Fault("bulk copy: a box outside of its tensor");
  }
  if (Counter* counter = b.counter()) {
    const uint16_t* from =
        map.base + ((page * map.heads + head) * map.tokens + token) * map.dims + dim;
    counter->bulk_copy(b.thread(), reinterpret_cast<uint64_t>(from),
                       std::clamp<int64_t>(map.dims - dim, 0, 64) * 2,
                       std::min<int64_t>(map.box, map.tokens - token), map.dims * 2);
  }
  b.start_free([=, &b] {
    for (int r = 0; r < map.box; ++r) {
      for (int c = 0; c < 64; ++c) {
        uint16_t value = 0;
        if (token + r < map.tokens && dim + c < map.dims) {
          value =
              map.base[((page * map.heads + head) * map.tokens + token + r) * map.dims + dim + c];
        }
        std::memcpy(target + in_box(r, c), &value, 2);
      }
    }
    PhaseBarrier& phase = b.phase_barrier(barrier);
    phase.bytes -= bytes;
    b.advance(phase);
  });
}
inline void publish_shared() {}

inline void products_begin() {}
inline void products_commit() { block().commit(Block::kProduct); }
template <int kLeft>
void products_wait() {
  block().wait(Block::kProduct, kLeft);
}
inline void keep_order(float (&)[32]) {}
template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

template <typename T>
float matrix_element(Block& b, uint64_t descriptor, int outer, int inner) {
  if (descriptor >> 62 != 1) throw Fault("wgmma: not the descriptor of 128-byte swizzling");
  return to_float(
      *reinterpret_cast<const T*>(b.shared_at(described(descriptor, outer, inner), 2, 2)));
}

// All 128 threads of a group; the product happens at once, or when the first of them waits for it.
struct GroupProduct {
  float* c[128];
  const uint32_t* a_registers[128];
  uint64_t a, b;
  bool add, in_registers, done;
};

template <typename T>
void compute(Block& b, GroupProduct& job) {
  if (job.done) return;
  job.done = true;
  static thread_local float a[64][16], bm[16][64];
  for (int thread = 0; job.in_registers && thread < 128; ++thread) {
    for (int value = 0; value < 8; ++value) {
      const Element at = wgmma_a(thread, value);
      a[at.row][at.col] = unpack<T>(job.a_registers[thread][value / 2], value % 2);
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 64; ++i) {
      if (!job.in_registers) a[i][k] = matrix_element<T>(b, job.a, i, k);
      bm[k][i] =
          job.in_registers ? matrix_element<T>(b, job.b, k, i) : matrix_element<T>(b, job.b, i, k);
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    for (int e = 0; e < 32; ++e) {
      const Element at = wgmma_c(thread, e);
      float sum = job.add ? job.c[thread][e] : 0.f;
      for (int k = 0; k < 16; ++k) sum += a[at.row][k] * bm[k][at.col];
      job.c[thread][e] = sum;
    }
  }
}

template <typename T>
void multiply_group(float (&c)[32], const uint32_t* a_registers, uint64_t a, uint64_t b, bool add) {
  Block& blk = block();
  struct Slot {
    float* c;
    const uint32_t* a_registers;
    uint64_t a, b;
    std::shared_ptr<GroupProduct> job;
  } slot{c, a_registers, a, b, nullptr};
  blk.meet(blk.group_meeting(), 128, blk.thread() % 128, "wgmma", &slot,
           [&](std::vector<void*>& all) {
             auto job = std::make_shared<GroupProduct>();
             const auto* first = static_cast<Slot*>(all[0]);
             job->a = first->a;
             job->b = first->b;
             job->add = add;
             job->in_registers = first->a_registers != nullptr;
             job->done = false;
             for (size_t i = 0; i < 128; ++i) {
               auto* one = static_cast<Slot*>(all[i]);
               if (one->a != first->a || one->b != first->b) {
                 throw Fault("wgmma: threads of a group give different descriptors");
               }
               job->c[i] = one->c;
               job->a_registers[i] = one->a_registers;
               one->job = job;
             }
           });
  if (Counter* counter = blk.counter()) {
    if (blk.thread() % 128 == 0) counter->add_products(2 * 64 * 64 * 16);
    if (!add) std::fill(c, c + 32, 0.f);
    return;
  }
  blk.start(Block::kProduct, [job = slot.job, &blk] { compute<T>(blk, *job); });
}
template <typename T>
void multiply_shared(float (&c)[32], uint64_t a, uint64_t b, bool add) {
  multiply_group<T>(c, nullptr, a, b, add);
}
template <typename T>
void multiply_registers(float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
  multiply_group<T>(c, a, 0, b, true);
}

}  // namespace apr::cuda_emulated
