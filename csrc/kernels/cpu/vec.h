// Vectors of the instruction set that a file is compiled for (APR_ISA), and the arithmetic that the
// kernels share. No standard-library templates: their inline code would be merged with other
// objects' and could run on a machine that lacks the instructions.
#pragma once

#include "kernels/cpu/kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace apr::cpu::APR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 16;  // of 32 registers
#else
constexpr int kAccumulators = 8;  // of 16 registers
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecInt __attribute__((vector_size(4 * kWidth)));
typedef uint32_t VecBits __attribute__((vector_size(4 * kWidth)));
typedef uint64_t VecLong __attribute__((vector_size(4 * kWidth)));
typedef float FloatLoose __attribute__((may_alias));
typedef float VecLoose __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint32_t VecLooseBits __attribute__((vector_size(4 * kWidth), aligned(2), may_alias));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

inline FloatLoose* loose(float* p) { return reinterpret_cast<FloatLoose*>(p); }
inline const FloatLoose* loose(const float* p) { return reinterpret_cast<const FloatLoose*>(p); }
inline Vec load(const float* p) { return Vec(*reinterpret_cast<const VecLoose*>(p)); }
inline VecBits load(const uint32_t* p) {
  return VecBits(*reinterpret_cast<const VecLooseBits*>(p));
}
inline VecInt load(const int32_t* p) { return VecInt(*reinterpret_cast<const VecLooseBits*>(p)); }
inline void store(float* p, Vec x) { *reinterpret_cast<VecLoose*>(p) = VecLoose(x); }
inline void store(int32_t* p, VecInt x) { *reinterpret_cast<VecLooseBits*>(p) = VecLooseBits(x); }
inline void store(uint32_t* p, VecBits x) { *reinterpret_cast<VecLooseBits*>(p) = VecLooseBits(x); }
// All lanes x. (0 + x would be an addition: it turns -0 into 0.)
inline Vec spread(float x) { return x - Vec{}; }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }  // b where one is NaN
inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Of a mask (lanes 0 or -1): a bit for each lane.
inline uint32_t bits_of(VecInt mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask(__m512i(mask));
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(__m256(mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}
inline bool any(VecInt mask) { return bits_of(mask) != 0; }

// 2^x for x <= 0, relative error about 2e-7; exactly 0 below -126, NaN stays NaN.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec n = Vec(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const Vec f = x - n;
#else
  const Vec y = maximum(x, Vec{} - 126.f);
  const Vec n = (y + 12582912.f) - 12582912.f;
  const Vec f = y - n;
#endif
  Vec p = Vec{} + 1.5353362e-4f;
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.f;
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask(__m512(x), _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return Vec(_mm512_maskz_scalef_ps(kept, __m512(p), __m512(n)));
#else
  const Vec r = Vec(VecInt(p) + (__builtin_convertvector(n, VecInt) << 23));
  const Vec cut = x < -126.f ? Vec{} : r;
  return x == x ? cut : x;
#endif
}

inline Vec tanh(Vec x) {
  const Vec a = x < 0.f ? -x : x;
  const Vec e = exp2(a * -2.8853900817779268f);  // e^(-2|x|)
  const Vec big = (1.f - e) / (1.f + e);
  // 1 - e cancels for small x: the odd series is exact there.
  const Vec s = a * a;
  const Vec small = a * (1.f + s * (-0.333333333f + s * (0.133333333f + s * -0.0539682540f)));
  const Vec t = a < 0.25f ? small : big;
  return x < 0.f ? -t : t;
}

inline float highest(Vec x) {
  float top = x[0];
  for (int i = 1; i < kWidth; ++i) top = x[i] > top ? x[i] : top;
  return top;
}
inline float total(Vec x) {
  float sum = x[0];
  for (int i = 1; i < kWidth; ++i) sum += x[i];
  return sum;
}

// Lane i of the result picks blocks of kBlock lanes from a and b in turn: the even ones (kOdd = 0)
// or the odd ones.
template <int... I>
struct Lanes {};
template <int kCount, int... I>
struct LanesUpTo : LanesUpTo<kCount - 1, kCount - 1, I...> {};
template <int... I>
struct LanesUpTo<0, I...> {
  typedef Lanes<I...> type;
};
template <int kBlock, int kOdd, int... I>
inline Vec pick(Vec a, Vec b, Lanes<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(
      a, b,
      (I / kBlock % 2 * kWidth + I / (2 * kBlock) * 2 * kBlock + kOdd * kBlock + I % kBlock)...);
#else
  return __builtin_shuffle(a, b,
                           VecInt{(I / kBlock % 2 * kWidth + I / (2 * kBlock) * 2 * kBlock +
                                   kOdd * kBlock + I % kBlock)...});
#endif
}

// Lane i of the result is the sum over all lanes of x[i]; overwrites x.
template <int kBlock = kWidth / 2>
[[gnu::always_inline]] inline Vec sums_of(Vec (&x)[kWidth]) {
  typedef typename LanesUpTo<kWidth>::type All;
  for (int i = 0; i < kBlock; ++i) {
    x[i] =
        pick<kBlock, 0>(x[i], x[i + kBlock], All{}) + pick<kBlock, 1>(x[i], x[i + kBlock], All{});
  }
  if constexpr (kBlock > 1) {
    return sums_of<kBlock / 2>(x);
  } else {
    return x[0];
  }
}

// x[i][j] becomes x[j][i].
template <int kBlock = kWidth / 2>
[[gnu::always_inline]] inline void transpose(Vec (&x)[kWidth]) {
  typedef typename LanesUpTo<kWidth>::type All;
  for (int i = 0; i < kWidth; ++i) {
    if (i / kBlock % 2 != 0) continue;
    const Vec a = x[i], b = x[i + kBlock];
    x[i] = pick<kBlock, 0>(a, b, All{});
    x[i + kBlock] = pick<kBlock, 1>(a, b, All{});
  }
  if constexpr (kBlock > 1) transpose<kBlock / 2>(x);
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns, and 0 for rows up to
// `padded`.
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t padded,
                      int64_t columns, float* to, int64_t to_stride) {
  int64_t i = 0;
  for (; i + kWidth <= padded; i += kWidth) {
    int64_t j = 0;
    for (; j + kWidth <= columns; j += kWidth) {
      Vec x[kWidth];
      for (int64_t r = 0; r < kWidth; ++r)
        x[r] = i + r < rows ? load(from + (i + r) * from_stride + j) : Vec{};
      transpose(x);
      for (int64_t r = 0; r < kWidth; ++r) store(to + (j + r) * to_stride + i, x[r]);
    }
    for (; j < columns; ++j)
      for (int64_t r = i; r < i + kWidth; ++r)
        loose(to)[j * to_stride + r] = r < rows ? loose(from)[r * from_stride + j] : 0.f;
  }
  for (; i < padded; ++i)
    for (int64_t j = 0; j < columns; ++j)
      loose(to)[j * to_stride + i] = i < rows ? loose(from)[i * from_stride + j] : 0.f;
}

// Storage types: vectors and single numbers to float, and vectors of float to them.
struct Float32 {
  typedef float Storage;
  static Vec many(const float* p) { return load(p); }
  static float one(float x) { return x; }
  static void put(float* to, Vec x) { store(to, x); }
};

struct BFloat16 {
  typedef uint16_t Storage;
  static Vec many(const uint16_t* p) {
    return Vec(__builtin_convertvector(*reinterpret_cast<const VecHalf*>(p), VecBits) << 16);
  }
  static float one(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  }
  // To nearest, ties to even. NaN stays NaN.
  static void put(uint16_t* to, Vec x) {
#if defined(__AVX512BF16__)
    const __m256bh y = _mm512_cvtneps_pbh(__m512(x));
    __builtin_memcpy(to, &y, sizeof(y));
#else
    const VecBits u = VecBits(x);
    const VecBits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    *reinterpret_cast<VecHalf*>(to) =
        __builtin_convertvector(x == x ? rounded : (u >> 16) | 0x40u, VecHalf);
#endif
  }
};

struct Float16 {
  typedef uint16_t Storage;
  // Exponent and mantissa move into place, a multiplication re-biases (subnormals come out right),
  // infinities and NaN get the full exponent back.
  static Vec widen(VecHalf x) {
    const VecBits h = __builtin_convertvector(x, VecBits);
    const Vec scaled = Vec((h & 0x7fffu) << 13) * 0x1p112f;
    const VecBits special = VecBits((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return Vec(VecBits(scaled) | special | ((h & 0x8000u) << 16));
  }
  // To nearest, ties to even: the mantissa is rounded in place; below the normal numbers adding 0.5
  // leaves the rounded mantissa in the lowest bits.
  static VecBits narrow(Vec x) {
    const VecBits u = VecBits(x), magnitude = u & 0x7fffffffu, odd = (magnitude >> 13) & 1u;
    const VecBits normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
    const VecBits tiny = VecBits(Vec(magnitude) + 0.5f) - 0x3f000000u;
    VecBits h = magnitude < 0x38800000u ? tiny : normal;
    h = magnitude >= 0x477ff000u ? VecBits{} + 0x7c00u : h;
    h = magnitude > 0x7f800000u ? VecBits{} + 0x7e00u : h;
    return h | ((u >> 16) & 0x8000u);
  }
  static Vec of_bits(VecHalf x) {
#if defined(__AVX512F__)
    return Vec(_mm512_cvtph_ps(__m256i(x)));
#elif defined(__F16C__)
    return Vec(_mm256_cvtph_ps(__m128i(x)));
#else
    return widen(x);
#endif
  }
  static Vec many(const uint16_t* p) { return of_bits(*reinterpret_cast<const VecHalf*>(p)); }
  static float one(uint16_t x) {
    VecHalf v = {};
    v[0] = x;
    return widen(v)[0];
  }
  static void put(uint16_t* to, Vec x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
#else
    *reinterpret_cast<VecHalf*>(to) = __builtin_convertvector(narrow(x), VecHalf);
#endif
  }
};

template <class T>
inline void widen_row(const typename T::Storage* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, T::many(from + i));
  for (; i < count; ++i) to[i] = T::one(from[i]);
}

// Rows of numbers between storage and float, for the code outside of the inner loops.
template <class T>
void load_row(const void* from, int64_t count, float* to) {
  widen_row<T>(static_cast<const typename T::Storage*>(from), count, to);
}
template <class T>
void store_row(const float* from, float factor, int64_t count, void* to) {
  auto* out = static_cast<typename T::Storage*>(to);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) T::put(out + i, load(from + i) * factor);
  if (i == count) return;
  Vec rest = {};
  for (int64_t j = i; j < count; ++j) rest[j - i] = from[j] * factor;
  typename T::Storage packed[kWidth];
  T::put(packed, rest);
  __builtin_memcpy(out + i, packed, (count - i) * sizeof(packed[0]));
}

}  // namespace
}  // namespace apr::cpu::APR_ISA
