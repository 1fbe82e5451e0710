// What must hold under an interrupt, wherever it comes: Python raises it between two of its own
// instructions, never inside of a call of ours.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <list>
#include <memory>
#include <utility>

#include "core/error.h"
#include "core/thread_table.h"

namespace apr::bindings {

namespace py = pybind11;

// What Python holds of a thread or segment. It is there before what it is for, so that an interrupt
// or a lack of memory leaves nothing without a handle.
template <Dropped& (ThreadTable::*dropped)()>
class Handle {
 public:
  explicit Handle(std::shared_ptr<ThreadTable> table) : table_(std::move(table)) {}
  ~Handle() {
    if (number() != kNone) (table_.get()->*dropped)().note(number_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  int64_t number() const { return number_.front(); }
  void hold(int64_t number) { number_.front() = number; }

 private:
  std::shared_ptr<ThreadTable> table_;
  std::list<int64_t> number_{kNone};
};

using Table = std::shared_ptr<ThreadTable>;
using ThreadHandle = Handle<&ThreadTable::dropped_threads>;
using SegmentHandle = Handle<&ThreadTable::dropped_segments>;

// A handle of what `make` returns the number of.
template <typename Kind, typename Make>
std::unique_ptr<Kind> held(const Table& table, const Make& make) {
  auto handle = std::make_unique<Kind>(table);
  handle->hold(make());
  return handle;
}

// Whose step a session is in.
class Turn {
 public:
  void take(const py::object& who) {
    if (taken()) {
      throw Error(ErrorKind::kInvalidInput,
                  "step: a step is running, in another Python thread or around this call; "
                  "take turns, or give each Python thread a session of its own on the same model");
    }
    who_ = who.ptr();
  }
  // Safe to call twice, and by a caller that was refused.
  void leave(const py::object& who) {
    if (who_ == who.ptr()) who_ = nullptr;
  }
  bool taken() const { return who_ != nullptr; }

 private:
  const PyObject* who_ = nullptr;
};

}  // namespace apr::bindings
