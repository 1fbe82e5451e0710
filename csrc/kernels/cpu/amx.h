// Many query rows in bfloat16 on the matrix unit (AMX). S^T = K Q^T reads K as it lies; O = P V
// needs V in pairs of tokens and P with lanes as rows. Tiles are 16 rows of 64 bytes.
#pragma once

#include "kernels/cpu/panels.h"

// The unit's operations take literal tile numbers. Without the unit they run on memory, so that the
// kernel below is executed by the tests of any machine.
#if defined(__AMX_BF16__)
// GCC's intrinsics do not say that they read memory, so stores before them could be moved behind.
#define APR_TILE_LOAD(tile, from, stride) \
  do {                                    \
    __asm__ volatile("" : : : "memory");  \
    _tile_loadd(tile, from, stride);      \
  } while (false)
#define APR_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define APR_TILE_ZERO(tile) _tile_zero(tile)
#define APR_TILE_DOT(sum, a, b) _tile_dpbf16ps(sum, a, b)
#else
#define APR_TILE_LOAD(tile, from, stride) emulated.load(tile, from, stride)
#define APR_TILE_STORE(tile, to, stride) emulated.store(tile, to, stride)
#define APR_TILE_ZERO(tile) emulated.zero(tile)
#define APR_TILE_DOT(sum, a, b) emulated.dot(sum, a, b)
#endif

namespace apr::cpu::APR_ISA {
namespace {

constexpr int64_t kTileRows = 16;

#if !defined(__AMX_BF16__)
// The eight tiles as memory. An operation without configuration traps, as it does on the unit.
struct EmulatedTiles {
  alignas(64) float tile[8][kTileRows][16];
  bool configured = false;

  float* at(int number) {
    if (!configured) __builtin_trap();
    return tile[number][0];
  }
  void load(int number, const void* from, int64_t stride) {
    for (int64_t r = 0; r < kTileRows; ++r)
      __builtin_memcpy(at(number) + r * 16, static_cast<const char*>(from) + r * stride, 64);
  }
  void store(int number, void* to, int64_t stride) {
    for (int64_t r = 0; r < kTileRows; ++r)
      __builtin_memcpy(static_cast<char*>(to) + r * stride, at(number) + r * 16, 64);
  }
  static uint32_t bits(const float* p) {
    uint32_t u;
    __builtin_memcpy(&u, p, 4);
    return u;
  }
  void zero(int number) { __builtin_memset(at(number), 0, sizeof(tile[0])); }
  // sum[m][n] += the sums over k of a[m][k] * b[k][n], of even and of odd numbers.
  void dot(int sum, int a, int b) {
    for (int64_t m = 0; m < kTileRows; ++m) {
      for (int64_t n = 0; n < 16; n += kWidth) {
        Vec even = {}, odd = {};
        for (int64_t k = 0; k < 16; ++k) {
          const VecBits x = VecBits{} + bits(at(a) + m * 16 + k);
          const VecBits y = VecBits(apr::cpu::APR_ISA::load(at(b) + k * 16 + n));
          even += Pairs::flushed(x << 16) * Pairs::flushed(y << 16);
          odd += Pairs::flushed(x & 0xffff0000u) * Pairs::flushed(y & 0xffff0000u);
        }
        float* to = at(sum) + m * 16 + n;
        apr::cpu::APR_ISA::store(to, apr::cpu::APR_ISA::load(to) + (even + odd));
      }
    }
  }
};
thread_local EmulatedTiles emulated;
#endif

// Configures the unit for one job. oneDNN and MKL configure and release it on these threads too, so
// nothing may be remembered from job to job: a tile operation without configuration is an illegal
// instruction.
class TileScope {
 public:
#if defined(__AMX_BF16__)
  TileScope() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;  // bytes of a row
      config[48 + i] = kTileRows;
    }
    __asm__ volatile("" : : "r"(config) : "memory");  // see APR_TILE_LOAD
    _tile_loadconfig(config);
  }
  ~TileScope() { _tile_release(); }
#else
  TileScope() { emulated.configured = true; }
  ~TileScope() { emulated.configured = false; }
#endif
};

