// Python's door to the GPU back-ends: plans in device memory, append, attention.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/tensor.h"
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
std::string run_broken_kernel(const std::string&) {
  throw std::invalid_argument("this build has no emulation; build with APR_EMULATION=ON");
}
#endif
}  // namespace apr

namespace apr::bindings {
namespace {

// (dtype, q_heads, kv_heads, head_dim of k, of v, page_size, window, chunk, invariant)
using KindTuple =
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;

AttentionKind kind_of(const KindTuple& t) {
  const auto& [dtype, q_heads, kv_heads, dim_k, dim_v, page_size, window, chunk, invariant] = t;
  return {static_cast<DType>(dtype),
          q_heads,
          kv_heads,
          dim_k,
          dim_v,
          page_size,
          window,
          chunk,
          invariant};
}

void attention(const GpuPlan& plan, int64_t tables, int64_t parts, const RowsTuple& q,
               const RowsTuple& out, int64_t lse, const PoolTuple& pool_tuple, int64_t q_heads,
               double scale, double softcap, int64_t sinks, const RotationTuple& rotation,
               int64_t rotations, int64_t stream) {
  AttentionParams params{};
  params.q = rows(q);
  params.out = rows(out);
  params.lse = static_cast<float*>(pointer(lse));
  params.q_heads = q_heads;
  params.scale = static_cast<float>(scale);
  params.softcap = static_cast<float>(softcap);
  params.sinks = static_cast<const float*>(pointer(sinks));
  params.rotation = rotation_table(rotation);
  const py::gil_scoped_release release;
  plan.attention(pointer(tables), pointer(parts), params, pool(pool_tuple), rotations,
                 pointer(stream));
}

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
      .def("attention", &attention, py::arg("tables"), py::arg("parts"), py::arg("q"),
           py::arg("out"), py::arg("lse"), py::arg("pool"), py::arg("q_heads"), py::arg("scale"),
           py::arg("softcap"), py::arg("sinks"), py::arg("rotation"), py::arg("rotations"),
           py::arg("stream"));
}

// (rows, entries, segments, pages)
using CapacityTuple = std::array<int64_t, 4>;

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
            views.step(pointer(tables), static_cast<int64_t*>(pointer(slots)),
                       static_cast<int64_t*>(pointer(positions)), pointer(stream));
          },
          py::arg("tables"), py::arg("slots"), py::arg("positions"), py::arg("stream"))
      .def(
          "turn",
          [](const GpuViews& views, int64_t tables, int64_t inv_freq, int64_t pairs,
             int64_t cos_sin, int64_t stream) {
            const py::gil_scoped_release release;
            views.turn(pointer(tables), static_cast<const double*>(pointer(inv_freq)), pairs,
                       static_cast<float*>(pointer(cos_sin)), pointer(stream));
          },
          py::arg("tables"), py::arg("inv_freq"), py::arg("pairs"), py::arg("cos_sin"),
          py::arg("stream"));
}

}  // namespace

void bind_gpu(py::module_& module) {
  bind_plan(module);
  bind_views(module);
  py::class_<GpuKernel>(module, "GpuKernel", "One compiled attention kernel.")
      .def_readonly("name", &GpuKernel::name)
      .def_readonly("head_dim", &GpuKernel::head_dim)
      .def_readonly("item_rows", &GpuKernel::item_rows)
      .def_readonly("stages", &GpuKernel::stages)
      .def_readonly("threads", &GpuKernel::threads)
      .def_readonly("shared_bytes", &GpuKernel::shared_bytes)
      .def_readonly("wide", &GpuKernel::wide);
  py::class_<GpuBackend>(module, "GpuBackend", "The kernels of a GPU, or of the emulated one.")
      .def_property_readonly("architectures", &GpuBackend::architectures)
      .def_property_readonly("kernels", &GpuBackend::kernels)
      .def(
          "capability",
          [](const GpuBackend& gpu, int index) { return gpu.device(index).capability; },
          py::arg("device"))
      .def(
          "plan",
          [](const GpuBackend& gpu, const Plan& plan, const KindTuple& kind, int device) {
            return gpu.plan(arrays_of(plan), kind_of(kind), device);
          },
          py::arg("plan"), py::arg("kind"), py::arg("device"))
      .def(
          "views",
          [](const GpuBackend& gpu, const ViewTables& views, const KindTuple& kind,
             const CapacityTuple& c, int device) {
            return gpu.views(arrays_of(views), kind_of(kind), {c[0], c[1], c[2], c[3]}, device);
          },
          py::arg("views"), py::arg("kind"), py::arg("capacity"), py::arg("device"))
      .def(
          "append",
          [](const GpuBackend& gpu, const RowsTuple& k, const RowsTuple& v, const PoolTuple& p,
             int64_t slots, int64_t num_rows, int64_t stream) {
            const py::gil_scoped_release release;
            gpu.append(rows(k), rows(v), pool(p), static_cast<const int64_t*>(pointer(slots)),
                       num_rows, pointer(stream));
          },
          py::arg("k"), py::arg("v"), py::arg("pool"), py::arg("slots"), py::arg("rows"),
          py::arg("stream"))
      .def(
          "copy_tokens",
          [](const GpuBackend& gpu, const PoolTuple& p, int64_t copies, int64_t count,
             int64_t stream) {
            gpu.copy_tokens(pool(p), static_cast<const PlanCopy*>(pointer(copies)), count,
                            pointer(stream));
          },
          py::arg("pool"), py::arg("copies"), py::arg("count"), py::arg("stream"));
  module.def(
      "gpu", [](bool emulated) { return emulated ? emulated_backend() : cuda_backend(); },
      py::arg("emulated"), py::return_value_policy::reference);
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
