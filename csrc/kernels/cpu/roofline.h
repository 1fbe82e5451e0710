// What the machine does at best with the instructions of a file: for benchmarks, to set beside a
// kernel's figures.
#pragma once

#include "kernels/cpu/products.h"

namespace apr::cpu::APR_ISA {
namespace {

// Independent sums in registers, `rounds` products each; returns the multiplications and additions.
template <class P>
int64_t operate(int64_t rounds) {
  constexpr int kSums = kAccumulators == 16 ? 16 : 12;
  Vec s[kSums] = {};
  typename P::Operand a = {}, b = {};
  for (int64_t i = 0; i < rounds; ++i) {
    // The operands may have changed: the loop cannot be folded.
    asm volatile("" : "+m"(a), "+m"(b));
    const typename P::Operand x = a, y = b;
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n)
#pragma GCC unroll 16
      for (int j = 0; j < kSums; ++j) s[j] = P::add(s[j], x, y);
  }
  for (int j = 0; j < kSums; ++j) asm volatile("" : : "m"(s[j]));
  return rounds * 8 * kSums * kWidth * 2 * P::kUnit;
}

int64_t operate_bfloat16(int64_t rounds) {
#if defined(APR_MATRIX)
  const TileScope scope;
  APR_TILE_ZERO(0);
  APR_TILE_ZERO(1);
  APR_TILE_ZERO(2);
  APR_TILE_ZERO(3);
  APR_TILE_ZERO(4);
  APR_TILE_ZERO(5);
  for (int64_t i = 0; i < rounds; ++i) {
    APR_TILE_DOT(0, 4, 5);
    APR_TILE_DOT(1, 4, 5);
    APR_TILE_DOT(2, 4, 5);
    APR_TILE_DOT(3, 4, 5);
  }
  return rounds * 4 * 16 * 16 * 32 * 2;
#elif defined(APR_PAIRS)
  return operate<Pairs>(rounds);
#else
  return operate<Floats<Float32>>(rounds);
#endif
}

// The sum of `count` numbers (a multiple of 8 vectors), read once.
float read(const float* data, int64_t count) {
  Vec s[8] = {};
  for (int64_t i = 0; i < count; i += 8 * kWidth)
    for (int j = 0; j < 8; ++j) s[j] += load(data + i + j * kWidth);
  Vec sum = {};
  for (int j = 0; j < 8; ++j) sum += s[j];
  return total(sum);
}

}  // namespace
}  // namespace apr::cpu::APR_ISA
