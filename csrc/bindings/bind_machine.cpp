// Python's door to the machine: which kernels were built and run here, threads, memory, and the
// rates that benchmarks set beside a kernel's figures.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <numeric>
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

// Multiplications and additions done by `rounds` on each thread, in a dtype's widest unit.
int64_t operate(int64_t dtype, int64_t rounds, int threads) {
  const py::gil_scoped_release release;
  std::vector<int64_t> done(static_cast<size_t>(threads), 0);
  const auto body = [&](int64_t i) {
    done[static_cast<size_t>(i)] = cpu::instruction_set().operate[dtype](rounds);
  };
  cpu::parallel(threads, {{threads, body}});
  return std::accumulate(done.begin(), done.end(), int64_t{0});
}

// The sum of `count` floats, read once by all threads together.
float read(int64_t data, int64_t count, int threads) {
  const py::gil_scoped_release release;
  constexpr int64_t kGranule = 512;  // floats; what a share is a multiple of
  const int64_t share = count / threads / kGranule * kGranule;
  std::vector<float> sums(static_cast<size_t>(threads), 0.f);
  const auto* from = static_cast<const float*>(pointer(data));
  const auto body = [&](int64_t i) {
    sums[static_cast<size_t>(i)] = cpu::instruction_set().read(from + i * share, share);
  };
  cpu::parallel(threads, {{threads, body}});
  return std::accumulate(sums.begin(), sums.end(), 0.f);
}

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
  module.def("operate", &operate, py::arg("dtype"), py::arg("rounds"), py::arg("threads"));
  module.def("read", &read, py::arg("data"), py::arg("count"), py::arg("threads"));
  module.def("has_openmp", &cpu::has_openmp);
  module.def("force_own_workers", &cpu::force_own_workers, py::arg("own"));
}

}  // namespace apr::bindings
