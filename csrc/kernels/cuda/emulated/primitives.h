// The primitives of primitives.cuh, executed by the emulator: what each instruction does to the
// registers of its warp, to shared memory and to barriers, as the PTX manual (ISA 8.0 and later)
// has it.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>

#include "kernels/cuda/emulated/emulator.h"
#include "kernels/cuda/emulated/fragments.h"

#define APR_KERNEL inline void
#define APR_BOUNDS(threads, blocks)
#define APR_GRID_CONSTANT

namespace apr::cuda_emulated {

struct float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline Block& block() { return Block::current(); }
inline int thread_index() { return block().thread(); }
inline int block_index() { return static_cast<int>(block().block()); }
inline char* shared_memory() { return block().shared(); }
inline uint32_t shared_address(const void* p) { return block().shared_address(p); }

// A typed view of shared memory: each access is checked.
template <typename T>
struct Shared {
  uint32_t address;
  APR_HERE T& operator[](int64_t i) const {
    const auto at = static_cast<uint32_t>(address + i * static_cast<int64_t>(sizeof(T)));
    note_shared(kShared, at, sizeof(T));
    return *reinterpret_cast<T*>(block().shared_at(at, sizeof(T), sizeof(T)));
  }
};
template <typename T>
Shared<T> shared_array(uint32_t address) {
  return {address};
}

// ---- numbers --------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float32 {
  float value;
};
inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float to_float(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
}
inline float to_float(Float32 x) { return x.value; }
template <typename T>
T from_float(float x);
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float x) {
  const auto half = static_cast<_Float16>(x);
  Float16 result;
  std::memcpy(&result.bits, &half, 2);
  return result;
}
template <typename T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <typename T>
float unpack(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}
inline float fast_exp2(float x) {
  if (Counter* counter = block().counter()) counter->add_exponential();
  return std::exp2(x);
}
inline float fast_log2(float x) { return std::log2(x); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float tanh_of(float x) { return std::tanh(x); }
inline float infinity() { return INFINITY; }
struct CosSin {
  float cos, sin;
};
inline CosSin cos_sin_of(double angle) {
  return {static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))};
}

// ---- barriers and shuffles ------------------------------------------------------------------

inline void sync_warp() {
  Block& b = block();
  b.meet(b.warp_meeting(), 32, b.thread() % 32, "a warp's barrier", nullptr, [](auto&) {});
}
inline void sync_block() {
  Block& b = block();
  if (b.counter() != nullptr && b.thread() == 0) b.counter()->add_barrier();
  b.meet(b.barrier(0), static_cast<int>(b.threads()), b.thread(), "the block's barrier", nullptr,
         [](auto&) {});
}
// Threads [first, first + count) of the block meet at a barrier of their own (1 to 15).
inline void sync_some(int number, int first, int count) {
  Block& b = block();
  b.meet(b.barrier(number), count, b.thread() - first, "a barrier of some warps", nullptr,
         [](auto&) {});
}

// Every lane names the lane that it takes the value of.
template <typename T>
T shuffle_from(T value, int source, const char* what = "shuffle") {
  Block& b = block();
  T result = value;
  struct Slot {
    T value;
    int source;
    T* result;
  } slot{value, source, &result};
  b.meet(b.warp_meeting(), 32, b.thread() % 32, what, &slot, [](std::vector<void*>& all) {
    for (void* one : all) {
      const auto* to = static_cast<Slot*>(one);
      *to->result = static_cast<Slot*>(all[static_cast<size_t>(to->source % 32)])->value;
    }
  });
  return result;
}
template <typename T>
T shuffle_xor(T value, int mask) {
  return shuffle_from(value, block().thread() % 32 ^ mask, "shuffle_xor");
}
template <typename T>
T shuffle_up(T value, int by) {
  const int lane = block().thread() % 32;
  return shuffle_from(value, lane >= by ? lane - by : lane, "shuffle_up");
}

inline void add_atomically(int32_t& to, int32_t x) { to += x; }
inline void add_atomically(int64_t& to, int64_t x) { to += x; }

