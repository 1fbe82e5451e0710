// The inner loops, compiled once per instruction set (APR_ISA). No standard-library templates here:
// their inline code would be merged with other objects' and could run on a machine that lacks it.
#include "kernels/cpu/kernels.h"

namespace apr::cpu::APR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecInt __attribute__((vector_size(4 * kWidth)));
typedef uint32_t VecBits __attribute__((vector_size(4 * kWidth)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));
typedef float VecLoose __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// 2^x for x <= 0, relative error about 2e-7; exactly 0 below -126, NaN stays NaN.
inline Vec exp2(Vec x) {
  const Vec y = maximum(x, Vec{} - 126.f);
  const Vec n = (y + 12582912.f) - 12582912.f;
  const Vec f = y - n;
  Vec p = Vec{} + 1.5353362e-4f;
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.f;
  const Vec r = Vec(VecInt(p) + (__builtin_convertvector(n, VecInt) << 23));
  const Vec cut = x < -126.f ? Vec{} : r;
  return x == x ? cut : x;
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

// C[i][:] (+)= sum_k A[i * si + k * sk] * B[k][:], kRows by kCols vectors held in registers.
template <int kRows, int kCols>
inline void block(int64_t depth, const float* a, int64_t si, int64_t sk, const float* b, float* c,
                  int64_t ld, bool accumulate) {
  Vec s[kRows][kCols];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) s[i][j] = accumulate ? load(c + i * ld + j * kWidth) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec x[kCols];
    for (int j = 0; j < kCols; ++j) x[j] = load(b + k * ld + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float y = a[i * si + k * sk];
      for (int j = 0; j < kCols; ++j) s[i][j] += y * x[j];
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) store(c + i * ld + j * kWidth, s[i][j]);
}

template <int kRows, int kCols>
inline void panel(int64_t rows, int64_t depth, const float* a, int64_t si, int64_t sk,
                  const float* b, float* c, int64_t ld, bool accumulate) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    block<kRows, kCols>(depth, a + i * si, si, sk, b, c + i * ld, ld, accumulate);
  for (; i < rows; ++i) block<1, kCols>(depth, a + i * si, si, sk, b, c + i * ld, ld, accumulate);
}

inline void gemm(int64_t rows, int64_t depth, const float* a, int64_t si, int64_t sk,
                 const float* b, float* c, int64_t ld, bool accumulate) {
  constexpr bool kManyRegisters = kWidth == 16;
  int64_t j = 0;
  for (; j + 2 * kWidth <= ld; j += 2 * kWidth)
    panel<kManyRegisters ? 8 : 4, 2>(rows, depth, a, si, sk, b + j, c + j, ld, accumulate);
  for (; j < ld; j += kWidth)
    panel<kManyRegisters ? 16 : 8, 1>(rows, depth, a, si, sk, b + j, c + j, ld, accumulate);
}

