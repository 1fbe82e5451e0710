// Python's door to the core: the thread table, segments and steps.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#include "bindings/handles.h"
#include "bindings/tensor.h"
#include "core/archive.h"
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

using Notes = py::typing::List<py::int_>;

EntryTuple tuple_of(const Entry& e) {
  return {e.segment, e.offset == kMoving ? std::nullopt : std::optional(e.offset),
          e.hi == kLive ? std::nullopt : std::optional(e.hi), e.lo, e.inherited};
}

std::vector<std::unique_ptr<ThreadHandle>> fork(const Table& table, ThreadId id, int64_t count) {
  table->check_fork(id, count);
  std::vector<std::unique_ptr<ThreadHandle>> handles;
  for (int64_t i = 0; i < count; ++i) handles.push_back(std::make_unique<ThreadHandle>(table));
  const std::vector<ThreadId> numbers = table->fork(id, count);
  for (size_t i = 0; i < numbers.size(); ++i) handles[i]->hold(numbers[i]);
  return handles;
}

// Tokens that a run chose, one for each thread, and put down in the run's own lists `notes` too:
// one call, so that no interrupt comes between.
void extend_each(ThreadTable& table, const std::vector<ThreadId>& threads,
                 const std::vector<int32_t>& tokens, const std::vector<bool>& drawn,
                 const std::vector<Notes>& notes) {
  if (!notes.empty() && notes.size() != threads.size()) {
    throw Error(ErrorKind::kInvalidInput, "extend: expected one list for each thread, or none");
  }
  std::vector<py::int_> numbers;
  for (size_t i = 0; i < notes.size(); ++i) numbers.emplace_back(tokens.at(i));
  table.extend_each(threads, tokens, drawn);
  for (size_t i = 0; i < notes.size(); ++i) {
    if (PyList_Append(notes[i].ptr(), numbers[i].ptr()) != 0) throw py::error_already_set();
  }
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
      .def_property_readonly("digest", &Plan::digest)
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

template <typename Kind>
void bind_handle(py::module_& module, const char* name) {
  py::class_<Kind>(module, name, "Gives back what it stands for when it is let go.")
      .def_property_readonly("number", &Kind::number)
      .def("__index__", &Kind::number)
      .def("__int__", &Kind::number);
}

void bind_segments(py::class_<ThreadTable, Table>& table) {
  table
      .def(
          "create_segment",
          [](const Table& t, const std::vector<int32_t>& tokens, int64_t base,
             const std::vector<EntryTuple>& after) {
            return held<SegmentHandle>(
                t, [&] { return t->create_segment(tokens, base, entries_of(after)); });
          },
          py::arg("tokens"), py::arg("base"), py::arg("after"))
      .def(
          "create_region",
          [](const Table& t, const std::vector<int32_t>& tokens, int64_t base, int64_t stride) {
            return held<SegmentHandle>(t, [&] { return t->create_region(tokens, base, stride); });
          },
          py::arg("tokens"), py::arg("base"), py::arg("stride"))
      .def("seal", &ThreadTable::seal)
      .def("hold_segment",
           [](const Table& t, SegmentId id) {
             return held<SegmentHandle>(t, [&] {
               t->segments().retain(id);
               return id;
             });
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
  py::class_<Turn>(module, "Turn",
                   "Whose turn it is, or whether something runs: it begins before its entry calls "
                   "`entered`, if there is one, and ends before its exit calls `left`, if "
                   "there is one.")
      .def(py::init<>())
      .def("take", &Turn::take, py::arg("who"))
      .def("leave", &Turn::leave, py::arg("who"))
      .def_property_readonly("taken", &Turn::taken)
      .def("__enter__",
           [](const py::object& self) {
             Turn& turn = self.cast<Turn&>();
             turn.take(self);
             try {
               if (py::hasattr(self, "entered")) self.attr("entered")();
             } catch (py::error_already_set&) {
               turn.leave(self);
               throw;
             }
             return self;
           })
      .def("__exit__",
           [](const py::object& self, const py::object&, const py::object&, const py::object&) {
             self.cast<Turn&>().leave(self);
             if (py::hasattr(self, "left")) self.attr("left")();
           });
  bind_handle<ThreadHandle>(module, "ThreadHandle");
  bind_handle<SegmentHandle>(module, "SegmentHandle");
  py::class_<ThreadTable, Table> table(module, "ThreadTable",
                                       "Threads, views and segments over a pool of pages.");
  table
      .def(py::init<int64_t, int64_t, bool, int64_t>(), py::arg("num_pages"), py::arg("page_size"),
           py::arg("can_rotate"), py::arg("most_pages") = 0)
      .def("create",
           [](const Table& t, const std::vector<int32_t>& tokens) {
             return held<ThreadHandle>(t, [&] { return t->create(tokens); });
           })
      .def(
          "create_with_view",
          [](const Table& t, const std::vector<EntryTuple>& view, std::optional<SegmentId> writes,
             bool current, const std::vector<int32_t>& tokens) {
            const auto visibility = current ? Visibility::kCurrent : Visibility::kPrevious;
            return held<ThreadHandle>(t, [&] {
              return t->create_with_view(entries_of(view), writes.value_or(kNone), visibility,
                                         tokens);
            });
          },
          py::arg("view"), py::arg("writes"), py::arg("current"),
          py::arg("tokens") = std::vector<int32_t>())
      .def("extend", &ThreadTable::extend)
      .def("extend_each", &extend_each, py::arg("threads"), py::arg("tokens"), py::arg("drawn"),
           py::arg("notes") = std::vector<Notes>())
      .def("fork", &fork)
      .def("join", &ThreadTable::join, py::arg("parent"), py::arg("children"), py::arg("positions"),
           py::arg("reencode"))
      .def("trim", &ThreadTable::trim)
      .def("drop", &ThreadTable::drop, py::arg("thread"), py::arg("start"), py::arg("stop"))
      .def("release", &ThreadTable::release)
      .def("release_dropped", &ThreadTable::release_dropped)
      .def("clear", &ThreadTable::clear)
      .def("check", &ThreadTable::check, py::arg("handles"))
      .def(
          "save",
          [](ThreadTable& t, const std::vector<ThreadId>& threads,
             const std::vector<SegmentId>& segments, bool keys) {
            const Archive archive = save(t, threads, segments, keys);
            return std::make_tuple(array_of(archive.numbers), archive.pages, archive.filled);
          },
          py::arg("threads"), py::arg("segments"), py::arg("keys") = true)
      .def(
          "stored_slots",
          [](const ThreadTable& t, ThreadId id) { return array_of(stored_slots(t, id)); },
          py::arg("thread"))
      .def(
          "load",
          [](const Table& t, const std::vector<int64_t>& numbers) {
            return load(*t, numbers).pages;
          },
          py::arg("numbers"))
      .def("hold_thread",
           [](const Table& t, ThreadId id) {
             return held<ThreadHandle>(t, [&] { return t->at(id), id; });
           })
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
      .def("edits",
           [](const ThreadTable& t, const std::vector<ThreadId>& ids) {
             std::vector<int64_t> edits;
             for (const ThreadId id : ids) edits.push_back(t.alive(id) ? t.at(id).edits : kNone);
             return edits;
           })
      .def("draws",
           [](const ThreadTable& t, const std::vector<ThreadId>& ids) {
             std::vector<int64_t> draws;
             for (const ThreadId id : ids) draws.push_back(t.at(id).draws);
             return draws;
           })
      .def("forks", [](const ThreadTable& t, ThreadId id) { return t.at(id).forks; })
      .def("trims", [](const ThreadTable& t, ThreadId id) { return t.at(id).trims; })
      .def("is_line", [](const ThreadTable& t, ThreadId id) { return t.at(id).is_line; })
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
      .def("make_room", &ThreadTable::make_room, py::arg("pages"))
      .def(
          "needs_of",
          [](ThreadTable& t, const std::vector<ThreadId>& threads,
             const std::vector<SegmentId>& handles, bool all_of_it) {
            const StepNeeds needs = t.needs_of(threads, handles, all_of_it);
            return std::make_tuple(needs.pages, needs.away);
          },
          py::arg("threads"), py::arg("handles"), py::arg("all_of_it"))
      .def("idle_segments", &ThreadTable::idle_segments)
      .def("follows_others", &ThreadTable::follows_others, py::arg("threads"))
      .def("send_away", &ThreadTable::send_away)
      .def("make_place", &ThreadTable::make_place)
      .def("bring_back", &ThreadTable::bring_back)
      .def("away_pages",
           [](const ThreadTable& t, SegmentId id) {
             return t.segments().contains(id) ? t.segments().at(id).away_pages : 0;
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
      .def("states_of", &ThreadTable::states_of, py::arg("threads"))
      .def("freed_states", [](ThreadTable& t) { return t.segments().states().freed(); })
      .def("forget_freed_states", [](ThreadTable& t) { t.segments().states().forget_freed(); })
      .def_property_readonly("num_states",
                             [](ThreadTable& t) { return t.segments().states().size(); })
      .def_property_readonly("num_threads", &ThreadTable::num_threads)
      .def_property_readonly("num_segments", [](ThreadTable& t) { return t.segments().size(); })
      .def_property_readonly("num_pages", [](ThreadTable& t) { return t.pool().num_pages(); })
      .def(
          "grow", [](ThreadTable& t, int64_t pages) { t.pool().grow(pages); }, py::arg("pages"))
      .def_property_readonly("used_pages", [](ThreadTable& t) { return t.pool().num_used(); })
      .def_property_readonly("offloaded_pages", &ThreadTable::offloaded_pages)
      .def_property_readonly("free_pages", [](ThreadTable& t) { return t.pool().num_free(); })
      .def_property_readonly("peak_pages", [](ThreadTable& t) { return t.pool().peak_used(); })
      .def_property_readonly("page_size", [](ThreadTable& t) { return t.pool().page_size(); });
  module.attr("AWAY_PAGE") = kAwayPage;
  bind_segments(table);
}

}  // namespace

void bind_core(py::module_& module) {
  bind_plan(module);
  bind_table(module);
  py::class_<Step>(module, "Step", "One step as a transaction.")
      .def(py::init(&make_step), py::arg("table"), py::arg("threads"), py::arg("has_logits"),
           py::arg("step_tokens"), py::arg("ragged") = false, py::keep_alive<1, 2>())
      .def("next", &Step::next)
      .def("commit", &Step::commit)
      .def("rollback", &Step::rollback)
      .def_property_readonly("plan", &Step::plan, py::return_value_policy::reference_internal)
      .def_property_readonly("copied_tokens", &Step::copied_tokens)
      .def_property_readonly("logits_rows", &Step::logits_rows)
      .def("freed_states", [](Step& s) { return s.states().freed(); })
      .def("forget_freed_states", [](Step& s) { s.states().forget_freed(); })
      .def_property_readonly("starts", &Step::starts)
      .def_property_readonly("ends", &Step::ends);
}

}  // namespace apr::bindings
