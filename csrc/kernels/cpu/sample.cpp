// Draws a token from each row of scores.
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/draw.h"

namespace apr::cpu {
namespace {

// A beginning of the scores from the highest down: how far it goes, and what it holds.
struct Prefix {
  float least = 0.f;  // the lowest score of it
  int64_t ties = 0;   // how many of those that are equal to it are in
  int64_t mass = 0;
};

// The shortest prefix whose count (or, by mass, whose sum of weights) is `need` or more; the ties
// of its last score are in as far as they are needed by mass, and all by count (transformers'
// top-k).
Prefix shortest_prefix(std::vector<Score>& scores, Prefix before, int64_t need, bool by_mass) {
  const auto size = [&](const Score& one) { return by_mass ? one.weight : 1; };
  size_t begin = 0, end = scores.size();
  for (;;) {
    const float pivot = scores[begin + (end - begin) / 2].score;
    const auto at = scores.begin();
    const auto equal =
        std::partition(at + begin, at + end, [&](const Score& one) { return one.score > pivot; });
    const auto below =
        std::partition(equal, at + end, [&](const Score& one) { return one.score == pivot; });
    int64_t higher_size = 0, higher_mass = 0;
    for (auto one = at + begin; one != equal; ++one) {
      higher_size += size(*one);
      higher_mass += one->weight;
    }
    if (higher_size >= need) {
      end = equal - at;
      continue;
    }
    need -= higher_size;
    before.mass += higher_mass;
    const int64_t ties = below - equal, each = size(*equal);
    if (each * ties >= need) {
      const int64_t taken = by_mass ? (need + each - 1) / each : ties;
      return {pivot, taken, before.mass + taken * equal->weight};
    }
    need -= each * ties;
    before.mass += ties * equal->weight;
    begin = below - at;
  }
}

// One row of scores under a temperature, and the passes over it.
class Row {
 public:
  Row(const void* data, int64_t count, DType dtype, float temperature)
      : passes_(instruction_set().scores[static_cast<int>(dtype)]),
        load_(instruction_set().load_row[static_cast<int>(dtype)]),
        size_(element_size(dtype)),
        row_{data, count, temperature, 0.f},
        groups_(score_groups(count), -INFINITY),
        highest_(passes_.highest(row_, groups_.data())),
        blocks_((count + kScoreBlock - 1) / kScoreBlock) {
    row_.top = highest_ / temperature;
  }
  Row under(float temperature) const {
    Row row = *this;
    row.row_.temperature = temperature;
    row.row_.top = highest_ / temperature;
    return row;
  }

  bool can_be_drawn_from() const { return std::isfinite(row_.top); }
  int64_t likeliest() const { return passes_.first(row_, highest_); }

  // All scores, where the temperature is 1: for log-probabilities and the entropy, not for a draw.
  void weigh_plain() { sum_ = passes_.weigh_all(row_, moment_); }
  // What is kept; returns the sum of its weights.
  int64_t weigh(const Kept& kept) {
    passes_.weigh(row_, kept, blocks_.data());
    sum_ = 0;
    for (const int64_t block : blocks_) sum_ += block;
    return sum_;
  }

  // Of what was weighed last.
  int64_t draw(const Kept& kept, uint64_t random) const {
    int64_t target = part_of_sum(random, sum_), block = 0;
    while (target >= blocks_[block]) target -= blocks_[block++];
    return passes_.find_weight(row_, kept, block, target);
  }
  float logprob(int64_t token) const {
    float score;
    load_(static_cast<const char*>(row_.data) + token * size_, 1, &score);
    return static_cast<float>(score / row_.temperature - row_.top - std::log(sum_ / kWholeWeight));
  }
  float entropy() const {
    const double shares = sum_ / kWholeWeight;
    return static_cast<float>(std::log(shares) - moment_ / shares);
  }

