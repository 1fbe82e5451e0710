// Python's door to the core: the thread table, segments and steps.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#include "core/error.h"
#include "core/step.h"
#include "core/thread_table.h"
#include "core/view_tables.h"

namespace apr::bindings {

namespace py = pybind11;

namespace {

// (segment, offset or None, hi or None, lo, inherited)
using EntryTuple =
    std::tuple<SegmentId, std::optional<int64_t>, std::optional<int64_t>, int64_t, bool>;

Entry entry_of(const EntryTuple& t) {
  Entry entry;
  entry.segment = std::get<0>(t);
  entry.offset = std::get<1>(t).value_or(kMoving);
  entry.hi = std::get<2>(t).value_or(kLive);
  entry.lo = std::get<3>(t);
  entry.inherited = std::get<4>(t);
  return entry;
}

std::vector<Entry> entries_of(const std::vector<EntryTuple>& tuples) {
  std::vector<Entry> entries;
  for (const EntryTuple& t : tuples) entries.push_back(entry_of(t));
  return entries;
}

EntryTuple tuple_of(const Entry& e) {
  return {e.segment, e.offset == kMoving ? std::nullopt : std::optional(e.offset),
          e.hi == kLive ? std::nullopt : std::optional(e.hi), e.lo, e.inherited};
}

template <typename T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::unique_ptr<Step> make_step(ThreadTable& table, const std::vector<ThreadId>& threads,
                                const std::vector<bool>& has_logits, int64_t step_tokens,
                                bool ragged) {
  if (has_logits.size() != threads.size()) {
    throw Error(ErrorKind::kInvalidInput, "step: got " + std::to_string(has_logits.size()) +
                                              " flags for " + std::to_string(threads.size()) +
                                              " threads; expected one each");
  }
  std::vector<StepThread> requests;
  requests.reserve(threads.size());
  for (size_t i = 0; i < threads.size(); ++i) requests.push_back({threads[i], has_logits[i]});
  return std::make_unique<Step>(table, requests, step_tokens, ragged);
}

void bind_plan(py::module_& module) {
  py::class_<Plan>(module, "Plan", "Flat work arrays of one packed forward.")
      .def_property_readonly("num_rows", &Plan::num_rows)
      .def_property_readonly("num_pairs", [](const Plan& p) { return p.pairs.size(); })
      .def_property_readonly("num_segments", &Plan::num_segments)
      .def_property_readonly("ids", [](const Plan& p) { return array_of(p.ids); })
      .def_property_readonly("positions", [](const Plan& p) { return array_of(p.positions); })
      .def_property_readonly("furthest_view",
                             [](const Plan& p) {
                               int32_t furthest = 0;
                               for (const PlanRun& run : p.runs) {
                                 const int32_t last = run.stride * (run.row_count - 1);
                                 furthest = std::max(furthest, run.view_position + last);
                               }
                               return furthest;
                             })
      .def_property_readonly("page_size", [](const Plan& p) { return p.page_size; })
      .def_property_readonly("pages_needed",
                             [](const Plan& p) {
                               int64_t most = -1;
                               for (const int32_t page : p.page_table)
                                 most = std::max<int64_t>(most, page);
                               for (const int64_t slot : p.slots)
                                 most = std::max(most, slot / p.page_size);
                               return most + 1;
                             })
      .def_property_readonly("rotations", [](const Plan& p) { return array_of(p.rotations); })
      .def_property_readonly("slots", [](const Plan& p) { return array_of(p.slots); })
      .def_property_readonly("writers", [](const Plan& p) { return array_of(p.writers); })
      .def_property_readonly("copies",
                             [](const Plan& p) {
                               const auto* flat = reinterpret_cast<const int64_t*>(p.copies.data());
                               const auto count = static_cast<py::ssize_t>(p.copies.size());
                               return py::array_t<int64_t>({count, py::ssize_t{2}}, flat);
                             })
      .def_property_readonly("num_copies", [](const Plan& p) { return p.copies.size(); });
}

void bind_segments(py::class_<ThreadTable>& table) {
  table
      .def(
          "create_segment",
          [](ThreadTable& t, const std::vector<int32_t>& tokens, int64_t base,
             const std::vector<EntryTuple>& after) {
            return t.create_segment(tokens, base, entries_of(after));
          },
          py::arg("tokens"), py::arg("base"), py::arg("after"))
      .def("create_region", &ThreadTable::create_region, py::arg("tokens"), py::arg("base"),
           py::arg("stride"))
      .def("seal", &ThreadTable::seal)
      .def("retain_segment", [](ThreadTable& t, SegmentId id) { t.segments().retain(id); })
      .def("release_segment",
           [](ThreadTable& t, SegmentId id) {
             t.touch();
             t.segments().release(id);
           })
      .def("segment_length",
           [](ThreadTable& t, SegmentId id) { return t.segments().at(id).length(); })
      .def("segment_encoded",
           [](ThreadTable& t, SegmentId id) { return t.segments().at(id).encoded; })
      .def("segment_base", [](ThreadTable& t, SegmentId id) { return t.segments().at(id).base; })
      .def("segment_stride",
           [](ThreadTable& t, SegmentId id) { return t.segments().at(id).stride; })
      .def("segment_sealed",
           [](ThreadTable& t, SegmentId id) { return t.segments().at(id).sealed; })
      .def("segment_pages", [](ThreadTable& t, SegmentId id) { return t.segments().at(id).pages; })
      .def("segment_tokens", [](ThreadTable& t, SegmentId id) {
        const Segment& s = t.segments().at(id);
        return std::vector<int32_t>(s.tokens.begin() + s.copied, s.tokens.end());
      });
}

void bind_table(py::module_& module) {
  py::enum_<JoinPositions>(module, "JoinPositions", "Where joined parts stand.")
      .value("max", JoinPositions::kMax)
      .value("sum", JoinPositions::kSum)
      .value("keep", JoinPositions::kKeep);
  py::class_<ThreadTable> table(module, "ThreadTable",
                                "Threads, views and segments over a pool of pages.");
  table
      .def(py::init<int64_t, int64_t, bool>(), py::arg("num_pages"), py::arg("page_size"),
           py::arg("can_rotate"))
      .def("create", &ThreadTable::create)
      .def(
          "create_with_view",
          [](ThreadTable& t, const std::vector<EntryTuple>& view, std::optional<SegmentId> writes,
             bool current) {
            return t.create_with_view(entries_of(view), writes.value_or(kNone),
                                      current ? Visibility::kCurrent : Visibility::kPrevious);
          },
          py::arg("view"), py::arg("writes"), py::arg("current"))
      .def("extend", &ThreadTable::extend)
      .def("extend_each", &ThreadTable::extend_each)
      .def("fork", &ThreadTable::fork)
      .def("join", &ThreadTable::join, py::arg("parent"), py::arg("children"), py::arg("positions"),
           py::arg("reencode"))
      .def("trim", &ThreadTable::trim)
      .def("release", &ThreadTable::release)
      .def("alive", &ThreadTable::alive)
      .def("length", &ThreadTable::length)
      .def("position", &ThreadTable::position)
      .def("tokens", &ThreadTable::tokens)
      .def(
          "own_tokens",
          [](const ThreadTable& t, ThreadId id, size_t begin) {
            const std::vector<int32_t>& all = t.at(id).own_tokens;
            return std::vector<int32_t>(all.begin() + std::min(begin, all.size()), all.end());
          },
          py::arg("thread"), py::arg("begin") = 0)
      .def("own_length",
           [](const ThreadTable& t, ThreadId id) { return t.at(id).own_tokens.size(); })
      .def("tail", [](const ThreadTable& t, ThreadId id) { return t.at(id).tail; })
      .def("is_current", [](const ThreadTable& t,
                            ThreadId id) { return t.at(id).visibility == Visibility::kCurrent; })
      .def("queued",
           [](ThreadTable& t, ThreadId id) { return t.segments().at(t.at(id).tail).queued(); })
      .def("set_writes", &ThreadTable::set_writes)
      .def("set_view",
           [](ThreadTable& t, ThreadId id, const std::vector<EntryTuple>& view) {
             t.set_view(id, entries_of(view));
           })
      .def("view",
           [](const ThreadTable& t, ThreadId id) {
             std::vector<EntryTuple> view;
             for (const Entry& entry : t.at(id).view) view.push_back(tuple_of(entry));
             return view;
           })
      .def("sharing",
           [](ThreadTable& t) {
             const Sharing s = t.sharing();
             return std::make_tuple(s.stored_tokens, s.seen_tokens, s.shared_pages,
                                    s.replicated_pages);
           })
      .def("keep_states", &ThreadTable::keep_states, py::arg("checkpoint_tokens"),
           py::arg("one_token"))
      .def("nearest_state", &ThreadTable::nearest_state, py::arg("thread"), py::arg("length"))
      .def("take_freed_states", [](ThreadTable& t) { return t.segments().states().take_freed(); })
      .def_property_readonly("num_states",
                             [](ThreadTable& t) { return t.segments().states().size(); })
      .def_property_readonly("num_threads", &ThreadTable::num_threads)
      .def_property_readonly("num_segments", [](ThreadTable& t) { return t.segments().size(); })
      .def_property_readonly("num_pages", [](ThreadTable& t) { return t.pool().num_pages(); })
      .def_property_readonly("used_pages", [](ThreadTable& t) { return t.pool().num_used(); })
      .def_property_readonly("peak_pages", [](ThreadTable& t) { return t.pool().peak_used(); })
      .def_property_readonly("page_size", [](ThreadTable& t) { return t.pool().page_size(); });
  bind_segments(table);
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
      .def("commit", &ViewTables::commit)
      .def("forget", &ViewTables::forget, py::arg("table"))
      .def_property_readonly("changed", &ViewTables::changed)
      .def_property_readonly("ids", [](const ViewTables& v) { return array_of(v.ids()); })
      .def_property_readonly("max_position", &ViewTables::max_position)
      .def_property_readonly("sizes", [](const ViewTables& v) {
        return std::make_tuple(v.rows().size(), v.entries().size(), v.segments().size(),
                               v.page_table().size());
      });
}

}  // namespace

void bind_core(py::module_& module) {
  bind_plan(module);
  bind_table(module);
  bind_view_tables(module);
  py::class_<Step>(module, "Step", "One step as a transaction.")
      .def(py::init(&make_step), py::arg("table"), py::arg("threads"), py::arg("has_logits"),
           py::arg("step_tokens"), py::arg("ragged") = false, py::keep_alive<1, 2>())
      .def("next", &Step::next)
      .def("commit", &Step::commit)
      .def("rollback", &Step::rollback)
      .def_property_readonly("plan", &Step::plan, py::return_value_policy::reference_internal)
      .def_property_readonly("copied_tokens", &Step::copied_tokens)
      .def_property_readonly("logits_rows", &Step::logits_rows)
      .def("take_freed_states", &Step::take_freed_states)
      .def_property_readonly("starts", &Step::starts)
      .def_property_readonly("ends", &Step::ends);
}

}  // namespace apr::bindings
