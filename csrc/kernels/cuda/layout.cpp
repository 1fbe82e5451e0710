// Lays out the work of a plan for a GPU: visits, items and the kernel that suits them, as bytes to
// copy to device memory and sizes of what the device adds.
#include "kernels/cuda/layout.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "kernels/cuda/bytes.h"
#include "kernels/ranges.h"

namespace apr::APR_GPU {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 2;  // more would only make more partial results
constexpr int64_t kReservedShared = 1024;        // bytes that each block takes beside its own

// What the host knows of a visit and the device need not.
struct Place {
  SlotRange seen;
  int32_t segment;
  int32_t order;
};

struct Draft {
  std::vector<Visit> visits;
  std::vector<Place> places;
  std::vector<Item> items;
};

// Rows that see something, segment by segment.
Draft collect_visits(const PlanArrays& plan, const AttentionKind& kind, int64_t row_begin,
                     int64_t row_end) {
  Draft draft;
  const int32_t window = bounded(kind.window), chunk = bounded(kind.chunk);
  for (int64_t p = 0; p < plan.segment_pairs[plan.num_segments]; ++p) {
    const PlanPair& pair = plan.pairs[p];
    const PlanRun& run = plan.runs[pair.run];
    const int64_t first = std::max<int64_t>(row_begin - run.row_begin, 0);
    const int64_t end = std::min<int64_t>(row_end - run.row_begin, run.row_count);
    for (int64_t i = first; i < end; ++i) {
      const auto index = static_cast<int32_t>(i);
      const SlotRange seen = visible_slots(pair, run, index, window, chunk);
      if (seen.hi <= seen.lo) continue;
      draft.visits.push_back({static_cast<int32_t>(p), index, run.row_begin + index, -1});
      draft.places.push_back({seen, pair.segment, pair.order});
    }
  }
  return draft;
}

int64_t fullest_segment(const Draft& draft) {
  int64_t most = 0, count = 0;
  for (size_t v = 0; v < draft.places.size(); ++v) {
    count = v > 0 && draft.places[v].segment == draft.places[v - 1].segment ? count + 1 : 1;
    most = std::max(most, count);
  }
  return most;
}

// [rows + 1] and the visits of each row in the order of its view.
struct Order {
  std::vector<int32_t> row_visits, view_order;
};

Order order_of(const Draft& draft, int64_t num_rows) {
  Order order;
  order.row_visits.assign(static_cast<size_t>(num_rows) + 1, 0);
  for (const Visit& visit : draft.visits) ++order.row_visits[visit.row + 1];
  for (int64_t row = 0; row < num_rows; ++row) order.row_visits[row + 1] += order.row_visits[row];
  order.view_order.resize(draft.visits.size());
  std::vector<int32_t> next(order.row_visits.begin(), order.row_visits.end() - 1);
  for (size_t v = 0; v < draft.visits.size(); ++v) {
    order.view_order[next[draft.visits[v].row]++] = static_cast<int32_t>(v);
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    std::sort(order.view_order.begin() + order.row_visits[row],
              order.view_order.begin() + order.row_visits[row + 1],
              [&](int32_t a, int32_t b) { return draft.places[a].order < draft.places[b].order; });
  }
  return order;
}

// Neighbours share an item while what they see is connected: each slot of its reach is seen by one
// of them at least, so that no slot is read that nobody has written.
int32_t collect_items(Draft& draft, const Order& order, int64_t group, int64_t item_rows) {
  SlotRange reach{};
  const auto joins = [&](size_t first, size_t next) {
    if (next == first + 1) reach = draft.places[first].seen;
    const Place& place = draft.places[next];
    if (place.segment != draft.places[first].segment) return false;
    if (place.seen.lo > reach.hi || place.seen.hi < reach.lo) return false;
    reach = {std::min(reach.lo, place.seen.lo), std::max(reach.hi, place.seen.hi)};
    return true;
  };
  const auto segment_of = [&](size_t visit) { return draft.places[visit].segment; };
  const auto alone = [&](const Visit& visit) {
    return order.row_visits[visit.row + 1] - order.row_visits[visit.row] == 1;
  };
  return collect_items(draft.visits, draft.items, group, item_rows, segment_of, joins, alone);
}

// Units of one kv head. A visit belongs to its first item: those that are cuts of it see the same.
int64_t units_of(const Draft& draft, int unit) {
  int64_t units = 0;
  for (size_t i = 0; i < draft.items.size(); ++i) {
    SlotRange reach = draft.places[draft.items[i].first_visit].seen;
    for (size_t v = draft.items[i].first_visit;
         v < draft.visits.size() && draft.visits[v].item == static_cast<int32_t>(i); ++v) {
      reach.lo = std::min(reach.lo, draft.places[v].seen.lo);
      reach.hi = std::max(reach.hi, draft.places[v].seen.hi);
    }
    units += (reach.hi - 1) / unit - reach.lo / unit + 1;
  }
  return units;
}

}  // namespace