// ---- copies by warps ------------------------------------------------------------------------

// 16 bytes to shared memory, in the background; zeros where `valid` is false.
template <typename T>
APR_HERE void copy_async16(uint32_t to, const Array<const T>& from, int64_t index, bool valid) {
  if (Counter* counter = block().counter()) counter->copy_begins(block().thread());
  char* target = block().shared_at(to, 16, 16);
  note_shared(kOperands, to, 16);
  const auto source = reinterpret_cast<const char*>(
      valid ? from.checked(index, int64_t{16} / int64_t{sizeof(T)}) : nullptr);
  note_global(source, valid ? 16 : 0);
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) throw Fault("cp.async: source not aligned");
  block().start(Block::kCopy, [=] {
    if (source == nullptr) {
      std::memset(target, 0, 16);
    } else {
      std::memcpy(target, source, 16);
    }
  });
}
inline void copy_async_commit() { block().commit(Block::kCopy); }
template <int kLeft>
void copy_async_wait() {
  block().wait(Block::kCopy, kLeft);
}

// ---- matrix products of a warp --------------------------------------------------------------

struct MatrixLoad {
  uint32_t address;
  uint32_t* registers;
};
// Four 8 x 8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
inline void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed = false) {
  Block& b = block();
  note_shared(kOperands, address, 16);
  MatrixLoad mine{address, r};
  b.meet(b.warp_meeting(), 32, b.thread() % 32, transposed ? "ldmatrix.trans" : "ldmatrix", &mine,
         [&](std::vector<void*>& all) {
           for (int m = 0; m < 4; ++m) {
             uint16_t matrix[8][8];
             for (int row = 0; row < 8; ++row) {
               const auto* from = static_cast<MatrixLoad*>(all[static_cast<size_t>(8 * m + row)]);
               std::memcpy(matrix[row], b.shared_at(from->address, 16, 16), 16);
             }
             for (int lane = 0; lane < 32; ++lane) {
               const Element low = loaded(lane, 0, transposed), high = loaded(lane, 1, transposed);
               static_cast<MatrixLoad*>(all[static_cast<size_t>(lane)])->registers[m] =
                   matrix[low.row][low.col] | static_cast<uint32_t>(matrix[high.row][high.col])
                                                  << 16;
             }
           }
         });
}

struct MatrixProduct {
  float* c;
  const uint32_t* a;
  uint32_t b0, b1;
};
// c += a b with a [16, 16], b [16, 8], c [16, 8] in float32 (mma.m16n8k16).
template <typename T>
void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Block& blk = block();
  MatrixProduct mine{c, a, b0, b1};
  blk.meet(blk.warp_meeting(), 32, blk.thread() % 32, "mma", &mine, [&](std::vector<void*>& all) {
    if (Counter* counter = blk.counter()) {
      counter->add_products(2 * 16 * 8 * 16);
      return;
    }
    float a16[16][16], b16[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* p = static_cast<MatrixProduct*>(all[static_cast<size_t>(lane)]);
      for (int value = 0; value < 8; ++value) {
        const Element at = mma_a(lane, value);
        a16[at.row][at.col] = unpack<T>(p->a[value / 2], value % 2);
      }
      for (int value = 0; value < 4; ++value) {
        const Element at = mma_b(lane, value);
        b16[at.row][at.col] = unpack<T>(value < 2 ? p->b0 : p->b1, value % 2);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      auto* p = static_cast<MatrixProduct*>(all[static_cast<size_t>(lane)]);
      for (int e = 0; e < 4; ++e) {
        const Element at = mma_c(lane, e);
        float sum = p->c[e];
        for (int k = 0; k < 16; ++k) sum += a16[at.row][k] * b16[k][at.col];
        p->c[e] = sum;
      }
    }
  });
}

// Counts a span of the thread's block.
inline void note_span() {
  if (Counter* counter = block().counter()) counter->span(block().thread());
}
inline void launch_dependents() {}
inline void wait_for_predecessor() {}

}  // namespace apr::cuda_emulated
