// What kernels need of a GPU, by name: the instructions here, or the emulator's where there is no
// GPU.
#pragma once

#include "kernels/cuda/array.h"

#ifdef APR_EMULATED
#include "kernels/cuda/emulated/primitives.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define APR_KERNEL __global__ void
#define APR_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define APR_GRID_CONSTANT const __grid_constant__

namespace apr::cuda {

APR_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
APR_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
APR_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
APR_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
template <typename T>
APR_DEVICE T* shared_array(uint32_t address) {
  return static_cast<T*>(__cvta_shared_to_generic(address));
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
APR_DEVICE float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
APR_DEVICE float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
APR_DEVICE float to_float(Float32 x) { return x.value; }
APR_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
APR_DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }
template <typename T>
APR_DEVICE T from_float(float x);
template <>
APR_DEVICE BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
APR_DEVICE Float16 from_float<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <typename T>
APR_DEVICE uint32_t pack(float low, float high);
template <>
APR_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
APR_DEVICE uint32_t pack<Float16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <typename T>
APR_DEVICE float unpack(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}
APR_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
APR_DEVICE float fast_log2(float x) { return log2f(x); }
APR_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
APR_DEVICE float tanh_of(float x) { return tanhf(x); }
APR_DEVICE float infinity() { return __int_as_float(0x7f800000); }
struct CosSin {
  float cos, sin;
};
// Reduced in double precision, to half turns: the float's functions then need no slow path.
APR_DEVICE CosSin cos_sin_of(double angle) {
  const double half_turns = angle * 0.31830988618379067;
  CosSin result;
  sincospif(static_cast<float>(half_turns - 2.0 * rint(half_turns * 0.5)), &result.sin,
            &result.cos);
  return result;
}

// ---- barriers and shuffles ------------------------------------------------------------------

APR_DEVICE void sync_warp() { __syncwarp(); }
APR_DEVICE void sync_block() { __syncthreads(); }
// Threads [first, first + count) of the block meet at a barrier of their own (1 to 15).
APR_DEVICE void sync_some(int number, int first, int count) {
  static_cast<void>(first);
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(count) : "memory");
}
template <typename T>
APR_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <typename T>
APR_DEVICE T shuffle_up(T value, int by) {
  return __shfl_up_sync(0xffffffffu, value, by);
}
template <typename T>
APR_DEVICE T shuffle_from(T value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}

// In shared memory.
APR_DEVICE void add_atomically(int32_t& to, int32_t x) { atomicAdd(&to, x); }
APR_DEVICE void add_atomically(int64_t& to, int64_t x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(&to), static_cast<unsigned long long>(x));
}

// ---- copies by warps ------------------------------------------------------------------------

// 16 bytes to shared memory, in the background; zeros where `valid` is false: nothing is read then,
// and the index need not exist.
template <typename T>
APR_DEVICE void copy_async16(uint32_t to, const Array<const T>& from, int64_t index, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to),
               "l"(from.data + index), "r"(bytes)
               : "memory");
}
APR_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
APR_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// ---- matrix products of a warp --------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
APR_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed = false) {
  if (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// c += a b with a [16, 16], b [16, 8], c [16, 8] in float32.
template <typename T>
APR_DEVICE void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define APR_MMA(T, name)                                                                  \
  template <>                                                                             \
  APR_DEVICE void multiply_16x8x16<T>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, \
                                      uint32_t b1) {                                      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                   \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));         \
  }
APR_MMA(BFloat16, "bf16")
APR_MMA(Float16, "f16")
#undef APR_MMA

// For the emulator's counts: another span begins.
APR_DEVICE void note_span() {}

// Programmatic dependent launch: later kernels of the stream may start, and wait for earlier ones.
APR_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
APR_DEVICE void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace apr::cuda
#endif
