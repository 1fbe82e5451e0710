// Lays out the views of ordinary steps for a GPU: every entry is a visit, whether it shows
// something now or not, since the device alone knows how lengths grow.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cuda/bytes.h"
#include "kernels/cuda/layout.h"

namespace apr::APR_GPU {
namespace {

// Items that so many entries in so many segments make at most.
int64_t most_items(const ViewCapacity& capacity, int64_t group, int64_t item_rows) {
  const int64_t visits = std::max<int64_t>(1, item_rows / group);
  const int64_t cuts = (group + item_rows - 1) / item_rows;
  return capacity.segments + capacity.entries / visits + capacity.entries * (cuts - 1);
}

void check_fits(const char* what, int64_t count, int64_t capacity) {
  if (count > capacity) {
    throw std::invalid_argument(std::string("views: ") + std::to_string(count) + " " + what +
                                " do not fit a capacity of " + std::to_string(capacity));
  }
}

struct Drafts {
  std::vector<Visit> visits;
  std::vector<Item> items;
  std::vector<int32_t> row_visits, view_order, first_pages;
  int32_t lanes = 0;  // of the items that are not alone
};

void add_items(Drafts& drafts, const ViewArrays& views, int64_t group, int64_t item_rows) {
  std::vector<int32_t> segments(static_cast<size_t>(views.num_entries));
  for (int64_t e = 0; e < views.num_entries; ++e) {
    segments[static_cast<size_t>(views.entries[e].pair)] = views.entries[e].segment;
  }
  drafts.lanes = collect_items(
      drafts.visits, drafts.items, group, item_rows, [&](size_t visit) { return segments[visit]; },
      [&](size_t first, size_t next) { return segments[first] == segments[next]; },
      [&](const Visit& visit) { return views.rows[visit.row].num_entries == 1; });
}

Drafts draft(const ViewArrays& views, int64_t group, int64_t item_rows) {
  Drafts drafts;
  drafts.visits.resize(static_cast<size_t>(views.num_entries));
  for (int64_t row = 0; row < views.num_rows; ++row) {
    drafts.row_visits.push_back(static_cast<int32_t>(drafts.view_order.size()));
    for (int32_t i = 0; i < views.rows[row].num_entries; ++i) {
      const int32_t pair = views.entries[views.rows[row].first_entry + i].pair;
      drafts.visits[static_cast<size_t>(pair)] = {pair, 0, static_cast<int32_t>(row), -1};
      drafts.view_order.push_back(pair);
    }
  }
  drafts.row_visits.push_back(static_cast<int32_t>(drafts.view_order.size()));
  for (int64_t s = 0; s < views.num_segments; ++s) {
    drafts.first_pages.push_back(views.segments[s].first_page);
  }
  add_items(drafts, views, group, item_rows);
  return drafts;
}

}  // namespace

Layout lay_out_views(const ViewArrays& views, const AttentionKind& kind, const GpuDevice& device,
                     const ViewCapacity& capacity) {
  check_fits("rows", views.num_rows, capacity.rows);
  check_fits("entries", views.num_entries, capacity.entries);
  check_fits("segments", views.num_segments, capacity.segments);
  check_fits("pages", views.num_pages, capacity.pages);
  const int64_t group = kind.q_heads / kind.kv_heads;
  Layout layout;
  layout.instance = &choose_instance(kind, capacity.rows * group, device);
  const int64_t items = most_items(capacity, group, layout.instance->item_rows);
  set_grid(layout, kind, device, capacity.entries * group);
  if (kind.invariant) {
    constexpr int64_t kUnit = kTile * kInvariantTiles;
    // A segment's last chunk is seldom full.
    const int64_t chunks = capacity.pages * kind.page_size / kUnit + capacity.segments;
    const int64_t visits = std::max<int64_t>(1, layout.instance->item_rows / group);
    const int64_t cuts = (group + layout.instance->item_rows - 1) / layout.instance->item_rows;
    const int64_t items_a_segment = (capacity.rows + visits - 1) / visits * cuts;
    layout.part_lanes = chunks * items_a_segment * kind.kv_heads * layout.instance->item_rows;
  }
  const Drafts drafts = draft(views, group, layout.instance->item_rows);
  const Counts counts{static_cast<int32_t>(drafts.items.size()),
                      static_cast<int32_t>(drafts.visits.size()),
                      static_cast<int32_t>(views.num_rows), 0, 0};
  layout.num_rows = layout.row_end = capacity.rows;
  Writer writer(layout.upload);
  layout.counts = writer.put(&counts, 1);
  layout.visits = writer.put(drafts.visits, capacity.entries);
  layout.items = writer.put(drafts.items, items);
  layout.segment_pages = writer.put(drafts.first_pages, capacity.segments + 1);
  layout.row_visits = writer.put(drafts.row_visits, capacity.rows + 1);
  layout.view_order = writer.put(drafts.view_order, capacity.entries);
  layout.rows = writer.put(views.rows, views.num_rows, capacity.rows);
  layout.entries = writer.put(views.entries, views.num_entries, capacity.entries);
  layout.segments = writer.put(views.segments, views.num_segments, capacity.segments);
  layout.page_table = writer.put(views.page_table, views.num_pages, capacity.pages);
  layout.bytes = static_cast<int64_t>(layout.upload.size());
  layout.pairs = reserve<PlanPair>(layout.bytes, capacity.entries);
  layout.runs = reserve<PlanRun>(layout.bytes, capacity.rows);
  layout.bounds = reserve<Bounds>(layout.bytes, capacity.entries);
  layout.reach = reserve<Reach>(layout.bytes, items);
  layout.first_items = reserve<int32_t>(layout.bytes, layout.grid);
  return layout;
}

}  // namespace apr::APR_GPU
