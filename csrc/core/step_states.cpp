// Steps of models with layer states: lines of tokens are cut where a state has to be kept, and each
// forward takes pieces of one length that all begin at a state that is there.
#include <algorithm>

#include "core/error.h"
#include "core/step.h"
#include "core/view.h"

namespace apr {

SegmentStates& Step::change_states(SegmentId id) {
  Segment& segment = table_.segments().at(id);
  if (saved_states_.emplace(id, segment.states).second) {
    for (const auto& [count, state] : segment.states) table_.segments().states().retain(state);
  }
  return segment.states;
}

// Cuts what has to run into pieces, and puts before them what has to run again because the state
// that it left was not kept.
void Step::cut_into_pieces() {
  for (const Run& run : runs_) {
    const Segment& segment = table_.segments().at(run.segment);
    const int64_t to = run.replay == kNone ? segment.required : run.to;
    require_state(run.segment, run.from, *run.view);
    cut(run, to);
  }
  // A thread that has written nothing takes the state that it begins with when the step ends.
  for (const StepThread& request : threads_) {
    const Thread& thread = table_.at(request.thread);
    if (table_.segments().at(thread.tail).length() > 0) continue;
    if (const Entry* last = entry_before(thread.view, thread.tail))
      ++uses_[{last->segment, last->hi}];
  }
}

bool Step::has_state(const Place& place) const {
  return table_.segments().at(place.first).states.count(place.second) != 0 ||
         planned_.count(place) != 0;
}

// Puts pieces down that leave the state after `count` tokens of a segment, where it is not there.
void Step::require_state(SegmentId id, int64_t count, const std::vector<Entry>& view) {
  if (has_state({id, count})) return;
  const int64_t begin = -table_.segments().at(id).copied;
  if (count == begin) {
    if (const Entry* last = entry_before(view, id)) {
      const auto end = std::find_if(view.begin(), view.end(),
                                    [&](const Entry& e) { return e.segment == last->segment; });
      replay_views_.emplace_back(view.begin(), end + 1);
      require_state(last->segment, last->hi, replay_views_.back());
    }
    return;
  }
  int64_t from = count - 1;
  while (from > begin && !has_state({id, from})) --from;
  require_state(id, from, view);
  Run again{id, from, count, &view, Visibility::kPrevious};
  again.appends = false;
  cut(again, count);
}

void Step::cut(Run run, int64_t to) {
  Segment& segment = table_.segments().at(run.segment);
  const int64_t every = table_.checkpoint_tokens();
  run.start = {run.segment, run.from};
  if (run.from == -segment.copied && !has_state(run.start)) {
    const Entry* last = entry_before(*run.view, run.segment);
    run.start = last == nullptr ? kBeginning : Place{last->segment, last->hi};
  }
  while (run.from < to) {
    run.to = to;
    if (!ragged_) {
      if (segment.stamp == stamp_) {
        for (const int64_t stop : segment.stops) {
          if (stop > run.from) run.to = std::min(run.to, stop);
        }
      }
      if (every > 0) run.to = std::min(run.to, (run.from / every + 1) * every);
      run.to = std::min(run.to, run.from + step_tokens_);
      if (table_.one_token_a_state() && run.start != kBeginning) run.to = run.from + 1;
    }
    pieces_.push_back(run);
    ++uses_[run.start];
    planned_.insert({run.segment, run.to});
    run.from = run.to;
    run.start = {run.segment, run.from};
  }
}

// The state that a piece begins with; kNone at the beginning of a line.
std::optional<StateId> Step::start_of(const Run& run) {
  if (run.start == kBeginning) return kNone;
  const auto [id, count] = run.start;
  const SegmentStates& states = table_.segments().at(id).states;
  const auto found = states.find(count);
  if (found == states.end()) return std::nullopt;
  const StateId state = found->second;
  if (id != run.segment) {  // a forked line keeps where it began
    const auto [own, is_new] = change_states(run.segment).emplace(run.from, state);
    if (is_new) table_.segments().states().retain(state);
  }
  return state;
}

// Lets states go that the last forward began with, and that nothing else will.
void Step::forget_used() {
  SegmentStore& segments = table_.segments();
  for (const Run& piece : chunk_runs_) {
    const auto [id, count] = piece.start;
    if (piece.start == kBeginning || --uses_[piece.start] > 0) continue;
    const auto saved = saved_states_.find(id);
    const bool is_new = saved != saved_states_.end() && saved->second.count(count) == 0;
    Segment& segment = segments.at(id);
    const auto state = segment.states.find(count);
    if (!is_new || state == segment.states.end() || stays(segment, count)) continue;
    segments.states().release(state->second);
    segment.states.erase(state);
  }
}

bool Step::stays(const Segment& segment, int64_t count) const {
  return count == segment.encoded || table_.keeps_state_after(count);
}

void Step::next_pieces() {
  starts_.clear();
  ends_.clear();
  int64_t room = step_tokens_, length = 0;
  bool begins = false;
  std::vector<Run> later;
  std::set<SegmentId> waiting;  // pieces of one segment run in their order
  for (const Run& piece : pieces_) {
    const bool first = chunk_runs_.empty();
    const int64_t size = piece.to - piece.from;
    const bool blocked = waiting.count(piece.segment) != 0;
    const std::optional<StateId> start = blocked ? std::nullopt : start_of(piece);
    const bool alike = start && size == length && (*start == kNone) == begins && size <= room;
    if (!start || !(first || ragged_ || alike)) {
      waiting.insert(piece.segment);
      later.push_back(piece);
      continue;
    }
    if (first) {
      length = size;
      begins = *start == kNone;
    }
    waiting.insert(piece.segment);
    starts_.push_back(*start);
    chunk_runs_.push_back(piece);
    room -= size;
  }
  if (chunk_runs_.empty() && !later.empty()) invalid("step: pieces wait for each other");
  pieces_.swap(later);
  for (const Run& piece : chunk_runs_) {
    add_rows(piece);
    SegmentStates& states = change_states(piece.segment);
    const auto [at, is_new] = states.emplace(piece.to, kNone);
    if (is_new) at->second = table_.segments().states().create();
    ends_.push_back(is_new ? at->second : kNone);
  }
}

// Of each segment the last state stays, the one that it began with, and the checkpoints.
void Step::commit_states() {
  SegmentStore& segments = table_.segments();
  for (const StepThread& request : threads_) {
    if (!table_.alive(request.thread)) continue;
    const Thread& thread = table_.at(request.thread);
    table_.inherit_state(thread.tail, entry_before(thread.view, thread.tail));
  }
  for (const auto& [id, saved] : saved_states_) {
    segments.states().release_all(saved);
    if (!segments.contains(id)) continue;
    Segment& segment = segments.at(id);
    std::erase_if(segment.states, [&](const auto& state) {
      const bool goes = !stays(segment, state.first);
      if (goes) segments.states().release(state.second);
      return goes;
    });
  }
  saved_states_.clear();
}

void Step::restore_states() {
  SegmentStore& segments = table_.segments();
  for (auto& [id, saved] : saved_states_) {
    if (!segments.contains(id)) {
      segments.states().release_all(saved);
      continue;
    }
    segments.states().release_all(segments.at(id).states);
    segments.at(id).states = std::move(saved);
  }
  saved_states_.clear();
}

}  // namespace apr
