// Numbers as codes of 8 bits with scales (params.h): rows are encoded once, when they are appended,
// and decoded tile by tile, so that the inner loops meet the pool's dtype.
#pragma once

#include "kernels/cpu/vec.h"

namespace apr::cpu::APR_ISA {
namespace {

typedef int8_t VecInt8 __attribute__((vector_size(kWidth), aligned(1), may_alias));
typedef uint8_t VecBytes __attribute__((vector_size(kWidth), aligned(1), may_alias));
typedef int16_t VecInt16 __attribute__((vector_size(2 * kWidth)));

// Storage types of codes: as in vec.h, in units of kUnit, with `put` for numbers that were divided
// by their scale.
struct Int8 {
  typedef int8_t Storage;
  static constexpr float kUnit = 1.f, kHighest = kHighestCode<Codes::kInt8>;
  static Vec many(const int8_t* p) {
    // In steps: compilers take a conversion over several sizes apart, number by number.
    const auto half = __builtin_convertvector(*reinterpret_cast<const VecInt8*>(p), VecInt16);
    return __builtin_convertvector(__builtin_convertvector(half, VecInt), Vec);
  }
  // To nearest, ties to even: adding 1.5 * 2^23 leaves the whole number in the lowest bits.
  static void put(int8_t* to, Vec x) {
    const VecInt whole = VecInt(x + 12582912.f) - 0x4b400000;
    const auto half = __builtin_convertvector(whole, VecInt16);
    *reinterpret_cast<VecInt8*>(to) = __builtin_convertvector(half, VecInt8);
  }
};

struct Float8 {
  typedef uint8_t Storage;
  static constexpr float kUnit = 256.f, kHighest = kHighestCode<Codes::kFloat8>;
  // As a float16 of the same exponent bits and a longer mantissa, whose bias is 8 more.
  static Vec many(const uint8_t* p) {
    const VecHalf x = __builtin_convertvector(*reinterpret_cast<const VecBytes*>(p), VecHalf);
    return Float16::of_bits((x & 0x7f) << 7 | (x & 0x80) << 8);
  }
  // To nearest, ties to even: the mantissa is rounded in place; below the normal numbers adding
  // 2^14, whose last bit is 2^-9, leaves the rounded mantissa in the lowest bits.
  static void put(uint8_t* to, Vec x) {
    const VecBits u = VecBits(x), magnitude = u & 0x7fffffffu, odd = (magnitude >> 20) & 1u;
    const VecBits normal = ((magnitude + 0x7ffffu + odd) >> 20) - 0x3c0u;
    const VecBits tiny = VecBits(Vec(magnitude) + 16384.f) - 0x46800000u;
    const VecBits code = (magnitude < 0x3c800000u ? tiny : normal) | ((u >> 24) & 0x80u);
    const auto half = __builtin_convertvector(code, VecHalf);
    *reinterpret_cast<VecBytes*>(to) = __builtin_convertvector(half, VecBytes);
  }
};

// One group. The scale of zeros is 0; that of a group which holds a number that is not finite is
// NaN, which its numbers then are.
template <class C>
inline void encode_group(const float* from, int64_t count, typename C::Storage* out, float* scale) {
  Vec top = {};
  VecInt finite = VecInt{} == 0;
  const auto part = [&](int64_t at) {
    if (at + kWidth <= count) return load(from + at);
    Vec x = {};
    for (int64_t j = at; j < count; ++j) x[j - at] = from[j];
    return x;
  };
  for (int64_t i = 0; i < count; i += kWidth) {
    const Vec x = part(i), size = x < 0.f ? -x : x;
    finite &= size <= 3.4028234664e38f;
    top = maximum(size, top);
  }
  *scale = any(~finite) ? __builtin_nanf("") : highest(top) / C::kHighest;
  const bool empty = !(*scale > 0.f);
  for (int64_t i = 0; i < count; i += kWidth) {
    // A scale below the normal numbers is not exact: what is divided by it may be larger than it
    // should.
    Vec x = empty ? Vec{} : part(i) / *scale;
    x = x > C::kHighest ? spread(C::kHighest) : x;
    x = x < -C::kHighest ? spread(-C::kHighest) : x;
    if (i + kWidth <= count) {
      C::put(out + i, x);
    } else {
      typename C::Storage packed[kWidth];
      C::put(packed, x);
      __builtin_memcpy(out + i, packed, count - i);
    }
  }
}

template <class C>
inline void encode_as(const float* from, int64_t count, void* to, float* scales) {
  auto* out = static_cast<typename C::Storage*>(to);
  for (int64_t i = 0; i < count; i += kCodeGroup) {
    encode_group<C>(from + i, count - i < kCodeGroup ? count - i : kCodeGroup, out + i, scales++);
  }
}

void encode_row(Codes codes, const float* from, int64_t count, void* to, float* scales) {
  if (codes == Codes::kInt8) return encode_as<Int8>(from, count, to, scales);
  encode_as<Float8>(from, count, to, scales);
}

template <class T, class C>
inline void decode_as(const char* from, const float* scales, int64_t rows, int64_t dim, char* to) {
  const auto* codes = reinterpret_cast<const typename C::Storage*>(from);
  auto* out = reinterpret_cast<typename T::Storage*>(to);
  const int64_t groups = code_groups(dim);
  for (int64_t r = 0; r < rows; ++r, codes += dim, out += dim, scales += groups) {
    int64_t i = 0;
    for (; i + kWidth <= dim; i += kWidth) {
      const float scale = loose(scales)[i / kCodeGroup] * C::kUnit;  // a power of two: exact
      T::put(out + i, C::many(codes + i) * scale);
    }
    if (i == dim) continue;
    typename C::Storage rest[kWidth] = {};
    typename T::Storage packed[kWidth];
    __builtin_memcpy(rest, codes + i, dim - i);
    T::put(packed, C::many(rest) * (loose(scales)[i / kCodeGroup] * C::kUnit));
    __builtin_memcpy(out + i, packed, (dim - i) * sizeof(packed[0]));
  }
}

// Rows of codes as rows of T; returns `to`.
template <class T>
inline const char* decode(Codes codes, const char* from, const float* scales, int64_t rows,
                          int64_t dim, char* to) {
  if (codes == Codes::kInt8) {
    decode_as<T, Int8>(from, scales, rows, dim, to);
  } else {
    decode_as<T, Float8>(from, scales, rows, dim, to);
  }
  return to;
}

}  // namespace
}  // namespace apr::cpu::APR_ISA
