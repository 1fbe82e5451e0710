// Many query rows: rows are the lanes. S = K Qᵀ and O += Vᵀ P are one micro-kernel that reads K and
// V as they lie; softmax is vertical. Lanes are cut into panels of 32, whose queries, scores and
// sums stay in the nearest caches while a tile of tokens passes.
#pragma once

#include "kernels/cpu/codes.h"
#include "kernels/cpu/products.h"
#include "kernels/cpu/softmax.h"

namespace apr::cpu::APR_ISA {
namespace {

constexpr int64_t kPanel = 32;

// `width` lanes from `first` on, of which `lanes` are real.
struct Panel {
  int64_t first, lanes, width;
};

inline Panel panel_at(const TileJob& job, int64_t first) {
  const int64_t left = job.lanes - first;
  const int64_t lanes = left < kPanel ? left : kPanel;
  return {first, lanes, round_up(lanes, kWidth)};
}

// C[i][:] (+)= sum_k A[i * si + k * sk] * B[k][:], kRows by kCols vectors held in registers; B and
// C have `width` lanes a row. Without `accumulate` the result is scaled by `factor`.
template <class P, int kRows, int kCols, bool kAccumulate>
inline void block(int64_t depth, const typename P::Element* a, int64_t si, int64_t sk,
                  const typename P::Element* b, float* c, int64_t width, float factor) {
  Vec s[kRows][kCols];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j)
      s[i][j] = kAccumulate ? load(c + i * width + j * kWidth) : Vec{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    typename P::Operand x[kCols];
    for (int j = 0; j < kCols; ++j) x[j] = load(b + k * width + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename P::Operand y = P::spread(a[i * si + k * sk]);
      for (int j = 0; j < kCols; ++j) s[i][j] = P::add(s[i][j], y, x[j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j)
      store(c + i * width + j * kWidth, kAccumulate ? s[i][j] : s[i][j] * factor);
}

template <class P, int kRows, int kCols, bool kAccumulate>
inline void stripe(int64_t rows, int64_t depth, const typename P::Element* a, int64_t si,
                   int64_t sk, const typename P::Element* b, float* c, int64_t width, float factor,
                   const Ahead& ahead) {
  const int64_t step = ahead.step(rows / kRows);
  int64_t i = 0;
  for (int64_t at = 0; i + kRows <= rows; i += kRows, at += step) {
    ahead.fetch(at, step);
    block<P, kRows, kCols, kAccumulate>(depth, a + i * si, si, sk, b, c + i * width, width, factor);
  }
  if constexpr (kRows > 1) {
    if (i < rows)
      stripe<P, kRows / 2, kCols, kAccumulate>(rows - i, depth, a + i * si, si, sk, b,
                                               c + i * width, width, factor, Ahead{});
  }
}

template <class P, bool kAccumulate>
inline void product(int64_t rows, int64_t depth, const typename P::Element* a, int64_t si,
                    int64_t sk, const typename P::Element* b, float* c, int64_t width, float factor,
                    const Ahead& ahead) {
  constexpr Ahead kNothing{nullptr, 0};
  // One vector wide, rows of floats come from memory faster in small bites, pairs in large ones.
  constexpr int kNarrow = P::kUnit == 1 ? kAccumulators / 2 : kAccumulators;
  constexpr int kWide = kAccumulators == 16 ? 8 : 6;
  int64_t j = 0;
  for (; j + 2 * kWidth <= width; j += 2 * kWidth)
    stripe<P, kWide, 2, kAccumulate>(rows, depth, a, si, sk, b + j, c + j, width, factor,
                                     j == 0 ? ahead : kNothing);
  for (; j < width; j += kWidth)
    stripe<P, kNarrow, 1, kAccumulate>(rows, depth, a, si, sk, b + j, c + j, width, factor,
                                       j == 0 ? ahead : kNothing);
}

// Lanes that do not see a token get -inf. `slot` is the slot of the tile's first token.
inline void mask(const TileJob& job, const Panel& p, int64_t slot, int64_t tokens, float* scores) {
  const Vec hidden = spread(-__builtin_inff());
  for (int64_t j = 0; j < p.width; j += kWidth) {
    const VecInt lo = load(job.lane_lo + p.first + j), hi = load(job.lane_hi + p.first + j);
    for (int64_t t = 0; t < tokens; ++t) {
      const VecInt at = VecInt{} + int32_t(slot + t);
      float* s = scores + t * p.width + j;
      store(s, ((at >= lo) & (at < hi)) ? load(s) : hidden);
    }
  }
}

inline void cap(const TileJob& job, int64_t count, float* scores) {
  const float to_base_2 = job.softcap * kLog2e;
  for (int64_t i = 0; i < count; i += kWidth) store(scores + i, tanh(load(scores + i)) * to_base_2);
}

// The highest of `old` and of a column of scores, four maxima at a time: one would wait for itself.
inline Vec highest_of(const float* column, int64_t tokens, int64_t width, Vec old) {
  Vec top[4] = {old, old, old, old};
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4)
    for (int i = 0; i < 4; ++i) top[i] = maximum(load(column + (t + i) * width), top[i]);
  for (; t < tokens; ++t) top[0] = maximum(load(column + t * width), top[0]);
  return maximum(maximum(top[0], top[1]), maximum(top[2], top[3]));
}

// Scores [tokens, width] become probabilities; where the maximum of a lane grows, `rescale` is
// given the first lane of its vector and what older sums of values are to be multiplied with. The
// sum of probabilities is that of the unrounded ones, for an exact log-sum-exp.
template <class Element, class Rescale>
inline void softmax(const TileJob& job, const Panel& p, int64_t tokens, const float* scores,
                    Element* probabilities, const Ahead& ahead, const Rescale& rescale) {
  const int64_t step = ahead.step(tokens / 2);
  for (int64_t j = 0; j < p.width; j += kWidth) {
    const float* column = scores + j;
    const Vec old = load(job.max + p.first + j);
    Vec sum = {};
    const Vec top = highest_of(column, tokens, p.width, old);
    for (int64_t t = 0; t < tokens; t += 2) {
      if (j == 0) ahead.fetch(t / 2 * step, step);
      const bool both = t + 1 < tokens;
      const Vec a = exp2(load(column + t * p.width) - top);
      const Vec b = both ? exp2(load(column + (t + 1) * p.width) - top) : Vec{};
      sum += a;
      sum += b;
      keep(probabilities + j, t, p.width, a, b, both);
    }
    float* total = job.sum + p.first + j;
    if (any(top != old)) {
      Vec max = old, all = load(total);
      const Vec fix = advance(max, all, top, sum);
      store(job.max + p.first + j, max);
      store(total, all);
      rescale(j, fix);
    } else {  // nothing moves, as it mostly is
      store(total, load(total) + sum);
    }
  }
}

// Tokens of the tile that starts at `slot`. Tiles start at multiples of kTile, so that a row's bits
// do not depend on where its item does.
inline int64_t tile_tokens(const TileJob& job, int64_t slot) {
  const int64_t within = slot % job.page_size;
  int64_t tokens = kTile - within % kTile;
  if (tokens > job.page_size - within) tokens = job.page_size - within;
  return tokens < job.end - slot ? tokens : job.end - slot;
}

// Tokens at the start of a tile that lie before the item and are seen by nobody.
inline int64_t unseen_tokens(const TileJob& job, int64_t slot, int64_t tokens) {
  const int64_t before = job.begin > slot ? job.begin - slot : 0;
  return before < tokens ? before : tokens;
}

struct Tile {
  const char* k;
  const char* v;
  Ahead next_k, next_v;
};

// Keys and values as rows of T, whatever the pool stores.
template <class T>
inline Tile tile_at(const TileJob& job, int64_t slot, int64_t tokens) {
  const int64_t size = job.codes == Codes::kNone ? int64_t{sizeof(typename T::Storage)} : 1;
  const auto k = [&](int64_t at) {
    return job.k + job.pages[at / job.page_size] * job.page_bytes_k +
           at % job.page_size * job.head_dim_k * size;
  };
  const auto v = [&](int64_t at) {
    return job.v + job.pages[at / job.page_size] * job.page_bytes_v +
           at % job.page_size * job.head_dim_v * size;
  };
  Tile tile{k(slot), v(slot), {nullptr, 0}, {nullptr, 0}};
  if (slot ==
      job.begin) {  // nobody fetched the first tile: its keys come now, its values meanwhile
    const int64_t bytes = tokens * job.head_dim_v * size;
    Ahead{tile.v, bytes}.fetch(0, bytes);
  }
  const int64_t next = slot + tokens;
  if (next < job.end) {
    const int64_t count = tile_tokens(job, next);
    tile.next_k = {k(next), count * job.head_dim_k * size};
    tile.next_v = {v(next), count * job.head_dim_v * size};
  }
  if (job.codes != Codes::kNone) {
    const int64_t first = job.pages[slot / job.page_size] * job.page_rows + slot % job.page_size;
    char* values = job.decoded + kTile * job.head_dim_k * int64_t{sizeof(typename T::Storage)};
    tile.k = decode<T>(job.codes, tile.k, job.k_scales + first * code_groups(job.head_dim_k),
                       tokens, job.head_dim_k, job.decoded);
    tile.v = decode<T>(job.codes, tile.v, job.v_scales + first * code_groups(job.head_dim_v),
                       tokens, job.head_dim_v, values);
  }
  return tile;
}

template <class T, class P>
inline void attend_panels(const TileJob& job) {
  typedef typename P::Element Element;
  const int64_t dim_k = job.head_dim_k, dim_v = job.head_dim_v;
  const int64_t padded = round_up(job.lanes, kWidth);
  const int64_t units = dim_k / P::kUnit;
  Element* queries = reinterpret_cast<Element*>(job.scratch);
  float* out = reinterpret_cast<float*>(queries + padded * units);
  float* scores = out + padded * dim_v;
  Element* probabilities = reinterpret_cast<Element*>(scores);
  Element* wide_keys = reinterpret_cast<Element*>(scores + kTile * kPanel);
  Element* wide_values = wide_keys + kTile * dim_k;
  for (int64_t i = 0; i < padded * dim_v; ++i) out[i] = 0.f;
  const Element* rows = P::queries(job.q, job.lanes * dim_k, reinterpret_cast<Element*>(scores));
  for (int64_t j = 0; j < job.lanes; j += kPanel) {
    const Panel p = panel_at(job, j);
    transpose(reinterpret_cast<const float*>(rows + j * units), units, p.lanes, p.width, units,
              reinterpret_cast<float*>(queries + j * units), p.width);
  }

  for (int64_t slot = P::first_slot(job), tokens; slot < job.end; slot += tokens) {
    tokens = tile_tokens(job, slot);
    const Tile tile = tile_at<T>(job, slot, tokens);
    const bool masked = slot < job.all_lo || slot + tokens > job.all_hi;
    const Element* keys = P::keys(tile.k, tokens, dim_k, wide_keys);
    const Element* values =
        P::values(tile.v, tokens, unseen_tokens(job, slot, tokens), dim_v, wide_values, Ahead{});
    for (int64_t j = 0; j < job.lanes; j += kPanel) {
      const Panel p = panel_at(job, j);
      product<P, false>(tokens, units, keys, units, 1, queries + j * units, scores, p.width,
                        job.factor, j == 0 ? tile.next_k : Ahead{});
      if (job.softcap != 0.f) cap(job, tokens * p.width, scores);
      if (masked) mask(job, p, slot, tokens, scores);
      float* sums = out + j * dim_v;  // [dim_v, width]
      softmax(job, p, tokens, scores, probabilities, Ahead{}, [&](int64_t lane, Vec fix) {
        for (int64_t d = 0; d < dim_v; ++d)
          store(sums + d * p.width + lane, load(sums + d * p.width + lane) * fix);
      });
      product<P, true>(dim_v, (tokens + P::kUnit - 1) / P::kUnit, values, 1, dim_v, probabilities,
                       sums, p.width, 1.f, j == 0 ? tile.next_v : Ahead{});
    }
  }
  for (int64_t j = 0; j < job.lanes; j += kPanel) {
    const Panel p = panel_at(job, j);
    transpose(out + j * dim_v, p.width, dim_v, dim_v, p.lanes, job.out + j * dim_v, dim_v);
  }
}

}  // namespace
}  // namespace apr::cpu::APR_ISA
