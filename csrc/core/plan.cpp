// The plan of one packed forward: flat arrays that kernels read; made by a step or by the user's
// row sets.
#include "core/plan.h"

#include <algorithm>

#include "core/digest.h"

namespace apr {

void Plan::clear(int64_t page_size_in_tokens) {
  page_size = page_size_in_tokens;
  runs.clear();
  pairs.clear();
  segment_pairs.clear();
  segment_pages.assign(1, 0);
  segment_numbers.clear();
  page_table.clear();
  slots.clear();
  ids.clear();
  positions.clear();
  writers.clear();
  rotations.clear();
  copies.clear();
}

int32_t Plan::add_segment(const std::vector<PageId>& pages) {
  for (const PageId page : pages)
    page_table.push_back(std::max(page, 0));  // no row sees what has none
  segment_pages.push_back(static_cast<int32_t>(page_table.size()));
  return static_cast<int32_t>(segment_pages.size()) - 2;
}

int32_t Plan::add_run(int64_t rows) {
  runs.push_back({static_cast<int32_t>(num_rows()), static_cast<int32_t>(rows), 0, 1});
  return static_cast<int32_t>(runs.size()) - 1;
}

void Plan::end_view(int32_t run, std::size_t first_pair, const SeenSlots& own) {
  runs[run].stride = static_cast<int32_t>(own.stride);
  runs[run].view_position = static_cast<int32_t>(own.offset + own.stride * own.first_own);
  // A query is written for its own segment's positions; elsewhere it turns by the difference.
  const auto difference = static_cast<int32_t>(own.offset - own.base);
  for (std::size_t i = first_pair; i < pairs.size(); ++i) pairs[i].rotation += difference;
}

void Plan::finish() {
  // Counting sort: stable, so a segment's readers stay in the order of the step.
  segment_pairs.assign(num_segments() + 1, 0);
  for (const PlanPair& pair : pairs) ++segment_pairs[pair.segment + 1];
  for (int64_t s = 0; s < num_segments(); ++s) segment_pairs[s + 1] += segment_pairs[s];
  unsorted_.swap(pairs);
  pairs.resize(unsorted_.size());
  std::vector<int32_t> next(segment_pairs.begin(), segment_pairs.end() - 1);
  rotation_rows_.clear();
  int32_t run = -1, order = 0;
  for (PlanPair pair : unsorted_) {
    order = pair.run == run ? order + 1 : 0;
    run = pair.run;
    pair.order = order;
    pair.rotation_row = -1;
    if (pair.rotation != 0) {
      const auto [found, fresh] =
          rotation_rows_.try_emplace(pair.rotation, static_cast<int32_t>(rotations.size()));
      if (fresh) rotations.push_back(pair.rotation);
      pair.rotation_row = found->second;
    }
    pairs[next[pair.segment]++] = pair;
  }
  unsorted_.clear();
}

uint64_t Plan::digest() const {
  Digest digest;
  digest.mix(num_rows());
  for (int64_t row = 0; row < num_rows(); ++row) {
    digest.mix(ids[row]);
    digest.mix(positions[row]);
    digest.mix(row < static_cast<int64_t>(writers.size()) ? writers[row] : kNone);
  }
  for (const int64_t number : segment_numbers) digest.mix(number);
  for (const PlanPair& pair : pairs) {
    digest.mix(pair.run);
    digest.mix(pair.segment);
    digest.mix(pair.lo);
    digest.mix(pair.hi);
    digest.mix(pair.view_offset);
    digest.mix(pair.rotation);
  }
  return digest.value();
}

}  // namespace apr
