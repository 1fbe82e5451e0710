// How products of queries, keys and values are taken: in float, or on pairs of bfloat16. Each gives
// the elements that the inner loops multiply, and how they accumulate.
#pragma once

#include "kernels/cpu/vec.h"

namespace apr::cpu::APR_ISA {
namespace {

// Memory that is wanted one tile later: fetched piece by piece while the current one is computed.
struct Ahead {
  const char* at;
  int64_t bytes;

  // The size of a piece, where there are `pieces`.
  int64_t step(int64_t pieces) const { return round_up(bytes / (pieces > 0 ? pieces : 1) + 1, 64); }
  void fetch(int64_t from, int64_t step) const {
    for (int64_t i = from; i < from + step && i < bytes; i += 64) __builtin_prefetch(at + i, 0, 3);
  }
};

// How a product of tiles is taken in float: elements are single numbers, whatever the pool stores.
template <class T>
struct Floats {
  typedef float Element;
  typedef Vec Operand;
  static constexpr int64_t kUnit = 1;  // numbers in an element
  static Vec add(Vec sum, Vec a, Vec b) { return sum + a * b; }
  static Vec spread(float a) { return a - Vec{}; }
  static const float* queries(const float* q, int64_t, float*) { return q; }

  // `tokens` rows of `dim` numbers as elements [tokens, dim]; `to` is used where they must be
  // widened.
  static const float* keys(const char* p, int64_t tokens, int64_t dim, float* to) {
    if constexpr (sizeof(typename T::Storage) == 4) {
      return reinterpret_cast<const float*>(p);
    } else {
      const auto* from = reinterpret_cast<const typename T::Storage*>(p);
      widen_row<T>(from, tokens * dim, to);
      return to;
    }
  }
  static const float* values(const char* p, int64_t tokens, int64_t, int64_t dim, float* to,
                             const Ahead&) {
    return keys(p, tokens, dim, to);
  }
  static int64_t first_slot(const TileJob& job) { return job.begin; }
  // A vector of elements from number `d` of a row on; values also take the next token's row.
  static Vec key(const char* row, int64_t d) {
    return T::many(reinterpret_cast<const typename T::Storage*>(row) + d);
  }
  static Vec value(const char* row, const char*, int64_t d) { return key(row, d); }
};

#if defined(__AVX512BF16__) || defined(APR_MATRIX)
#define APR_PAIRS 1
#if defined(__AVX512BF16__)
// a0 a1 … b0 b1 … become a0 b0 a1 b1 …
inline VecBits interleaved(__m512i halves) {
  typedef uint16_t Indices __attribute__((vector_size(64)));
  constexpr Indices kOrder = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return VecBits(_mm512_permutexvar_epi16(__m512i(kOrder), halves));
}
#endif

// kWidth numbers of 16 bits from each side: a0 b0 a1 b1 …; zeros where there is no b.
inline VecBits interleave(const uint16_t* a, const uint16_t* b) {
#if defined(__AVX512BF16__)
  const auto half = [](const uint16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  };
  return interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(half(a)),
                                        b == nullptr ? _mm256_setzero_si256() : half(b), 1));
#else
  const auto wide = [](const uint16_t* p) {
    return __builtin_convertvector(*reinterpret_cast<const VecHalf*>(p), VecBits);
  };
  return b == nullptr ? wide(a) : wide(a) | wide(b) << 16;
#endif
}

// The same on pairs of bfloat16, summed in float by one instruction: neighbours of a key's row as
// they lie, and neighbouring tokens of values, laid side by side. The instruction takes subnormal
// numbers for 0.
struct Pairs {
  typedef uint32_t Element;
  typedef VecBits Operand;
  static constexpr int64_t kUnit = 2;
  static Vec add(Vec sum, VecBits a, VecBits b) {
#if defined(__AVX512BF16__)
    return Vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
#else
    sum += flushed(a & 0xffff0000u) * flushed(b & 0xffff0000u);
    return sum + flushed(a << 16) * flushed(b << 16);
#endif
  }
#if !defined(__AVX512BF16__)
  static Vec flushed(VecBits x) { return Vec(VecBits((x & 0x7f800000u) != 0u) & x); }
#endif
  static VecBits spread(uint32_t a) { return VecBits{} + a; }
  static const uint32_t* queries(const float* q, int64_t count, uint32_t* to) {
    store_row<BFloat16>(q, 1.f, count, to);
    return to;
  }

  static const uint32_t* keys(const char* p, int64_t, int64_t, uint32_t*) {
    return reinterpret_cast<const uint32_t*>(p);
  }
  // Elements [tokens / 2 rounded up, dim]; a last single token is paired with 0, and so are the
  // first `unseen` ones, which may never have been written.
  static const uint32_t* values(const char* p, int64_t tokens, int64_t unseen, int64_t dim,
                                uint32_t* to, const Ahead& ahead) {
    const auto* row = reinterpret_cast<const uint16_t*>(p);
    const int64_t step = ahead.step(tokens / 2);
    for (int64_t t = 0; t < tokens; t += 2, row += 2 * dim) {
      ahead.fetch(t / 2 * step, step);
      const uint16_t* next = t + 1 < tokens ? row + dim : nullptr;
      uint32_t* out = to + t / 2 * dim;
      int64_t d = 0;
      for (; d + kWidth <= dim; d += kWidth) {
        store(out + d, interleave(row + d, next == nullptr ? nullptr : next + d));
      }
      for (; d < dim; ++d) out[d] = row[d] | (next == nullptr ? 0u : uint32_t(next[d]) << 16);
    }
    for (int64_t i = 0; i < unseen / 2 * dim; ++i) to[i] = 0;
    if (unseen % 2 != 0) {
      for (int64_t i = unseen / 2 * dim; i < (unseen / 2 + 1) * dim; ++i) to[i] &= 0xffff0000u;
    }
    return to;
  }
  static int64_t first_slot(const TileJob& job) { return job.pinned ? job.grid_begin : job.begin; }
  static VecBits key(const char* row, int64_t d) {
    return load(reinterpret_cast<const uint32_t*>(row + 2 * d));
  }
  static VecBits value(const char* row, const char* next, int64_t d) {
    return interleave(reinterpret_cast<const uint16_t*>(row) + d,
                      next == nullptr ? nullptr : reinterpret_cast<const uint16_t*>(next) + d);
  }
};
#endif

// Probabilities as elements of the value product. Of tokens t (even) and t + 1, a row of lanes
// each: [tokens, width] or [pairs of tokens, width].
inline void keep(float* to, int64_t t, int64_t width, Vec a, Vec b, bool both) {
  store(to + t * width, a);
  if (both) store(to + (t + 1) * width, b);
}
// Of one row, for tokens from t (a multiple of kWidth) on.
inline void keep_row(float* to, int64_t t, Vec p) { store(to + t, p); }
#if defined(APR_PAIRS)
inline void keep(uint32_t* to, int64_t t, int64_t width, Vec a, Vec b, bool both) {
#if defined(__AVX512BF16__)
  const Vec second = both ? b : Vec{};
  store(to + t / 2 * width, interleaved(__m512i(_mm512_cvtne2ps_pbh(__m512(second), __m512(a)))));
#else
  uint16_t first[kWidth], second[kWidth];
  BFloat16::put(first, a);
  BFloat16::put(second, b);
  store(to + t / 2 * width, interleave(first, both ? second : nullptr));
#endif
}
inline void keep_row(uint32_t* to, int64_t t, Vec p) {
  BFloat16::put(reinterpret_cast<uint16_t*>(to) + t, p);
}
#endif

}  // namespace
}  // namespace apr::cpu::APR_ISA
