// Few query rows (up to 8): dimensions are the lanes, so that no lane is padding. Scores are dot
// products summed across lanes, many at a time; O += P V takes V as it lies.
#pragma once

#include "kernels/cpu/panels.h"

namespace apr::cpu::APR_ISA {
namespace {

constexpr int64_t kMostFew = 8;

// Scores [kRows, kTile] of kTokens keys from `k` on; queries [kRows, dim / unit].
template <class P, int kRows, int kTokens>
inline void few_scores(int64_t dim, const char* k, int64_t row_bytes,
                       const typename P::Element* queries, float factor, float* scores) {
  constexpr int kSums = kRows * kTokens;
  constexpr int kVectors = (kSums + kWidth - 1) / kWidth;
  Vec s[kVectors * kWidth] = {};
  for (int64_t d = 0; d < dim; d += kWidth * P::kUnit) {
    typename P::Operand key[kTokens];
    for (int t = 0; t < kTokens; ++t) key[t] = P::key(k + t * row_bytes, d);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename P::Operand q = load(queries + (r * dim + d) / P::kUnit);
      for (int t = 0; t < kTokens; ++t) s[r * kTokens + t] = P::add(s[r * kTokens + t], key[t], q);
    }
  }
  for (int i = 0; i < kVectors; ++i) {
    Vec part[kWidth];
    for (int j = 0; j < kWidth; ++j) part[j] = s[i * kWidth + j];
    float sums[kWidth];
    store(sums, sums_of(part) * factor);
    for (int j = 0; j < kWidth && i * kWidth + j < kSums; ++j) {
      const int at = i * kWidth + j;
      scores[at / kTokens * kTile + at % kTokens] = sums[j];
    }
  }
}

// Scores of one row's tokens become probabilities; returns what its older sums are to be multiplied
// with.
template <class Element>
inline float few_softmax(int64_t tokens, float* scores, Element* probabilities, float* max,
                         float* sum) {
  const int64_t padded = round_up(tokens, kWidth);
  for (int64_t t = tokens; t < padded; ++t) scores[t] = -__builtin_inff();
  Vec tops = spread(*max), sums = {};
  for (int64_t t = 0; t < padded; t += kWidth) tops = maximum(load(scores + t), tops);
  const float top = highest(tops);
  for (int64_t t = 0; t < padded; t += kWidth) {
    const Vec p = exp2(load(scores + t) - top);
    sums += p;
    keep_row(probabilities, t, p);
  }
  return advance(*max, *sum, top, total(sums));
}

// out [kRows, dim] = fix * out + P V, for kCols vectors of dimensions from `d` on.
template <class P, int kRows, int kCols>
inline void few_values(int64_t tokens, const char* v, int64_t row_bytes, int64_t dim, int64_t d,
                       const typename P::Element* probabilities, const float* fix, float* out,
                       const Ahead& ahead) {
  Vec s[kRows][kCols];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCols; ++c) s[r][c] = load(out + r * dim + d + c * kWidth) * fix[r];
  const auto add = [&](int64_t t, const char* row, const char* next) {
    typename P::Operand x[kCols];
    for (int c = 0; c < kCols; ++c) x[c] = P::value(row, next, d + c * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename P::Operand y = P::spread(probabilities[r * kTile + t / P::kUnit]);
      for (int c = 0; c < kCols; ++c) s[r][c] = P::add(s[r][c], y, x[c]);
    }
  };
  const int64_t step = ahead.step(tokens / P::kUnit);
  int64_t t = 0;
  for (int64_t at = 0; t + P::kUnit <= tokens; t += P::kUnit, at += step) {
    ahead.fetch(at, step);
    add(t, v, v + row_bytes);
    v += P::kUnit * row_bytes;
  }
  if (t < tokens) add(t, v, nullptr);
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCols; ++c) store(out + r * dim + d + c * kWidth, s[r][c]);
}

