// Python's door to the kernels: plans from row sets, append, attention, merge.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/tensor.h"
#include "core/error.h"
#include "core/plan.h"
#include "kernels/cpu/kernels.h"

namespace apr::bindings {
namespace {

// (pages, lo, hi, offset, base, stride, own)
using ViewTuple =
    std::tuple<std::vector<int32_t>, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;
using RowSet = std::tuple<int64_t, std::vector<ViewTuple>>;

std::unique_ptr<Plan> plan_of(const std::vector<RowSet>& row_sets, int64_t page_size) {
  auto plan = std::make_unique<Plan>();
  plan->clear(page_size);
  std::map<std::vector<int32_t>, int32_t> segments;  // equal page lists are one segment
  for (const auto& [query_len, views] : row_sets) {
    const int32_t run_index = static_cast<int32_t>(plan->runs.size());
    PlanRun run{static_cast<int32_t>(plan->num_rows()), static_cast<int32_t>(query_len), 0, 1};
    int64_t own_difference = 0;
    const size_t first_pair = plan->pairs.size();
    for (const auto& [pages, lo, hi, offset, base, stride, own] : views) {
      const auto [found, fresh] = segments.try_emplace(pages, 0);
      if (fresh) found->second = plan->add_segment(pages);
      PlanPair pair{};
      pair.run = run_index;
      pair.segment = found->second;
      pair.lo = static_cast<int32_t>(lo);
      pair.hi = static_cast<int32_t>(hi);
      pair.view_offset = static_cast<int32_t>(offset);
      pair.stride = static_cast<int32_t>(stride);
      pair.rotation = static_cast<int32_t>(base - offset);
      pair.first_own = -1;
      if (own) {
        const int64_t first = hi - query_len;
        pair.first_own = static_cast<int32_t>(first);
        own_difference = offset - base;
        run.stride = static_cast<int32_t>(stride);
        run.view_position = static_cast<int32_t>(offset + stride * first);
        for (int64_t slot = first; slot < hi; ++slot) {
          plan->slots.push_back(pages[slot / page_size] * page_size + slot % page_size);
          plan->positions.push_back(base + stride * slot);
        }
      }
      plan->pairs.push_back(pair);
    }
    for (size_t i = first_pair; i < plan->pairs.size(); ++i) {
      plan->pairs[i].rotation += static_cast<int32_t>(own_difference);
    }
    plan->runs.push_back(run);
  }
  plan->finish();
  return plan;
}

void attention(const Plan& plan, const RowsTuple& q, const RowsTuple& out, int64_t lse,
               const PoolTuple& pool_tuple, int64_t q_heads, double scale, double softcap,
               int64_t window, int64_t chunk, int64_t sinks, const RotationTuple& rotation,
               bool invariant, int threads) {
  AttentionParams params{};
  params.q = rows(q);
  params.out = rows(out);
  params.lse = static_cast<float*>(pointer(lse));
  params.q_heads = q_heads;
  params.scale = static_cast<float>(scale);
  params.softcap = static_cast<float>(softcap);
  params.window = window;
  params.chunk = chunk;
  params.sinks = static_cast<const float*>(pointer(sinks));
  params.rotation = rotation_table(rotation);
  params.invariant = invariant;
  params.threads = threads;
  const py::gil_scoped_release release;
  cpu::attention(params, pool(pool_tuple), arrays_of(plan));
}

void merge(const std::vector<RowsTuple>& parts, const std::vector<int64_t>& part_lse,
           const RowsTuple& out, int64_t lse, int64_t num_rows, int64_t heads, int64_t dim,
           int64_t dtype, int threads) {
  cpu::MergeParams params;
  for (const RowsTuple& part : parts) params.parts.push_back(rows(part));
  for (const int64_t p : part_lse) {
    params.part_lse.push_back(static_cast<const float*>(pointer(p)));
  }
  params.out = rows(out);
  params.lse = static_cast<float*>(pointer(lse));
  params.rows = num_rows;
  params.heads = heads;
  params.dim = dim;
  params.dtype = static_cast<DType>(dtype);
  params.threads = threads;
  const py::gil_scoped_release release;
  cpu::merge(params);
}

}  // namespace

void bind_ops(py::module_& module) {
  module.def("plan", &plan_of, py::arg("row_sets"), py::arg("page_size"));
  module.def(
      "append",
      [](const Plan& plan, const RowsTuple& k, const RowsTuple& v, const PoolTuple& p,
         int threads) {
        const py::gil_scoped_release release;
        cpu::append(rows(k), rows(v), pool(p), arrays_of(plan), threads);
      },
      py::arg("plan"), py::arg("k"), py::arg("v"), py::arg("pool"), py::arg("threads"));
  module.def(
      "copy_tokens",
      [](const Plan& plan, const PoolTuple& p) {
        cpu::copy_tokens(pool(p), plan.copies.data(), static_cast<int64_t>(plan.copies.size()));
      },
      py::arg("plan"), py::arg("pool"));
  module.def("attention", &attention, py::arg("plan"), py::arg("q"), py::arg("out"), py::arg("lse"),
             py::arg("pool"), py::arg("q_heads"), py::arg("scale"), py::arg("softcap"),
             py::arg("window"), py::arg("chunk"), py::arg("sinks"), py::arg("rotation"),
             py::arg("invariant"), py::arg("threads"));
  module.def("merge", &merge, py::arg("parts"), py::arg("part_lse"), py::arg("out"), py::arg("lse"),
             py::arg("rows"), py::arg("heads"), py::arg("dim"), py::arg("dtype"),
             py::arg("threads"));
}

}  // namespace apr::bindings
