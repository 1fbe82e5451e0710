// Which states of recurrent layers threads begin with, can go back to, and hold.
#include "core/layer_states.h"

#include <algorithm>
#include <set>

#include "core/thread_table.h"
#include "core/view.h"

namespace apr {
namespace {

// Calls found(tokens of the thread before it, state) for each state on the way through its view.
template <typename Found>
void each_state(const SegmentStore& segments, const Thread& thread, Found found) {
  int64_t seen = 0;
  for (const Entry& entry : thread.view) {
    const Segment& segment = segments.at(entry.segment);
    const int64_t end = visible_end(entry, segment, IdleReader{thread.tail});
    for (const auto& [count, state] : segment.states) {
      if (count >= entry.lo && count <= end) found(seen + count - entry.lo, state);
    }
    seen += std::max<int64_t>(end - entry.lo, 0);
  }
}

// The state after `count` tokens of a segment; kNone where it is not there.
StateId state_at(const SegmentStore& segments, SegmentId id, int64_t count) {
  const SegmentStates& states = segments.at(id).states;
  const auto found = states.find(count);
  return found == states.end() ? kNone : found->second;
}

}  // namespace

void ThreadTable::keep_states(int64_t checkpoint_tokens, bool one_token) {
  keeps_states_ = true;
  checkpoint_tokens_ = checkpoint_tokens;
  one_token_ = one_token;
}

// A parent that has not run hands on what it began with.
void ThreadTable::inherit_state(Thread& child, SegmentId parent_tail) {
  const Segment& parent = segments_.at(parent_tail);
  Entry begun;
  begun.segment = parent_tail;
  begun.hi = 0;
  if (parent.length() == 0) inherit_state(child.tail, &begun);
  if (child.view.size() > 1) inherit_state(child.tail, &child.view[child.view.size() - 2]);
}

void ThreadTable::inherit_state(SegmentId tail, const Entry* last) {
  Segment& segment = segments_.at(tail);
  if (last == nullptr || segment.states.count(0) != 0) return;
  const StateId state = state_at(segments_, last->segment, last->hi);
  if (state == kNone) return;
  segments_.states().retain(state);
  segment.states[0] = state;
}

StateId ThreadTable::state_before(ThreadId id, int64_t count) const {
  const Thread& thread = at(id);
  const StateId own = state_at(segments_, thread.tail, count);
  if (own != kNone || count != -segments_.at(thread.tail).copied) return own;
  const Entry* last = entry_before(thread.view, thread.tail);
  return last == nullptr ? kNone : state_at(segments_, last->segment, last->hi);
}

int64_t ThreadTable::nearest_state(ThreadId id, int64_t length) const {
  int64_t nearest = 0;
  each_state(segments_, at(id), [&](int64_t tokens, StateId) {
    if (tokens <= length) nearest = std::max(nearest, tokens);
  });
  return nearest;
}

std::vector<StateId> ThreadTable::states_of(const std::vector<ThreadId>& ids) const {
  std::set<StateId> held;
  for (const ThreadId id : ids) {
    each_state(segments_, at(id), [&](int64_t, StateId state) { held.insert(state); });
  }
  return {held.begin(), held.end()};
}

}  // namespace apr