inline void few_mask(const TileJob& job, int64_t slot, int64_t tokens, float* scores) {
  for (int64_t r = 0; r < job.lanes; ++r)
    for (int64_t t = 0; t < tokens; ++t)
      if (slot + t < job.lane_lo[r] || slot + t >= job.lane_hi[r])
        scores[r * kTile + t] = -__builtin_inff();
}

// kRows >= job.lanes; the rows beyond are the zeros of the padding, and dropped.
template <class T, class P, int kRows>
void attend_few_rows(const TileJob& job) {
  typedef typename P::Element Element;
  constexpr int kTokens = kAccumulators / kRows;
  constexpr int kCols = kRows == 1 ? kAccumulators / 2 : kAccumulators / kRows;
  const int64_t size = sizeof(typename T::Storage);
  const int64_t dim_k = job.head_dim_k, dim_v = job.head_dim_v;
  const Element* queries =
      P::queries(job.q, kRows * dim_k, reinterpret_cast<Element*>(job.scratch));
  float* out = job.scratch + kRows * dim_k;
  float* scores = out + kRows * dim_v;
  Element* probabilities = reinterpret_cast<Element*>(scores);
  float max[kRows], sum[kRows] = {}, fix[kRows];
  for (int r = 0; r < kRows; ++r) max[r] = kNoScore;
  for (int64_t i = 0; i < kRows * dim_v; ++i) out[i] = 0.f;

  for (int64_t slot = job.begin, tokens; slot < job.end; slot += tokens) {
    tokens = tile_tokens(job, slot);
    const Tile tile = tile_at<T>(job, slot, tokens);
    int64_t t = 0;
    const int64_t step = tile.next_k.step(tokens / kTokens);
    for (int64_t at = 0; t + kTokens <= tokens; t += kTokens, at += step) {
      tile.next_k.fetch(at, step);
      few_scores<P, kRows, kTokens>(dim_k, tile.k + t * dim_k * size, dim_k * size, queries,
                                    job.factor, scores + t);
    }
    for (; t < tokens; ++t)
      few_scores<P, kRows, 1>(dim_k, tile.k + t * dim_k * size, dim_k * size, queries, job.factor,
                              scores + t);
    if (job.softcap != 0.f) cap(job, kRows * kTile, scores);
    if (slot < job.all_lo || slot + tokens > job.all_hi) few_mask(job, slot, tokens, scores);
    for (int r = 0; r < kRows; ++r)
      fix[r] = few_softmax(tokens, scores + r * kTile, probabilities + r * kTile, max + r, sum + r);
    int64_t d = 0;
    for (; d + kCols * kWidth <= dim_v; d += kCols * kWidth)
      few_values<P, kRows, kCols>(tokens, tile.v, dim_v * size, dim_v, d, probabilities, fix, out,
                                  d == 0 ? tile.next_v : Ahead{});
    for (; d < dim_v; d += kWidth)
      few_values<P, kRows, 1>(tokens, tile.v, dim_v * size, dim_v, d, probabilities, fix, out,
                              d == 0 ? tile.next_v : Ahead{});
  }
  for (int64_t r = 0; r < job.lanes; ++r) {
    job.max[r] = max[r];
    job.sum[r] = sum[r];
    for (int64_t d = 0; d < dim_v; ++d) job.out[r * dim_v + d] = out[r * dim_v + d];
  }
}

template <class P>
inline bool is_few(const TileJob& job) {
  return job.lanes <= kMostFew && !job.pinned && job.head_dim_k % (kWidth * P::kUnit) == 0 &&
         job.head_dim_v % kWidth == 0;
}

template <class T, class P>
inline void attend_few(const TileJob& job) {
  if (job.lanes == 1) return attend_few_rows<T, P, 1>(job);
  if (job.lanes == 2) return attend_few_rows<T, P, 2>(job);
  if (job.lanes <= 4) return attend_few_rows<T, P, 4>(job);
  attend_few_rows<T, P, 8>(job);
}

}  // namespace
}  // namespace apr::cpu::APR_ISA
