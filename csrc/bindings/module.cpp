// The extension module: a list of init calls, and the translation of the core's errors.
#include <pybind11/pybind11.h>

#include "core/error.h"

namespace apr::bindings {

namespace py = pybind11;

void bind_core(py::module_& module);
void bind_gpu(py::module_& module);
void bind_machine(py::module_& module);
void bind_ops(py::module_& module);
void bind_sample(py::module_& module);
void bind_tensors(py::module_& module);

namespace {

const char* class_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalidInput:
      return "InvalidInput";
    case ErrorKind::kOutOfPages:
      return "OutOfPages";
    case ErrorKind::kThreadReleased:
      return "ThreadReleased";
    case ErrorKind::kForeignThread:
      return "ForeignThread";
    case ErrorKind::kUnsupportedRope:
      return "UnsupportedRope";
  }
  return "Error";
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& error) {
    const py::object type = py::module_::import("apr.errors").attr(class_name(error.kind()));
    PyErr_SetString(type.ptr(), error.what());
  }
}

}  // namespace
}  // namespace apr::bindings

PYBIND11_MODULE(_core, module) {
  module.doc() = "The native core of apr: threads and views, and the kernels.";
  pybind11::register_exception_translator(apr::bindings::translate);
  apr::bindings::bind_tensors(module);
  apr::bindings::bind_sample(module);
  apr::bindings::bind_core(module);
  apr::bindings::bind_gpu(module);
  apr::bindings::bind_machine(module);
  apr::bindings::bind_ops(module);
}
