// The flat arrays of a plan and a rotation table, as kernels take them.
#pragma once

#include <tuple>

#include "bindings/tensor.h"
#include "core/plan.h"
#include "core/view_tables.h"

namespace apr::bindings {

inline PlanArrays arrays_of(const Plan& plan) {
  return {plan.runs.data(),
          plan.pairs.data(),
          plan.segment_pairs.data(),
          plan.segment_pages.data(),
          plan.page_table.data(),
          plan.slots.data(),
          static_cast<int64_t>(plan.runs.size()),
          plan.num_segments(),
          plan.num_rows(),
          plan.page_size};
}

inline ViewArrays arrays_of(const ViewTables& views) {
  const auto count = [](const auto& values) { return static_cast<int64_t>(values.size()); };
  return {views.rows().data(),       views.entries().data(),   views.segments().data(),
          views.page_table().data(), count(views.rows()),      count(views.entries()),
          count(views.segments()),   count(views.page_table())};
}

// (table pointer, first dimension, pairs, interleaved)
using RotationTuple = std::tuple<int64_t, int64_t, int64_t, bool>;

inline RotationTable rotation_table(const RotationTuple& t) {
  const auto& [table, first, pairs, interleaved] = t;
  return {static_cast<const float*>(pointer(table)), first, pairs, interleaved};
}

}  // namespace apr::bindings