inline bool fits_matrix(const TileJob& job) {
  return job.head_dim_k % 32 == 0 && job.head_dim_v % 32 == 0;
}

// `tokens` rows of K, followed by zeros up to a whole tile where there are fewer.
inline const char* whole_tile(const char* k, int64_t tokens, int64_t row_bytes, void* padded) {
  if (tokens == kTile) return k;
  __builtin_memcpy(padded, k, tokens * row_bytes);
  __builtin_memset(static_cast<char*>(padded) + tokens * row_bytes, 0,
                   (kTile - tokens) * row_bytes);
  return static_cast<const char*>(padded);
}

// scores [kTile, 16] = factor * K Q^T for one group of 16 lanes; queries [dim / 2, 16] pairs.
inline void matrix_scores(const char* k, int64_t tokens, int64_t dim, const uint32_t* queries,
                          float factor, float* scores) {
  APR_TILE_ZERO(0);
  APR_TILE_ZERO(1);
  APR_TILE_ZERO(2);
  APR_TILE_ZERO(3);
  const int64_t row = dim * 2;
  for (int64_t d = 0; d < dim; d += 32, k += 64, queries += 16 * 16) {
    APR_TILE_LOAD(4, queries, 64);
    APR_TILE_LOAD(5, k, row);
    APR_TILE_DOT(0, 5, 4);
    APR_TILE_LOAD(6, k + 16 * row, row);
    APR_TILE_DOT(1, 6, 4);
    APR_TILE_LOAD(7, k + 32 * row, row);
    APR_TILE_DOT(2, 7, 4);
    APR_TILE_LOAD(5, k + 48 * row, row);
    APR_TILE_DOT(3, 5, 4);
  }
  APR_TILE_STORE(0, scores, 64);
  APR_TILE_STORE(1, scores + 16 * 16, 64);
  APR_TILE_STORE(2, scores + 32 * 16, 64);
  APR_TILE_STORE(3, scores + 48 * 16, 64);
  for (int64_t i = 0; i < tokens * 16; i += kWidth) store(scores + i, load(scores + i) * factor);
}

// 16 lanes by kColumns (2 or 4) tiles of columns of `out` += P V; tiles 4 and 5 hold P. Four sums
// in flight hide the latency of a product, which takes longer than three others.
template <int kColumns>
inline void matrix_columns(const uint32_t* values, int64_t dim, float* out) {
  const int64_t row = dim * 4;
  const uint32_t* later = values + 16 * dim;
  APR_TILE_LOAD(0, out, row);
  APR_TILE_LOAD(1, out + 16, row);
  if constexpr (kColumns == 4) {
    APR_TILE_LOAD(2, out + 32, row);
    APR_TILE_LOAD(3, out + 48, row);
  }
  APR_TILE_LOAD(6, values, row);
  APR_TILE_DOT(0, 4, 6);
  APR_TILE_LOAD(7, values + 16, row);
  APR_TILE_DOT(1, 4, 7);
  if constexpr (kColumns == 4) {
    APR_TILE_LOAD(6, values + 32, row);
    APR_TILE_DOT(2, 4, 6);
    APR_TILE_LOAD(7, values + 48, row);
    APR_TILE_DOT(3, 4, 7);
  }
  APR_TILE_LOAD(6, later, row);
  APR_TILE_DOT(0, 5, 6);
  APR_TILE_LOAD(7, later + 16, row);
  APR_TILE_DOT(1, 5, 7);
  if constexpr (kColumns == 4) {
    APR_TILE_LOAD(6, later + 32, row);
    APR_TILE_DOT(2, 5, 6);
    APR_TILE_LOAD(7, later + 48, row);
    APR_TILE_DOT(3, 5, 7);
  }
  APR_TILE_STORE(0, out, row);
  APR_TILE_STORE(1, out + 16, row);
  if constexpr (kColumns == 4) {
    APR_TILE_STORE(2, out + 32, row);
    APR_TILE_STORE(3, out + 48, row);
  }
}