const Instance& choose_instance(const AttentionKind& kind, int64_t lanes, const GpuDevice& device) {
  const int64_t dim = std::max(kind.head_dim_k, kind.head_dim_v);
  const Instance* best = nullptr;
  // In the order of preference: the widest is best for many rows, the narrowest that fits for few.
  for (const Instance* one : instances()) {
    if (one->dtype != kind.dtype || one->head_dim < dim) continue;
    if (one->coded != (kind.codes != Codes::kNone)) continue;
    // Invariant bits need one kernel whatever the number of lanes.
    const bool may_be_wide = device.capability == 90 && !kind.invariant;
    if (one->wide && (!may_be_wide || lanes <= 32)) continue;
    if (one->shared_bytes > device.shared_per_block) continue;
    if (best == nullptr) {
      best = one;
      continue;
    }
    if (one->wide != best->wide) {
      best = one->wide ? one : best;
    } else if (one->head_dim != best->head_dim) {
      best = one->head_dim < best->head_dim ? one : best;
    } else if (one->item_rows != best->item_rows) {
      // Which rows share an item changes no bit, so this may follow the number of lanes.
      const bool more = one->item_rows > best->item_rows;
      best = more == (lanes > std::min(one->item_rows, best->item_rows)) ? one : best;
    } else if (one->stages > best->stages) {
      const int64_t two = 2 * (one->shared_bytes + kReservedShared);
      if (two <= device.shared_per_multiprocessor) best = one;
    }
  }
  if (best == nullptr) {
    throw std::invalid_argument(
        "no GPU kernel for head_dim " + std::to_string(dim) + " with " +
        std::to_string(device.shared_per_block / 1024) +
        " KiB of shared memory for a block: expected a multiple of 8 up to 576, on GPUs with 99 "
        "KiB up to 256 in float32, and with 8 bits up to 256 in bfloat16 and float16; convert the "
        "model, e.g. model.to(torch.bfloat16)");
  }
  return *best;
}

void set_grid(Layout& layout, const AttentionKind& kind, const GpuDevice& device, int64_t shared) {
  const int64_t fitting = std::max<int64_t>(
      1, device.shared_per_multiprocessor / (layout.instance->shared_bytes + kReservedShared));
  layout.multiprocessors = device.multiprocessors;
  layout.grid = device.multiprocessors * std::min(kBlocksPerMultiprocessor, fitting);
  const int64_t item_rows = layout.instance->item_rows;
  layout.alone_lanes = shared * kind.kv_heads + layout.grid * item_rows;
  layout.part_lanes = layout.alone_lanes + 2 * layout.grid * item_rows;
}

Layout lay_out(const PlanArrays& plan, const AttentionKind& kind, const GpuDevice& device,
               int64_t row_begin, int64_t row_end) {
  const int64_t group = kind.q_heads / kind.kv_heads;
  Draft draft = collect_visits(plan, kind, row_begin, row_end);
  Layout layout;
  layout.instance = &choose_instance(kind, fullest_segment(draft) * group, device);
  const Order order = order_of(draft, plan.num_rows);
  const int64_t shared = collect_items(draft, order, group, layout.instance->item_rows);
  set_grid(layout, kind, device, shared);
  layout.units = units_of(draft, kind.invariant ? kTile * kInvariantTiles : kTile) * kind.kv_heads;
  if (kind.invariant) layout.part_lanes = layout.units * layout.instance->item_rows;

  const Counts counts{static_cast<int32_t>(draft.items.size()),
                      static_cast<int32_t>(draft.visits.size()), static_cast<int32_t>(row_end), 0,
                      0};
  layout.num_rows = plan.num_rows;
  layout.row_begin = row_begin;
  layout.row_end = row_end;
  Writer writer(layout.upload);
  layout.counts = writer.put(&counts, 1);
  layout.visits = writer.put(draft.visits);
  layout.items = writer.put(draft.items);
  layout.pairs = writer.put(plan.pairs, plan.segment_pairs[plan.num_segments]);
  layout.runs = writer.put(plan.runs, plan.num_runs);
  layout.segment_pages = writer.put(plan.segment_pages, plan.num_segments + 1);
  layout.page_table = writer.put(plan.page_table, plan.segment_pages[plan.num_segments]);
  layout.row_visits = writer.put(order.row_visits);
  layout.view_order = writer.put(order.view_order);
  layout.bytes = static_cast<int64_t>(layout.upload.size());
  layout.bounds = reserve<Bounds>(layout.bytes, layout.visits.count);
  layout.reach = reserve<Reach>(layout.bytes, layout.items.count);
  layout.first_items = reserve<int32_t>(layout.bytes, layout.grid);
  return layout;
}

std::vector<Layout> lay_out_passes(const PlanArrays& plan, const AttentionKind& kind,
                                   const GpuDevice& device) {
  std::vector<Layout> passes;
  std::vector<std::pair<int64_t, int64_t>> open{{0, plan.num_rows}};
  while (!open.empty()) {
    const auto [begin, end] = open.back();
    open.pop_back();
    Layout layout = lay_out(plan, kind, device, begin, end);
    const bool large = layout.part_floats(kind) * 4 > device.most_part_bytes ||
                       layout.units > std::numeric_limits<int32_t>::max();
    if (large && end - begin > 1) {
      const int64_t middle = (begin + end) / 2;
      open.emplace_back(middle, end);
      open.emplace_back(begin, middle);
      continue;
    }
    passes.push_back(std::move(layout));
  }
  return passes;
}

}  // namespace apr::APR_GPU
