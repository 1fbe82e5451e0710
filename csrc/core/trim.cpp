// Trim: a thread keeps the first tokens of its view and lets the rest go.
#include <algorithm>
#include <tuple>

#include "core/error.h"
#include "core/thread_table.h"
#include "core/view.h"

namespace apr {

// What a trim would leave, worked out before anything is touched.
struct ThreadTable::Cut {
  std::vector<Entry> kept;  // the own tail among them, unless a new one is opened
  int64_t own_kept = 0;     // tokens of the own tail; negative among its copied tokens
  int64_t own_removed = 0;  // tokens that this thread wrote and loses
  int64_t end = 0;          // view position after the last kept token
  bool elsewhere = false;   // a token outside of the own tail goes
  bool inherited = false;   // a token from before the fork goes
  SegmentId last = kNone;   // the last kept token
  int64_t last_index = 0;
};

ThreadTable::Cut ThreadTable::plan_cut(const Thread& thread, ThreadId id,
                                       int64_t length_kept) const {
  Cut cut;
  int64_t left = length_kept;
  const auto cut_entry = [&](Entry entry, const Segment& segment, int64_t offset, int64_t end) {
    const int64_t count = std::max<int64_t>(end - entry.lo, 0);
    const int64_t keep = std::min(count, left);
    left -= keep;
    if (keep > 0) {
      cut.last = entry.segment;
      cut.last_index = entry.lo + keep - 1;
      cut.end = std::max(cut.end, offset + segment.stride * (entry.lo + keep));
    }
    if (entry.segment == thread.tail) {
      cut.own_kept = entry.lo + keep;
      cut.own_removed += segment.length() - std::max<int64_t>(cut.own_kept, 0);
      cut.inherited |= cut.own_kept < 0;
      cut.kept.push_back(entry);
      return;
    }
    if (keep < count) {
      cut.elsewhere = true;
      cut.inherited |= entry.inherited || entry.lo + keep < 0;
      if (keep > 0 && entry.hi == kLive && !segment.settled()) {
        invalid("trim: " + std::to_string(length_kept) + " cuts inside segment " +
                std::to_string(entry.segment) +
                ", which another thread is still writing; cut at its edge or pin it first");
      }
      entry.hi = entry.lo + keep;
      if (segment.origin == id) {  // what it copied is not its own
        cut.own_removed += std::max<int64_t>(end, 0) - std::max<int64_t>(entry.lo + keep, 0);
      }
    }
    const bool empty_and_live = count == 0 && entry.hi == kLive;
    if (keep > 0 || empty_and_live) cut.kept.push_back(entry);
  };
  walk_view(segments_, thread.view, IdleReader{thread.tail}, cut_entry);
  return cut;
}

ThreadTable::Readers ThreadTable::readers_besides(SegmentId id, ThreadId except) const {
  const Segment& segment = segments_.at(id);
  Readers found;
  if (segment.references == 1 && segment.holders.empty()) return found;
  const auto scan = [&](const std::vector<Entry>& view) {
    for (const Entry& entry : view) {
      if (entry.segment != id) continue;
      found.follow |= entry.hi == kLive;
      if (entry.hi != kLive) found.pinned = std::max(found.pinned, entry.hi);
    }
  };
  for (const auto& [thread_id, thread] : threads_) {
    if (thread_id != except) scan(thread.view);
  }
  segments_.for_each([&](SegmentId, const Segment& s) { scan(s.context); });
  return found;
}

bool ThreadTable::sees(const Thread& thread, SegmentId segment, int64_t index) const {
  return std::any_of(thread.view.begin(), thread.view.end(), [&](const Entry& entry) {
    const auto found = segments_.index_of(entry.segment, {segment, index});
    return found && *found >= entry.lo &&
           *found < visible_end(entry, segments_.at(entry.segment), IdleReader{thread.tail});
  });
}

void ThreadTable::trim(ThreadId id, int64_t length_kept) {
  touch();
  Thread& thread = at(id);
  const int64_t total = length(id);
  if (length_kept < 0 || length_kept > total) {
    invalid("trim: got " + std::to_string(length_kept) + " for " + thread_name(id) +
            "; expected 0 to its length " + std::to_string(total));
  }
  if (length_kept == total) return;
  const Cut cut = plan_cut(thread, id, length_kept);
  ++thread.edits;
  ++thread.trims;
  Segment& tail = segments_.at(thread.tail);
  const Entry old_tail = thread.view[thread.tail_entry()];
  const int64_t difference = tail_offset(thread) - tail.base;
  const bool forked = tail.forked_tail;
  // An empty tail may stand behind a hole that a drop has left.
  const bool apart =
      old_tail.offset != kMoving && old_tail.offset > cut.end && !tail.is_region && !tail.followed;
  // `pinned` may be a pin that is gone. Readers are asked where a needless new tail would be
  // noticed: who follows this one would follow no more. Of a thread with children it is no loss,
  // and they are many where threads are.
  const bool asks = tail.is_region || tail.followed || thread.children.empty();
  if (tail.pinned > cut.own_kept && asks) tail.pinned = readers_besides(thread.tail, id).pinned;
  const bool new_tail = cut.own_kept < 0 || (cut.own_kept == 0 && (cut.elsewhere || apart)) ||
                        tail.pinned > cut.own_kept;
  if (new_tail) {
    detach_writer(id);
    tail.sealed = true;
  } else {
    tail.tokens.resize(tail.copied + cut.own_kept);
    tail.encoded = std::min(tail.encoded, cut.own_kept);
    segments_.shrink_pages(tail, tail.copied + tail.encoded);
    segments_.drop_states_after(tail, tail.encoded);
  }
  std::vector<Entry> view;
  for (Entry entry : cut.kept) {
    if (entry.segment == thread.tail && new_tail) {
      if (cut.own_kept <= entry.lo) continue;
      entry.hi = cut.own_kept;
    }
    view.push_back(entry);
  }
  retain_view(view, id);
  const std::vector<Entry> old_view = std::move(thread.view);
  thread.view = std::move(view);
  if (new_tail) {
    const int64_t offset = old_tail.offset == kMoving ? kMoving : cut.end;
    const bool fresh = cut.last == kNone || cut.end < difference;
    open_tail(thread, id, offset, fresh ? cut.end : cut.end - difference, forked);
    if (apart) thread.fork_position = std::min(thread.fork_position, cut.end);
    if (keeps_states_ && thread.view.size() > 1) {
      inherit_state(thread.tail, &thread.view[thread.view.size() - 2]);
    }
  }
  thread.own_tokens.resize(
      std::max<int64_t>(static_cast<int64_t>(thread.own_tokens.size()) - cut.own_removed, 0));
  // Tokens that are still queued will be the last to run; else the last kept one is run again.
  const bool queued = !new_tail && tail.queued() > 0;
  thread.logits_segment = queued ? thread.tail : cut.last;
  thread.logits_index = queued ? tail.length() - 1 : cut.last_index;
  if (cut.inherited) {
    thread.fork_position = std::min(thread.fork_position, cut.end);
    thread.fork_segment = cut.last;
    if (cut.last != kNone) {
      std::tie(thread.fork_segment, thread.fork_index) =
          segments_.written_at(cut.last, cut.last_index);
    }
  }
  for (const ThreadId child_id : thread.children) {
    Thread& child = at(child_id);
    if (child.fork_segment != kNone && !sees(thread, child.fork_segment, child.fork_index)) {
      child.joinable = false;
    }
  }
  release_view(old_view);
}

}  // namespace apr
