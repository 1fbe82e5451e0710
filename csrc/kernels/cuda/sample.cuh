// Draws a token from each row of scores: a block for each (draw.h has the arithmetic).
#pragma once

#include "kernels/cuda/primitives.cuh"
#include "kernels/cuda/work.h"
#include "kernels/draw.h"

namespace apr::APR_GPU {

inline constexpr int kSampleThreads = 512, kSampleWarps = kSampleThreads / 32;
inline constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
// Sums of the digits' weights, how many there are, and what warps tell each other.
inline constexpr int kSampleShared = kDigits * 12 + kSampleWarps * 8;

// Scores in the order of unsigned numbers, NaN above all.
APR_DEVICE uint32_t order_of(float x) {
  if (x != x) return 0xffffffffu;
  x += 0.f;  // -0 becomes 0
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}
APR_DEVICE float score_of(uint32_t order) {
  if (order == 0xffffffffu) order = 0xffc00000u;
  const uint32_t bits = order ^ (order >> 31 != 0 ? 0x80000000u : 0xffffffffu);
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The scores of one row under a temperature, read by all threads of a block.
class ScoreRow {
 public:
  APR_DEVICE ScoreRow(const ScoreRows& scores, int row, int vocab, float temperature)
      : scores_(scores), first_(row * scores.stride), vocab_(vocab), temperature_(temperature) {
    uint32_t highest = 0;
    for (int i = thread_index(); i < vocab; i += kSampleThreads) {
      const uint32_t order = order_of(plain(i));
      highest = order > highest ? order : highest;
    }
    highest_ = reduce(highest, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
    top_ = score_of(highest_) / temperature;
  }

  APR_DEVICE bool can_be_drawn_from() const { return top_ - top_ == 0.f; }
  APR_DEVICE float scaled(int i) const { return plain(i) / temperature_; }
  APR_DEVICE float share(float scaled) const { return share_of(scaled - top_); }
  APR_DEVICE float top() const { return top_; }

  APR_DEVICE int likeliest() const {
    int first = INT32_MAX;
    for (int i = thread_index(); i < vocab_ && first == INT32_MAX; i += kSampleThreads) {
      if (order_of(plain(i)) == highest_) first = i;
    }
    return reduce(first, [](int a, int b) { return a < b ? a : b; });
  }

  APR_DEVICE float logprob(int token, int64_t sum) const {
    return static_cast<float>(scaled(token) - top_ - log(sum / kWholeWeight));
  }

  // The same on every thread, of a value of each.
  template <typename T, typename Both>
  APR_DEVICE static T reduce(T mine, Both both) {
    for (int by = 16; by > 0; by /= 2) mine = both(mine, shuffle_xor(mine, by));
    const auto all = told<T>();
    sync_block();
    if (thread_index() % 32 == 0) all[thread_index() / 32] = mine;
    sync_block();
    T result = all[0];
    for (int w = 1; w < kSampleWarps; ++w) result = both(result, all[w]);
    return result;
  }

  // The place where the sum of value(i), in the order of places, passes target(sum of all).
  template <typename Value, typename Target>
  APR_DEVICE int find(Value value, Target target_of) const {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const auto sums = told<int64_t>();
    int begin = 0, end = vocab_;
    int64_t target = -1;
    while (end - begin > 32 || target < 0) {
      const int part = ((end - begin + kSampleWarps - 1) / kSampleWarps + 31) / 32 * 32;
      const int first = begin + warp * part, last = first + part < end ? first + part : end;
      int64_t sum = 0;
      for (int i = first + lane; i < last; i += 32) sum += value(i);
      for (int by = 16; by > 0; by /= 2) sum += shuffle_xor(sum, by);
      sync_block();
      if (lane == 0) sums[warp] = sum;
      sync_block();
      if (target < 0) {
        int64_t all = 0;
        for (int w = 0; w < kSampleWarps; ++w) all += sums[w];
        target = target_of(all);
      }
      int w = 0;
      while (w + 1 < kSampleWarps && target >= sums[w]) target -= sums[w++];
      begin += w * part;
      end = begin + part < end ? begin + part : end;
    }
    int64_t upto = begin + lane < end ? value(begin + lane) : 0;
    for (int by = 1; by < 32; by *= 2) {
      const int64_t below = shuffle_up(upto, by);
      if (lane >= by) upto += below;
    }
    int passed = upto <= target ? 1 : 0;
    for (int by = 16; by > 0; by /= 2) passed += shuffle_xor(passed, by);
    return begin + passed;
  }

  // A beginning of the scores from the highest down.
  struct Prefix {
    uint32_t least;       // order of the lowest score of it
    int64_t ties, taken;  // scores that are equal to it, and how many of them are in
    int64_t mass;
  };

  // The shortest whose count (or, by mass, whose sum of weights) is `need` or more; by count with
  // all ties. Radix selection, digit after digit of the order.
  APR_DEVICE Prefix shortest_prefix(int64_t need, bool by_mass) const {
    const auto masses = shared_array<int64_t>(shared_address(shared_memory()));
    const auto counts = shared_array<int32_t>(shared_address(shared_memory()) + kDigits * 8);
    uint32_t known = 0;
    int64_t above = 0;
    for (int shift = 32 - kDigitBits;; shift = shift > kDigitBits ? shift - kDigitBits : 0) {
      const int bits = shift == 0 ? 32 - 2 * kDigitBits : kDigitBits;
      sync_block();
      for (int d = thread_index(); d < kDigits; d += kSampleThreads) masses[d] = counts[d] = 0;
      sync_block();
      for (int i = thread_index(); i < vocab_; i += kSampleThreads) {
        const float x = scaled(i);
        const uint32_t order = order_of(x);
        if (shift + bits < 32 && order >> (shift + bits) != known) continue;
        const auto digit = static_cast<int>(order >> shift & ((1u << bits) - 1));
        const int64_t weight = weight_of(share(x));
        if (weight != 0) add_atomically(masses[digit], weight);
        add_atomically(counts[digit], 1);
      }
      sync_block();
      // Every warp walks down the digits by itself: a lane 64 of them, then one by one.
      const int lane = thread_index() % 32, each = kDigits / 32;
      const auto size = [&](int d) { return by_mass ? masses[d] : int64_t{counts[d]}; };
      int64_t size_here = 0, mass_here = 0;
      for (int d = 0; d < each; ++d) {
        size_here += size(kDigits - 1 - lane * each - d);
        mass_here += masses[kDigits - 1 - lane * each - d];
      }
      int64_t size_upto = size_here, mass_upto = mass_here;
      for (int by = 1; by < 32; by *= 2) {
        const int64_t size_below = shuffle_up(size_upto, by);
        const int64_t mass_below = shuffle_up(mass_upto, by);
        if (lane >= by) size_upto += size_below, mass_upto += mass_below;
      }
      int before = size_upto < need ? 1 : 0;
      for (int by = 16; by > 0; by /= 2) before += shuffle_xor(before, by);
      need -= shuffle_from(size_upto - size_here, before);
      above += shuffle_from(mass_upto - mass_here, before);
      int digit = kDigits - 1 - before * each;
      while (size(digit) < need) {
        need -= size(digit);
        above += masses[digit--];
      }
      known = known << bits | static_cast<uint32_t>(digit);
      if (shift > 0) continue;
      const int64_t ties = counts[digit], weight = masses[digit] / ties;
      const int64_t taken = by_mass ? (need + weight - 1) / weight : ties;
      return {known, ties, taken, above + taken * weight};
    }
  }

 private:
  template <typename T>
  APR_DEVICE static auto told() {
    return shared_array<T>(shared_address(shared_memory()) + kDigits * 12);
  }

  APR_DEVICE float plain(int i) const {
    if (scores_.dtype == DType::kFloat32) return scores_.floats[first_ + i];
    const uint16_t bits = scores_.halves[first_ + i];
    return scores_.dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
  }

  const ScoreRows& scores_;
  int64_t first_;
  int vocab_;
  float temperature_, top_;
  uint32_t highest_;
};

// A token of what top-k, top-p and min-p leave of a row, in transformers' order.
APR_DEVICE int draw(const ScoreRow& row, const RowDraw& how, int vocab, float& logprob) {
  ScoreRow::Prefix prefix{};
  if (how.top_k > 0 && how.top_k < vocab) {
    prefix = row.shortest_prefix(how.top_k, false);
  } else if (how.tail > 0.) {
    for (int i = thread_index(); i < vocab; i += kSampleThreads) {
      prefix.mass += weight_of(row.share(row.scaled(i)));
    }
    prefix.mass = ScoreRow::reduce(prefix.mass, [](int64_t a, int64_t b) { return a + b; });
  }
  if (how.tail > 0.) prefix = row.shortest_prefix(mass_kept(how.tail, prefix.mass), true);
  const uint32_t least = prefix.least;
  int first_tie = 0;
  if (prefix.taken < prefix.ties) {
    first_tie = row.find([&](int i) { return int64_t{order_of(row.scaled(i)) == least}; },
                         [&](int64_t) { return prefix.ties - prefix.taken; });
  }
  int64_t sum = 0;
  const int token = row.find(
      [&](int i) {
        const float x = row.scaled(i), share = row.share(x);
        const uint32_t order = order_of(x);
        const bool kept =
            (order > least || (order == least && i >= first_tie)) && share >= how.min_p;
        return kept ? weight_of(share) : int64_t{0};
      },
      [&](int64_t all) {
        sum = all;
        return part_of_sum(random_bits(how.key, how.count), all);
      });
  logprob = row.logprob(token, sum);
  return token;
}

APR_KERNEL APR_BOUNDS(kSampleThreads, 1) sample_rows(APR_GRID_CONSTANT SampleWork work) {
  const int i = block_index();
  const RowDraw how = work.draws[i];
  const bool greedy = how.temperature == 0.f;
  const ScoreRow plain(work.logits, i, work.vocab, 1.f);
  int64_t sum = 0;
  double moment = 0;
  for (int at = thread_index(); at < work.vocab; at += kSampleThreads) {
    const float below = plain.scaled(at) - plain.top(), share = share_of(below);
    sum += weight_of(share);
    if (share > 0.f) moment += share * below;
  }
  sum = ScoreRow::reduce(sum, [](int64_t a, int64_t b) { return a + b; });
  moment = ScoreRow::reduce(moment, [](double a, double b) { return a + b; });
  const ScoreRow row(work.scores, i, work.vocab, greedy ? 1.f : how.temperature);
  int token = -1;
  float drawn_logprob = 0.f;
  if (row.can_be_drawn_from()) {
    token = greedy ? row.likeliest() : draw(row, how, work.vocab, drawn_logprob);
  }
  if (thread_index() != 0) return;
  const double shares = sum / kWholeWeight;
  const float nothing = infinity() - infinity();
  work.tokens[i] = token;
  work.entropies[i] = static_cast<float>(log(shares) - moment / shares);
  work.logprobs[i] = token < 0 ? nothing : plain.logprob(token, sum);
  work.drawn_logprobs[i] = token < 0 ? nothing : drawn_logprob;
}

}  // namespace apr::APR_GPU