struct Float32 {
  typedef float Storage;
};
struct BFloat16 {
  typedef uint16_t Storage;
  static float one(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  }
  static Vec many(VecHalf x) { return Vec(__builtin_convertvector(x, VecBits) << 16); }
};
struct Float16 {
  typedef uint16_t Storage;
  // Exponent and mantissa move into place, a multiplication re-biases (subnormals come out right),
  // infinities and NaN get the full exponent back.
  static Vec many(VecHalf x) {
    const VecBits h = __builtin_convertvector(x, VecBits);
    const Vec scaled = Vec((h & 0x7fffu) << 13) * 0x1p112f;
    const VecBits special = VecBits((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return Vec(VecBits(scaled) | special | ((h & 0x8000u) << 16));
  }
  static float one(uint16_t x) {
    VecHalf v = {};
    v[0] = x;
    return many(v)[0];
  }
};

// One tile as floats, row by row; float pools are read in place.
inline const float* widen(Float32, const char* p, int64_t, int64_t, float*) {
  return reinterpret_cast<const float*>(p);
}
template <class T>
inline const float* widen(T, const char* p, int64_t tokens, int64_t dim, float* to) {
  const uint16_t* from = reinterpret_cast<const uint16_t*>(p);
  const int64_t count = tokens * dim;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth)
    *reinterpret_cast<VecLoose*>(to + i) = T::many(*reinterpret_cast<const VecHalf*>(from + i));
  for (; i < count; ++i) to[i] = T::one(from[i]);
  return to;
}

// Lanes that do not see a token get -inf. `slot` is the slot of the tile's first token.
inline void mask(const TileJob& job, int64_t slot, int64_t tokens) {
  const Vec hidden = Vec{} - __builtin_inff();
  for (int64_t j = 0; j < job.lanes; j += kWidth) {
    const VecInt lo = *reinterpret_cast<const VecInt*>(job.lane_lo + j);
    const VecInt hi = *reinterpret_cast<const VecInt*>(job.lane_hi + j);
    for (int64_t t = 0; t < tokens; ++t) {
      const VecInt at = VecInt{} + int32_t(slot + t);
      float* s = job.scores + t * job.lanes + j;
      store(s, (at >= lo) & (at < hi) ? load(s) : hidden);
    }
  }
}

inline void cap(const TileJob& job, int64_t tokens) {
  const float to_base_2 = job.softcap * 1.4426950408889634f;
  for (int64_t i = 0; i < tokens * job.lanes; i += kWidth)
    store(job.scores + i, tanh(load(job.scores + i)) * to_base_2);
}

// Scores become probabilities in place; older sums and outputs are rescaled to the new maximum.
inline void softmax(const TileJob& job, int64_t tokens) {
  const int64_t ld = job.lanes;
  for (int64_t j = 0; j < ld; j += kWidth) {
    const Vec old = load(job.max + j);
    Vec top = old, sum = {};
    for (int64_t t = 0; t < tokens; ++t) top = maximum(load(job.scores + t * ld + j), top);
    for (int64_t t = 0; t < tokens; ++t) {
      float* s = job.scores + t * ld + j;
      const Vec p = exp2(load(s) - top);
      store(s, p);
      sum += p;
    }
    const Vec fix = exp2(old - top);
    store(job.max + j, top);
    store(job.sum + j, load(job.sum + j) * fix + sum);
    for (int64_t d = 0; d < job.head_dim_v; ++d) {
      float* o = job.out + d * ld + j;
      store(o, load(o) * fix);
    }
  }
}

template <class T>
void attend(const TileJob& job) {
  const int64_t size = sizeof(typename T::Storage);
  for (int64_t j = 0; j < job.lanes; ++j) {
    job.max[j] = -1e30f;  // finite, so that a fully masked lane keeps sum 0 and makes no NaN
    job.sum[j] = 0.f;
  }
  for (int64_t i = 0; i < job.head_dim_v * job.lanes; ++i) job.out[i] = 0.f;
  for (int64_t slot = job.begin; slot < job.end;) {
    const int64_t page = job.pages[slot / job.page_size];
    const int64_t within = slot % job.page_size;
    // Tiles start at multiples of kTile, so that a row's bits do not depend on where its block
    // does.
    int64_t tokens = kTile - within % kTile;
    if (tokens > job.page_size - within) tokens = job.page_size - within;
    if (tokens > job.end - slot) tokens = job.end - slot;
    const char* k = job.k + page * job.page_bytes_k + within * job.head_dim_k * size;
    const char* v = job.v + page * job.page_bytes_v + within * job.head_dim_v * size;
    const float* wide = widen(T{}, k, tokens, job.head_dim_k, job.wide);
    gemm(tokens, job.head_dim_k, wide, job.head_dim_k, 1, job.q, job.scores, job.lanes, false);
    if (job.softcap != 0.f) cap(job, tokens);
    if (slot < job.all_lo || slot + tokens > job.all_hi) mask(job, slot, tokens);
    softmax(job, tokens);
    wide = widen(T{}, v, tokens, job.head_dim_v, job.wide);
    gemm(job.head_dim_v, tokens, wide, 1, job.head_dim_v, job.scores, job.out, job.lanes, true);
    slot += tokens;
  }
}

}  // namespace

#define APR_TEXT_(x) #x
#define APR_TEXT(x) APR_TEXT_(x)
extern const InstructionSet kTable;
const InstructionSet kTable = {APR_TEXT(APR_ISA),
                               {attend<Float32>, attend<BFloat16>, attend<Float16>}};

}  // namespace apr::cpu::APR_ISA
