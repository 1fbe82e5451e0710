// Python's door to the machine: which kernels were built and run here, threads, memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cerrno>
#include <string>
#include <vector>

#include "bindings/tensor.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/parallel.h"
#include "kernels/gpu.h"

namespace apr::bindings {
namespace {

// The emulated GPU serves CPU tensors while it is forced, like an instruction set that is never
// chosen.
constexpr const char* kEmulated = "cuda_emulated";
std::atomic<bool> emulating{false};

}  // namespace

void bind_machine(py::module_& module) {
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto* set : cpu::instruction_sets()) names.emplace_back(set->name);
    return names;
  });
  module.def("instruction_set", [] {
    return emulating ? std::string(kEmulated) : std::string(cpu::instruction_set().name);
  });
  module.def(
      "force_instruction_set",
      [](const std::string& name) {
        const bool emulate = name == kEmulated && emulated_backend() != nullptr;
        cpu::force_instruction_set(emulate ? "" : name);
        emulating = emulate;
      },
      py::arg("name"));
  module.def(
      "use_huge_pages",
      [](int64_t data, int64_t bytes) {
        cpu::use_huge_pages(pointer(data), static_cast<size_t>(bytes));
      },
      py::arg("data"), py::arg("bytes"));
  module.def(
      "populate",
      [](int64_t data, int64_t bytes) {
        const py::gil_scoped_release release;
        cpu::populate(pointer(data), static_cast<size_t>(bytes));
      },
      py::arg("data"), py::arg("bytes"));
  module.def(
      "map_file",
      [](int64_t data, int64_t bytes, int file, int64_t offset) {
        const int error = cpu::map_file(pointer(data), static_cast<size_t>(bytes), file, offset);
        if (error == 0) return;
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
        throw py::error_already_set();
      },
      py::arg("data"), py::arg("bytes"), py::arg("file"), py::arg("offset"));
  module.def("has_openmp", &cpu::has_openmp);
  module.def("force_own_workers", &cpu::force_own_workers, py::arg("own"));
}

}  // namespace apr::bindings
