// Where the elements of a matrix lie: in the registers of a warp or of four, and in shared memory.
// Every product and every copy of the emulator is decoded by these; tests/cute holds them beside
// NVIDIA's own layouts.
#pragma once

#include <cstdint>

namespace apr::cuda_emulated {

struct Element {
  int row, col;
};

// mma.m16n8k16: a [16, 16] is eight 16-bit numbers a lane, two a register; b [16, 8] four; c
// [16, 8] four floats.
constexpr Element mma_a(int lane, int value) {
  return {lane / 4 + value / 2 % 2 * 8, lane % 4 * 2 + value % 2 + value / 4 * 8};
}
constexpr Element mma_b(int lane, int value) {
  return {lane % 4 * 2 + value % 2 + value / 2 * 8, lane / 4};
}
constexpr Element mma_c(int lane, int value) {
  return {lane / 4 + value / 2 * 8, lane % 4 * 2 + value % 2};
}

// ldmatrix: the element of an 8 x 8 matrix that is the `half` of a lane's register.
constexpr Element loaded(int lane, int half, bool transposed) {
  const int of_four = lane % 4 * 2 + half;
  return transposed ? Element{of_four, lane / 4} : Element{lane / 4, of_four};
}

// wgmma.m64n64k16: threads are those of four warps, 16 rows each; a [64, 16] in registers is eight
// numbers a thread, c [64, 64] 32 floats.
constexpr Element wgmma_a(int thread, int value) {
  const Element in_warp = mma_a(thread % 32, value);
  return {thread / 32 * 16 + in_warp.row, in_warp.col};
}
constexpr Element wgmma_c(int thread, int value) {
  const Element in_warp = mma_c(thread % 32, value % 4);
  return {thread / 32 * 16 + in_warp.row, value / 4 * 8 + in_warp.col};
}

// Rows of 128 bytes whose 16-byte chunks change places by bits 7 to 9 of the address (128-byte
// swizzling).
constexpr uint32_t exchanged(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// The address of a 16-bit number of a matrix that a descriptor of wgmma tells of: `inner` runs
// along the rows of 128 bytes, `outer` counts them.
constexpr uint32_t described(uint64_t descriptor, int outer, int inner) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  return exchanged(start + static_cast<uint32_t>(outer / 8) * stride +
                   static_cast<uint32_t>(outer % 8 * 128 + inner * 2));
}

// Byte of a 16-bit number in a box of 64 dimensions that a bulk copy left.
constexpr uint32_t in_box(int token, int dim) {
  return exchanged(static_cast<uint32_t>(token * 128 + dim * 2));
}

}  // namespace apr::cuda_emulated
