// Python's door to the GPU back-ends: plans in device memory, append, attention.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/tensor.h"
#include "core/error.h"
#include "kernels/gpu.h"

namespace apr {
#ifndef APR_HAVE_CUDA
const GpuBackend* cuda_backend() { return nullptr; }
#endif
#ifndef APR_HAVE_EMULATION
const GpuBackend* emulated_backend() { return nullptr; }
void set_emulated_device(const GpuDevice&, uint64_t) {
  throw std::invalid_argument("this build has no emulation; build with APR_EMULATION=ON");
}
void count_emulated(bool) {}
std::map<std::string, GpuCounts> emulated_counts() { return {}; }
std::string run_broken_kernel(const std::string&) {
  throw std::invalid_argument("this build has no emulation; build with APR_EMULATION=ON");
}
#endif
}  // namespace apr

namespace apr::bindings {
namespace {

void bind_plan(py::module_& module) {
  py::class_<GpuPlan>(module, "GpuPlan", "One pass over the rows of a plan, for device memory.")
      .def_property_readonly("upload",
                             [](py::object self) {
                               const auto& bytes = self.cast<const GpuPlan&>().upload();
                               return py::array_t<uint8_t>(
                                   static_cast<py::ssize_t>(bytes.size()),
                                   reinterpret_cast<const uint8_t*>(bytes.data()), self);
                             })
      .def_property_readonly("table_bytes", &GpuPlan::table_bytes)
      .def_property_readonly("part_bytes", &GpuPlan::part_bytes)
      .def_property_readonly("kernel", &GpuPlan::kernel)
      .def(
          "prepare",
          [](const GpuPlan& plan, int64_t tables, int64_t stream) {
            const py::gil_scoped_release release;
            plan.prepare(pointer(tables), pointer(stream));
          },
          py::arg("tables"), py::arg("stream"))
      .def(
          "attention",
          [](const GpuPlan& plan, int64_t tables, int64_t parts, const Pool& pool,
             const AttentionCall& call, int64_t stream) {
            const py::gil_scoped_release release;
            plan.attention(pointer(tables), pointer(parts), call, pool, pointer(stream));
          },
          py::arg("tables"), py::arg("parts"), py::arg("pool"), py::arg("call"), py::arg("stream"));
}

// (rows, entries, segments, pages)
using CapacityTuple = std::array<int64_t, 4>;

void bind_counts(py::module_& module) {
  py::class_<GpuTraffic>(module, "GpuTraffic", "What warps asked of device memory for some data.")
      .def_readonly("requests", &GpuTraffic::requests)
      .def_readonly("bytes", &GpuTraffic::bytes)
      .def_readonly("sectors", &GpuTraffic::sectors)
      .def_readonly("least_sectors", &GpuTraffic::least_sectors);
  py::class_<GpuShared>(module, "GpuShared", "What warps asked of shared memory.")
      .def_readonly("requests", &GpuShared::requests)
      .def_readonly("rounds", &GpuShared::rounds)
      .def_readonly("least_rounds", &GpuShared::least_rounds);
  py::class_<GpuCounts>(module, "GpuCounts", "What the emulator counted of a kernel.")
      .def_readonly("launches", &GpuCounts::launches)
      .def_readonly("blocks", &GpuCounts::blocks)
      .def_readonly("working_blocks", &GpuCounts::working_blocks)
      .def_readonly("traffic", &GpuCounts::traffic)
      .def_readonly("busiest_bytes", &GpuCounts::busiest_bytes)
      .def_readonly("operands", &GpuCounts::operands)
      .def_readonly("other", &GpuCounts::other)
      .def_readonly("products", &GpuCounts::products)
      .def_readonly("exponentials", &GpuCounts::exponentials)
      .def_readonly("barriers", &GpuCounts::barriers)
      .def_readonly("spans", &GpuCounts::spans)
      .def_readonly("first_lookups", &GpuCounts::first_lookups)
      .def_readonly("later_lookups", &GpuCounts::later_lookups);
  module.def("count_emulated", &count_emulated, py::arg("on"));
  module.def("emulated_counts", &emulated_counts);
}

void bind_view_tables(py::module_& module) {
  py::class_<ViewTables>(module, "ViewTables", "Views of threads with one queued token each.")
      .def(py::init<>())
      .def(
          "refresh",
          [](ViewTables& views, ThreadTable& table, const std::vector<ThreadId>& threads) {
            if (threads.empty()) {
              throw Error(ErrorKind::kInvalidInput, "views: got no threads; expected at least one");
            }
            return views.refresh(table, threads);
          },
          py::arg("table"), py::arg("threads"))
      .def_property_readonly("starts", &ViewTables::starts)
      .def("name_ends", &ViewTables::name_ends, py::arg("table"))
      .def("commit", &ViewTables::commit, py::arg("table"))
      .def("forget", &ViewTables::forget, py::arg("table"))
      .def_property_readonly("changed", &ViewTables::changed)
      .def_property_readonly("ids", [](const ViewTables& v) { return array_of(v.ids()); })
      .def_property_readonly("max_position", &ViewTables::max_position)
      .def_property_readonly("digest", &ViewTables::digest)
      .def_property_readonly("sizes", [](const ViewTables& v) {
        return std::make_tuple(v.rows().size(), v.entries().size(), v.segments().size(),
                               v.page_table().size());
      });
}

void bind_views(py::module_& module) {
  py::class_<GpuViews, GpuPlan>(module, "GpuViews",
                                "Views whose lengths grow on the device, for a captured graph.")
      .def(
          "update", [](GpuViews& gpu, const ViewTables& views) { gpu.update(arrays_of(views)); },
          py::arg("views"))
      .def(
          "step",
          [](const GpuViews& views, int64_t tables, int64_t slots, int64_t positions,
             int64_t stream) {
            const py::gil_scoped_release release;
            views.step(pointer(tables), pointer<int64_t>(slots), pointer<int64_t>(positions),
                       pointer(stream));
          },
          py::arg("tables"), py::arg("slots"), py::arg("positions"), py::arg("stream"))
      .def(
          "turn",
          [](const GpuViews& views, int64_t tables, int64_t inv_freq, int64_t pairs,
             int64_t cos_sin, int64_t stream) {
            const py::gil_scoped_release release;
            views.turn(pointer(tables), pointer<const double>(inv_freq), pairs,
                       pointer<float>(cos_sin), pointer(stream));
          },
          py::arg("tables"), py::arg("inv_freq"), py::arg("pairs"), py::arg("cos_sin"),
          py::arg("stream"));
}

}  // namespace

void bind_gpu(py::module_& module) {
  bind_plan(module);
  bind_view_tables(module);
  bind_views(module);
  py::class_<GpuKernel>(module, "GpuKernel", "One compiled attention kernel.")
      .def_readonly("name", &GpuKernel::name)
      .def_readonly("head_dim", &GpuKernel::head_dim)
      .def_readonly("item_rows", &GpuKernel::item_rows)
      .def_readonly("stages", &GpuKernel::stages)
      .def_readonly("threads", &GpuKernel::threads)
      .def_readonly("shared_bytes", &GpuKernel::shared_bytes)
      .def_readonly("wide", &GpuKernel::wide)
      .def_readonly("coded", &GpuKernel::coded);
  py::class_<GpuBackend>(module, "GpuBackend", "The kernels of a GPU, or of the emulated one.")
      .def_property_readonly("architectures", &GpuBackend::architectures)
      .def_property_readonly("kernels", &GpuBackend::kernels)
      .def(
          "capability",
          [](const GpuBackend& gpu, int index) { return gpu.device(index).capability; },
          py::arg("device"))
      .def("check", &GpuBackend::check, py::arg("kind"), py::arg("device"))
      .def(
          "plan",
          [](const GpuBackend& gpu, const Plan& plan, const AttentionKind& kind, int device) {
            return gpu.plan(arrays_of(plan), kind, device);
          },
          py::arg("plan"), py::arg("kind"), py::arg("device"))
      .def(
          "views",
          [](const GpuBackend& gpu, const ViewTables& views, const AttentionKind& kind,
             const CapacityTuple& c, int device) {
            return gpu.views(arrays_of(views), kind, {c[0], c[1], c[2], c[3]}, device);
          },
          py::arg("views"), py::arg("kind"), py::arg("capacity"), py::arg("device"))
      .def(
          "append",
          [](const GpuBackend& gpu, const Rows& k, const Rows& v, const Pool& pool, int64_t slots,
             int64_t rows, int64_t stream) {
            const py::gil_scoped_release release;
            gpu.append(k, v, pool, pointer<const int64_t>(slots), rows, pointer(stream));
          },
          py::arg("k"), py::arg("v"), py::arg("pool"), py::arg("slots"), py::arg("rows"),
          py::arg("stream"))
      .def(
          "copy_tokens",
          [](const GpuBackend& gpu, const Pool& pool, int64_t copies, int64_t count,
             int64_t stream) {
            gpu.copy_tokens(pool, pointer<const PlanCopy>(copies), count, pointer(stream));
          },
          py::arg("pool"), py::arg("copies"), py::arg("count"), py::arg("stream"))
      .def(
          "sample",
          [](const GpuBackend& gpu, const SampleCall& call, int64_t stream) {
            const py::gil_scoped_release release;
            gpu.sample(call, pointer(stream));
          },
          py::arg("call"), py::arg("stream"));
  module.def(
      "gpu", [](bool emulated) { return emulated ? emulated_backend() : cuda_backend(); },
      py::arg("emulated"), py::return_value_policy::reference);
  bind_counts(module);
  module.def("run_broken_kernel", &run_broken_kernel, py::arg("name"));
  module.def(
      "set_emulated_device",
      [](int capability, int multiprocessors, int shared_per_block, int shared_per_multiprocessor,
         int64_t most_part_bytes, uint64_t seed) {
        set_emulated_device({capability, multiprocessors, shared_per_block,
                             shared_per_multiprocessor, most_part_bytes},
                            seed);
      },
      py::arg("capability"), py::arg("multiprocessors"), py::arg("shared_per_block"),
      py::arg("shared_per_multiprocessor"), py::arg("most_part_bytes"), py::arg("seed"));
}

}  // namespace apr::bindings
