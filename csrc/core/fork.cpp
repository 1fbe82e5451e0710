// Forks: children that see what their parent sees now, each with an empty tail of its own.
#include <tuple>

#include "core/error.h"
#include "core/thread_table.h"
#include "core/view.h"

namespace apr {

void ThreadTable::check_fork(ThreadId id, int64_t count) const {
  at(id);
  if (count < 1) {
    invalid("fork: got " + std::to_string(count) + " children; expected at least 1");
  }
  const int64_t tokens = pool_.most_pages() * pool_.page_size();
  if (count > tokens) {
    invalid("fork: got " + std::to_string(count) + " children; the pool holds " +
            std::to_string(tokens) + " tokens, fewer than one for each");
  }
}

std::vector<ThreadId> ThreadTable::fork(ThreadId id, int64_t count) {
  touch();
  check_fork(id, count);
  Thread& parent = at(id);
  std::vector<ThreadId> ids;
  ids.reserve(count);
  const size_t room = parent.children.size() + static_cast<size_t>(count);
  if (room > parent.children.capacity()) parent.children.reserve(2 * room);
  const int64_t at_position = position(id);
  try {
    for (int64_t i = 0; i < count; ++i) ids.push_back(fork_once(id, at_position));
  } catch (...) {  // out of memory
    for (const ThreadId child : ids) release(child);
    throw;
  }
  parent.forks += count;
  return ids;
}

// Nothing is left of a child that could not be made.
ThreadId ThreadTable::fork_once(ThreadId id, int64_t at_position) {
  Thread& parent = at(id);
  const size_t own = parent.tail_entry();
  const Segment& tail = segments_.at(parent.tail);
  const Entry parent_tail = parent.view[own];
  const ThreadId child_id = next_++;
  Thread child;
  child.visibility = parent.visibility;
  child.is_line = parent.is_line;
  child.logits_segment = parent.logits_segment;
  child.logits_index = parent.logits_index;
  child.edits = parent.edits;
  child.parent = id;
  child.joinable = true;
  child.fork_position = at_position;
  child.view.reserve(parent.view.size() + 1);
  const int64_t written = tail.written_position(tail.length());
  for (size_t k = 0; k <= own; ++k) {
    Entry entry = parent.view[k];
    entry.inherited = true;
    if (k == own) entry.hi = tail.length();
    if (entry.hi == kLive || entry.hi > entry.lo) child.view.push_back(entry);
  }
  for (const Entry& entry : child.view) {
    const int64_t end = visible_end(entry, segments_.at(entry.segment), IdleReader{});
    if (end <= entry.lo) continue;
    std::tie(child.fork_segment, child.fork_index) = segments_.written_at(entry.segment, end - 1);
  }
  const int64_t offset = parent_tail.offset == kMoving ? kMoving : at_position;
  open_tail(child, child_id, offset, written, true);
  const SegmentId new_tail = child.tail;
  if (keeps_states_) inherit_state(child, parent.tail);
  for (size_t k = own + 1; k < parent.view.size(); ++k) {
    Entry entry = parent.view[k];
    entry.inherited = true;
    child.view.push_back(entry);
  }
  child.place = parent.children.size();
  try {
    threads_.emplace(child_id, child);
  } catch (...) {
    segments_.release(new_tail);
    throw;
  }
  for (const Entry& entry : child.view) {
    if (entry.segment != new_tail) segments_.retain(entry, child_id);
  }
  parent.children.push_back(child_id);
  return child_id;
}

}  // namespace apr