  // What top-k, top-p and min-p leave, in transformers' order.
  Kept kept_by(const RowDraw& how) {
    Kept kept{how.min_p <= 0.f, -INFINITY, 0, how.min_p};
    int64_t mass = 0;
    if (how.top_k > 0 && how.top_k < row_.count) {
      bin_from(least_of_top(how.top_k), false);
      const Prefix prefix = prefix_of(how.top_k, false);
      kept = {false, prefix.least, 0, how.min_p};
      mass = prefix.mass;
    }
    if (how.tail > 0.) {
      if (kept.least == -INFINITY) {
        mass = bin_from(least_of_mass(how.tail), true);
      }
      const Prefix prefix = prefix_of(mass_kept(how.tail, mass), true);
      kept = {false, prefix.least, 0, how.min_p};
      kept.first_tie = static_cast<int32_t>(passes_.nth_last(row_, prefix.least, prefix.ties));
    }
    return kept;
  }

 private:
  // A bound from below of the k highest scores: the k-th highest of the groups' highest.
  float least_of_top(int64_t k) {
    if (k > static_cast<int64_t>(groups_.size())) return -INFINITY;
    std::nth_element(groups_.begin(), groups_.begin() + (k - 1), groups_.end(), std::greater<>());
    return groups_[k - 1] / row_.temperature;
  }
  // The same of what top-p leaves: all tokens that have less than an equal share of the tail are
  // less than the tail together; of all shares the groups' highest are a part. (One below it: these
  // are rounded.)
  float least_of_mass(double tail) const {
    float shares = 0.f;
    for (const float score : groups_) shares += std::exp(score / row_.temperature - row_.top);
    return row_.top + static_cast<float>(std::log(tail * shares / row_.count)) - 1.f;
  }

  // Returns, where `all`, the sum of all weights.
  int64_t bin_from(float floor, bool all) {
    floor_ = floor;
    bins_.assign(kScoreBins, {});
    return passes_.bin(row_, floor, all, bins_.data());
  }

  Prefix prefix_of(int64_t need, bool by_mass) const {
    Prefix before;
    int32_t at = 0;
    for (; at + 1 < kScoreBins; ++at) {
      const int64_t size = by_mass ? bins_[at].mass : bins_[at].count;
      if (size >= need) break;
      need -= size;
      before.mass += bins_[at].mass;
    }
    std::vector<Score> scores(bins_[at].count);
    passes_.collect(row_, floor_, at, scores.data());
    return shortest_prefix(scores, before, need, by_mass);
  }

  const ScorePasses& passes_;
  void (*load_)(const void* from, int64_t count, float* to);
  int64_t size_;
  ScoreRow row_;
  std::vector<float> groups_;  // the highest score of each
  float highest_, floor_ = 0.f;
  std::vector<ScoreBin> bins_;   // of scores from the floor on
  std::vector<int64_t> blocks_;  // sums of weights
  int64_t sum_ = 0;
  double moment_ = 0;
};

const void* row_of(const void* rows, int64_t row, int64_t stride, DType dtype) {
  return static_cast<const char*>(rows) + row * stride * element_size(dtype);
}

void sample_row(const SampleCall& call, int64_t i) {
  const RowDraw& how = call.draws[i];
  const bool greedy = how.temperature == 0.f;
  const void* scores = row_of(call.scores, i, call.row_stride, call.dtype);
  const void* logits = row_of(call.logits, i, call.logits_stride, call.logits_dtype);
  Row plain(logits, call.vocab, call.logits_dtype, 1.f);
  plain.weigh_plain();
  call.tokens[i] = -1;
  call.logprobs[i] = call.drawn_logprobs[i] = NAN;
  call.entropies[i] = plain.entropy();
  const float temperature = greedy ? 1.f : how.temperature;
  Row row = scores == logits ? plain.under(temperature)
                             : Row(scores, call.vocab, call.dtype, temperature);
  if (!row.can_be_drawn_from()) return;
  int64_t token;
  if (greedy) {
    token = row.likeliest();
    call.drawn_logprobs[i] = 0.f;
  } else {
    const Kept kept = row.kept_by(how);
    row.weigh(kept);
    token = row.draw(kept, random_bits(how.key, how.count));
    call.drawn_logprobs[i] = row.logprob(token);
  }
  call.tokens[i] = token;
  call.logprobs[i] = plain.logprob(token);
}

}  // namespace

void sample(const SampleCall& call) {
  parallel(call.threads, {{call.rows, [&](int64_t i) { sample_row(call, i); }}});
}

}  // namespace apr::cpu
