// Addresses and the flat arrays of plans, as Python hands them over. No torch header.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "core/plan.h"
#include "core/view_tables.h"
#include "kernels/params.h"

namespace apr::bindings {

namespace py = pybind11;

template <typename T = void>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

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

}  // namespace apr::bindings