// out [16 lanes, dim] += P V; probabilities are two tiles of [16 lanes, 16 pairs of tokens], values
// [kTile / 2, dim] pairs.
inline void matrix_values(const uint32_t* probabilities, const uint32_t* values, int64_t dim,
                          float* out) {
  APR_TILE_LOAD(4, probabilities, 64);
  APR_TILE_LOAD(5, probabilities + 256, 64);
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64) matrix_columns<4>(values + d, dim, out + d);
  if (d < dim) matrix_columns<2>(values + d, dim, out + d);
}

void attend_matrix(const TileJob& job) {
  const int64_t dim_k = job.head_dim_k, dim_v = job.head_dim_v, units = dim_k / 2;
  const int64_t padded = round_up(job.lanes, kTileRows);
  auto* queries = reinterpret_cast<uint32_t*>(job.scratch);  // by 16 lanes: [units, 16]
  uint32_t* rows = queries + padded * units;
  float* out = job.scratch + padded * dim_k;  // [lanes, dim_v]
  float* scores = out + padded * dim_v;       // [kTile, 16]; then probabilities [kTile / 2, 16]
  auto* probabilities = reinterpret_cast<uint32_t*>(scores);
  auto* turned = reinterpret_cast<uint32_t*>(scores + kTile * 16);  // 2 x [16 lanes, 16 pairs]
  uint32_t* values = turned + kTile / 2 * 16;                       // [kTile / 2, dim_v]
  uint32_t* tail = values + kTile / 2 * dim_v;                      // [kTile, units]
  const TileScope scope;
  Pairs::queries(job.q, padded * dim_k, rows);
  for (int64_t j = 0; j < padded; j += 16)
    transpose(reinterpret_cast<const float*>(rows + j * units), units, 16, 16, units,
              reinterpret_cast<float*>(queries + j * units), 16);
  for (int64_t i = 0; i < padded * dim_v; ++i) out[i] = 0.f;

  for (int64_t slot = Pairs::first_slot(job), tokens; slot < job.end; slot += tokens) {
    tokens = tile_tokens(job, slot);
    const Tile tile = tile_at<BFloat16>(job, slot, tokens);
    const bool masked = slot < job.all_lo || slot + tokens > job.all_hi;
    const int64_t pairs = (tokens + 1) / 2;
    const char* k = whole_tile(tile.k, tokens, dim_k * 2, tail);
    Pairs::values(tile.v, tokens, unseen_tokens(job, slot, tokens), dim_v, values, tile.next_k);
    for (int64_t i = pairs * dim_v; i < kTile / 2 * dim_v; ++i) values[i] = 0;
    for (int64_t j = 0; j < job.lanes; j += 16) {
      const Panel p{j, job.lanes - j < 16 ? job.lanes - j : 16, 16};
      matrix_scores(k, tokens, dim_k, queries + j * units, job.factor, scores);
      if (job.softcap != 0.f) cap(job, tokens * 16, scores);
      if (masked) mask(job, p, slot, tokens, scores);
      const Ahead ahead = j == 0 ? tile.next_v : Ahead{};
      softmax(job, p, tokens, scores, probabilities, ahead, [&](int64_t lane, Vec fix) {
        for (int64_t l = 0; l < kWidth; ++l) {
          float* o = out + (j + lane + l) * dim_v;
          if (fix[l] == 1.f) continue;
          for (int64_t d = 0; d < dim_v; d += kWidth) store(o + d, load(o + d) * fix[l]);
        }
      });
      for (int64_t i = pairs * 16; i < kTile / 2 * 16; ++i) probabilities[i] = 0;
      for (int64_t h = 0; h < 2; ++h)
        transpose(reinterpret_cast<const float*>(probabilities + h * 256), 16, 16, 16, 16,
                  reinterpret_cast<float*>(turned + h * 256), 16);
      matrix_values(turned, values, dim_v, out + j * dim_v);
    }
  }
  for (int64_t i = 0; i < job.lanes * dim_v; ++i) job.out[i] = out[i];
}

}  // namespace
}  // namespace apr::cpu::APR_ISA
