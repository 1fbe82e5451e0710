// What the kernel for many rows needs beyond primitives.cuh, from compute capability 9.0 on: bulk
// copies of tensors (TMA), barriers in shared memory, matrix products of a group of four warps
// (wgmma).
#pragma once

#include "kernels/cuda/primitives.cuh"

namespace apr::APR_GPU {

// A matrix in shared memory as wgmma is told of it: rows of 128 bytes, whose 16-byte chunks are
// exchanged by the row's number modulo eight, in atoms of eight rows. `stride` is the distance of
// two atoms in bytes. (PTX ISA, "Matrix Descriptor" and "Shared Memory Matrix Layout", 128-byte
// swizzling.)
APR_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 16 |
         static_cast<uint64_t>((address & 0x3ffff) >> 4);
}

// The same of a matrix that begins so many bytes later: a number that the compiler knows is added
// to a descriptor that is made once.
APR_DEVICE uint64_t advanced(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

// Byte of column `column` (0 to 63) of row r in such rows.
APR_DEVICE uint32_t in_rows_of_128(int r, int column) {
  return static_cast<uint32_t>(r * 128 + ((column / 8 ^ (r & 7)) << 4) + column % 8 * 2);
}

}  // namespace apr::APR_GPU

#ifdef APR_EMULATED
#include "kernels/cuda/emulated/bulk.h"
#else
#include <cuda.h>

namespace apr::cuda {

using TensorMap = CUtensorMap;

// ---- barriers of shared memory --------------------------------------------------------------

APR_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to bulk copies; the block must meet afterwards.
APR_DEVICE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
APR_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and holds the phase until `bytes` more have been copied.
APR_DEVICE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Until the phase of this parity is over.
APR_DEVICE void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- bulk copies ----------------------------------------------------------------------------

// A box of the map's number of tokens by 64 dimensions, in rows of 128 bytes as above; what lies
// beyond the tensor is 0.
APR_DEVICE void copy_box(uint32_t to, const TensorMap& map, int dim, int token, int head, int page,
                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(&map), "r"(dim), "r"(token), "r"(head), "r"(page), "r"(barrier)
      : "memory");
}
// What threads wrote to shared memory is seen by bulk copies and wgmma that follow.
APR_DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- matrix products of four warps ----------------------------------------------------------

APR_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
APR_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
APR_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// What products in flight write is not touched before this, whatever the compiler makes of the
// source.
APR_DEVICE void keep_order(float (&c)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
template <int kRegisters>
APR_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
APR_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// c [64, 64] (+)= a b with a [64, 16] and b [16, 64]. In `multiply_shared` both lie in shared
// memory with k innermost (a by rows, b by columns); in `multiply_registers` a is in registers and
// b has k outermost.
template <typename T>
APR_DEVICE void multiply_shared(float (&c)[32], uint64_t a, uint64_t b, bool add);
template <typename T>
APR_DEVICE void multiply_registers(float (&c)[32], const uint32_t (&a)[4], uint64_t b);

#define APR_C32                                                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define APR_C8(i)                                                                             \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define APR_WGMMA(T, name)                                                                    \
  template <>                                                                                 \
  APR_DEVICE void multiply_shared<T>(float (&c)[32], uint64_t a, uint64_t b, bool add) {      \
    asm volatile(                                                                             \
        "{\n"                                                                                 \
        ".reg .pred add;\n"                                                                   \
        "setp.ne.b32 add, %34, 0;\n"                                                          \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " " APR_C32               \
        ", %32, %33, add, 1, 1, 0, 0;\n"                                                      \
        "}"                                                                                   \
        : APR_C8(0), APR_C8(8), APR_C8(16), APR_C8(24)                                        \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                        \
  }                                                                                           \
  template <>                                                                                 \
  APR_DEVICE void multiply_registers<T>(float (&c)[32], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " " APR_C32      \
                 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                   \
                 : APR_C8(0), APR_C8(8), APR_C8(16), APR_C8(24)                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                       \
  }
APR_WGMMA(BFloat16, "bf16")
APR_WGMMA(Float16, "f16")
#undef APR_WGMMA
#undef APR_C8
#undef APR_C32

}  // namespace apr::cuda
#endif
