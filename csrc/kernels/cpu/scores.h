// Passes over one row of scores, for drawing a token from it (draw.h has the arithmetic).
#pragma once

#include "kernels/cpu/vec.h"
#include "kernels/draw.h"

namespace apr::cpu::APR_ISA {
namespace {

inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return Vec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  return Vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  Vec r;
  for (int i = 0; i < kWidth; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}

inline VecInt truncated(Vec x) { return __builtin_convertvector(x, VecInt); }
inline Vec whole(VecInt x) { return __builtin_convertvector(x, Vec); }

// share_of() of draw.h, bit by bit.
inline Vec shares_of(Vec d) {
  const Vec n = fused(d, spread(kLog2e), spread(kRound)) - kRound;
  const Vec r = fused(n, spread(-kLn2Low), fused(n, spread(-kLn2High), d));
  Vec p = fused(fused(spread(kExp0), r, spread(kExp1)), r, spread(kExp2));
  p = fused(fused(fused(p, r, spread(kExp3)), r, spread(kExp4)), r, spread(kExp5));
  p = fused(p, r * r, r) + 1.f;
  const VecInt kept = d >= kLowest;
  return Vec((VecInt(p) + (truncated(kept ? n : Vec{}) << 23)) & kept);
}

// Both halves of weight_of().
struct Weights {
  VecInt high, low;
};
inline Weights weights_of(Vec share) {
  const Vec scaled = share * kHalfWeight;
  const VecInt high = truncated(scaled);
  return {high, truncated((scaled - whole(high)) * kHalfWeight)};
}
inline int64_t weight_at(const Weights& w, int i) { return int64_t(w.high[i]) << 20 | w.low[i]; }
inline int64_t sum_of(VecInt high, VecInt low) {
  int64_t sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += (int64_t(high[i]) << 20) + low[i];
  return sum;
}

// Scores [i, i + kWidth) as they are; -inf beyond the end.
template <class T>
inline Vec scores_at(const ScoreRow& row, int64_t i) {
  const auto* data = static_cast<const typename T::Storage*>(row.data);
  if (i + kWidth <= row.count) return T::many(data + i);
  Vec x = spread(-__builtin_inff());
  for (int64_t j = i; j < row.count; ++j) x[j - i] = T::one(data[j]);
  return x;
}
// The same under the row's temperature.
template <class T>
inline Vec scaled_at(const ScoreRow& row, int64_t i) {
  return scores_at<T>(row, i) / row.temperature;
}

inline VecInt lanes() {
  VecInt all;
  for (int i = 0; i < kWidth; ++i) all[i] = i;
  return all;
}

inline Vec kept_shares(const ScoreRow& row, const Kept& kept, Vec x, int64_t i) {
  const VecInt at = lanes() + static_cast<int32_t>(i);
  const Vec shares = shares_of(x - row.top);
  const VecInt ties = (x == kept.least) & (at >= kept.first_tie);
  return Vec(VecInt(shares) & ((x > kept.least) | ties) & (shares >= kept.least_share));
}

// The highest score as it is, NaN where the row holds one; and the highest of each of
// score_groups(count) disjoint groups that are all of the row, -inf for an empty one.
template <class T>
float highest_score(const ScoreRow& row, float* groups) {
  Vec all = spread(-__builtin_inff()), odd = {};
  for (int64_t first = 0; first < row.count; first += kScoreGroup * kWidth) {
    const int64_t end = first + kScoreGroup * kWidth;
    Vec top = spread(-__builtin_inff());
    for (int64_t i = first; i < end && i < row.count; i += kWidth) {
      const Vec x = scores_at<T>(row, i);
      top = maximum(x, top);
      odd = x == x ? odd : x;
    }
    store(groups, top);
    groups += kWidth;
    all = maximum(top, all);
  }
  return any(odd != odd) ? __builtin_nanf("") : highest(all);
}

// The place of the first score that is `score`.
template <class T>
int64_t first_score(const ScoreRow& row, float score) {
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const uint32_t same = bits_of(scores_at<T>(row, i) == score);
    if (same != 0) return i + __builtin_ctz(same);
  }
  return -1;
}

// The place of the n-th last of those that are `score` under the temperature.
template <class T>
int64_t nth_last_score(const ScoreRow& row, float score, int64_t n) {
  for (int64_t i = (row.count - 1) / kWidth * kWidth; i >= 0; i -= kWidth) {
    const uint32_t same = bits_of(scaled_at<T>(row, i) == score);
    for (int j = kWidth - 1; same != 0 && j >= 0; --j)
      if ((same >> j & 1) != 0 && --n == 0) return i + j;
  }
  return -1;
}

// The sum of the weights of each kScoreBlock scores that are kept.
template <class T>
void weigh_scores(const ScoreRow& row, const Kept& kept, int64_t* blocks) {
  for (int64_t first = 0; first < row.count; first += kScoreBlock) {
    const int64_t end = first + kScoreBlock < row.count ? first + kScoreBlock : row.count;
    VecInt high = {}, low = {};
    for (int64_t i = first; i < end; i += kWidth) {
      const Vec x = scaled_at<T>(row, i);
      const Vec shares = kept.all ? shares_of(x - row.top) : kept_shares(row, kept, x, i);
      const Weights w = weights_of(shares);
      high += w.high;
      low += w.low;
    }
    *blocks++ = sum_of(high, low);
  }
}

// The sum of all weights at temperature 1; `moment`: the sum of share * (score - top).
template <class T>
int64_t weigh_all_scores(const ScoreRow& row, double& moment) {
  int64_t sum = 0;
  for (int64_t first = 0; first < row.count; first += kScoreBlock) {
    const int64_t end = first + kScoreBlock < row.count ? first + kScoreBlock : row.count;
    VecInt high = {}, low = {};
    Vec moments = {};
    for (int64_t i = first; i < end; i += kWidth) {
      // A distance of -inf would make NaN of a share of 0.
      const Vec below = maximum(scores_at<T>(row, i) - row.top, spread(2 * kLowest));
      const Vec shares = shares_of(below);
      const Weights w = weights_of(shares);
      high += w.high;
      low += w.low;
      moments += shares * below;
    }
    sum += sum_of(high, low);
    moment += total(moments);
  }
  return sum;
}

// The place in a block where the sum of kept weights passes `target`.
template <class T>
int64_t find_weight(const ScoreRow& row, const Kept& kept, int64_t block, int64_t target) {
  const int64_t first = block * kScoreBlock;
  for (int64_t i = first; i < row.count; i += kWidth) {
    const Weights w = weights_of(kept_shares(row, kept, scaled_at<T>(row, i), i));
    for (int j = 0; j < kWidth; ++j) {
      target -= weight_at(w, j);
      if (target < 0) return i + j;
    }
  }
  return -1;
}

inline VecInt bins_of(const ScoreRow& row, Vec x) {
  const Vec below = (row.top - x) * kBinsOfUnit;
  return truncated(below < float(kScoreBins - 1) ? below : spread(float(kScoreBins - 1)));
}

// Counts and weighs the scores from `floor` on; returns, where `all`, the sum of all weights.
template <class T>
int64_t bin_scores(const ScoreRow& row, float floor, bool all, ScoreBin* bins) {
  int64_t sum = 0;
  for (int64_t first = 0; first < row.count; first += kScoreBlock) {
    const int64_t end = first + kScoreBlock < row.count ? first + kScoreBlock : row.count;
    VecInt sum_high = {}, sum_low = {};
    for (int64_t i = first; i < end; i += kWidth) {
      const Vec x = scaled_at<T>(row, i);
      const uint32_t wanted = bits_of(x >= floor);
      if (wanted == 0 && !all) continue;
      const Weights w = weights_of(shares_of(x - row.top));
      sum_high += w.high;
      sum_low += w.low;
      if (wanted == 0) continue;
      int32_t bin[kWidth], high[kWidth], low[kWidth];
      store(bin, bins_of(row, x));
      store(high, w.high);
      store(low, w.low);
      const auto put = [&](int j) {
        ScoreBin& to = bins[bin[j]];
        to.mass += int64_t(high[j]) << 20 | low[j];
        ++to.count;
      };
      if (wanted == (1u << kWidth) - 1) {
#pragma GCC unroll 16
        for (int j = 0; j < kWidth; ++j) put(j);
      } else {
        for (uint32_t left = wanted; left != 0; left &= left - 1) put(__builtin_ctz(left));
      }
    }
    sum += sum_of(sum_high, sum_low);
  }
  return all ? sum : 0;
}

// Those of one bin.
template <class T>
void collect_scores(const ScoreRow& row, float floor, int32_t bin, Score* to) {
  for (int64_t i = 0; i < row.count; i += kWidth) {
    const Vec x = scaled_at<T>(row, i);
    uint32_t wanted = bits_of((bins_of(row, x) == bin) & (x >= floor));
    if (wanted == 0) continue;
    const Weights w = weights_of(shares_of(x - row.top));
    for (; wanted != 0; wanted &= wanted - 1) {
      const int j = __builtin_ctz(wanted);
      *to++ = {x[j], weight_at(w, j)};
    }
  }
}

template <class T>
constexpr ScorePasses score_passes() {
  return {highest_score<T>, first_score<T>, nth_last_score<T>, weigh_all_scores<T>,
          weigh_scores<T>,  find_weight<T>, bin_scores<T>,     collect_scores<T>};
}

}  // namespace
}  // namespace apr::cpu::APR_ISA
