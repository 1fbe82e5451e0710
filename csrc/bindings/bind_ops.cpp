// Python's door to the kernels: plans of row sets, append, attention, merge.
#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings/tensor.h"
#include "core/row_sets.h"
#include "kernels/cpu/kernels.h"

namespace apr::bindings {
namespace {

std::unique_ptr<Plan> plan_of(const std::vector<RowSet>& row_sets, int64_t page_size) {
  auto plan = std::make_unique<Plan>();
  plan_row_sets(row_sets, page_size, *plan);
  return plan;
}

void merge(std::vector<Rows> parts, const std::vector<int64_t>& part_lse, const Rows& out,
           int64_t lse, int64_t rows, int64_t heads, int64_t dim, DType dtype, int threads) {
  cpu::MergeParams params{std::move(parts), {}, out, pointer<float>(lse), rows, heads, dim, dtype,
                          threads};
  for (const int64_t part : part_lse) params.part_lse.push_back(pointer<const float>(part));
  const py::gil_scoped_release release;
  cpu::merge(params);
}

}  // namespace

void bind_ops(py::module_& module) {
  py::class_<SeenPages>(module, "SeenPages", "What one row set sees of one segment.")
      .def(py::init([](std::vector<PageId> pages, int64_t lo, int64_t hi, int64_t offset,
                       int64_t base, int64_t stride, bool own) {
             return SeenPages{std::move(pages), lo, hi, offset, base, stride, own};
           }),
           py::arg("pages"), py::arg("lo"), py::arg("hi"), py::arg("offset"), py::arg("base"),
           py::arg("stride"), py::arg("own"));
  py::class_<RowSet>(module, "RowSet", "Query rows that see the same.")
      .def(py::init([](int64_t query_len, std::vector<SeenPages> seen) {
             return RowSet{query_len, std::move(seen)};
           }),
           py::arg("query_len"), py::arg("seen"));
  module.def("plan", &plan_of, py::arg("row_sets"), py::arg("page_size"));
  module.def(
      "append",
      [](const Plan& plan, const Rows& k, const Rows& v, const Pool& pool, int threads) {
        const py::gil_scoped_release release;
        cpu::append(k, v, pool, arrays_of(plan), threads);
      },
      py::arg("plan"), py::arg("k"), py::arg("v"), py::arg("pool"), py::arg("threads"));
  module.def(
      "copy_tokens",
      [](const Plan& plan, const Pool& pool) {
        cpu::copy_tokens(pool, plan.copies.data(), static_cast<int64_t>(plan.copies.size()));
      },
      py::arg("plan"), py::arg("pool"));
  module.def(
      "attention",
      [](const Plan& plan, const Pool& pool, const AttentionCall& call) {
        const py::gil_scoped_release release;
        cpu::attention(call, pool, arrays_of(plan));
      },
      py::arg("plan"), py::arg("pool"), py::arg("call"));
  module.def("merge", &merge, py::kw_only(), py::arg("parts"), py::arg("part_lse"), py::arg("out"),
             py::arg("lse"), py::arg("rows"), py::arg("heads"), py::arg("dim"), py::arg("dtype"),
             py::arg("threads"));
}

}  // namespace apr::bindings
