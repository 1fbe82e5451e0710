// Owns threads and their views: fork, join, trim, release, live regions. docs/semantics.md has the
// rules.
#include "core/thread_table.h"

#include <algorithm>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "core/error.h"
#include "core/view.h"

namespace apr {

size_t Thread::tail_entry() const {
  for (size_t i = view.size(); i-- > 0;) {
    if (view[i].segment == tail) return i;
  }
  invalid("a thread's view must list the segment that it writes");
}

ThreadTable::ThreadTable(int64_t num_pages, int64_t page_size, bool can_rotate, int64_t most_pages)
    : pool_(num_pages, page_size, most_pages), segments_(pool_), can_rotate_(can_rotate) {}

Thread& ThreadTable::at(ThreadId id) {
  const auto found = threads_.find(id);
  if (found == threads_.end()) {
    throw Error(ErrorKind::kThreadReleased,
                thread_name(id) +
                    " was released (by release(), or by the join that took it in); "
                    "expected a living thread; fork or create a new one");
  }
  return found->second;
}

const Thread& ThreadTable::at(ThreadId id) const { return const_cast<ThreadTable*>(this)->at(id); }

void ThreadTable::check_writable(SegmentId id, ThreadId writer) const {
  const Segment& segment = segments_.at(id);
  if (segment.sealed) {
    invalid("writes: segment " + std::to_string(id) + " is sealed; write to an open region");
  }
  if (segment.writer != kNone && segment.writer != writer) {
    invalid("writes: segment " + std::to_string(id) + " is already written by " +
            thread_name(segment.writer) +
            "; one writer at a time: release it or give it another region");
  }
  if (segment.dropped_pages > 0) {
    invalid("writes: tokens of segment " + std::to_string(id) +
            " that no view showed any more were dropped; write to another region");
  }
  if (segment.queued() > 0 && !segment.context.empty()) {
    invalid("writes: segment " + std::to_string(id) + " still has " +
            std::to_string(segment.queued()) +
            " queued tokens of its former writer; step a thread that sees them first");
  }
}

void ThreadTable::touch() {
  ++version_;
  if (!granted_) return;
  granted_ = false;
  segments_.for_each([this](SegmentId id, const Segment&) {
    Segment& segment = segments_.at(id);
    segments_.shrink_pages(segment, segment.copied + segment.encoded);
  });
}

void ThreadTable::grant_pages(Segment& segment, int64_t slots) {
  granted_ = true;
  segments_.grow_pages(segment, slots);
}

// The writer leaves its tail: tokens still queued keep the view that they must be encoded under.
void ThreadTable::detach_writer(ThreadId id) {
  const Thread& thread = at(id);
  Segment& tail = segments_.at(thread.tail);
  tail.writer = kNone;
  if (tail.queued() > 0 && tail.context.empty()) {
    segments_.set_context(thread.tail, thread.view, thread.visibility);
  }
}

void ThreadTable::open_tail(Thread& thread, ThreadId id, int64_t offset, int64_t base,
                            bool forked) {
  thread.tail = segments_.create(base, 1);
  Segment& tail = segments_.at(thread.tail);
  tail.writer = id;
  tail.origin = id;
  tail.forked_tail = forked;
  tail.references = 1;
  Entry entry;
  entry.segment = thread.tail;
  entry.offset = offset;
  thread.view.push_back(entry);
}

// ---- making threads and segments ------------------------------------------------------------

ThreadId ThreadTable::create(const std::vector<int32_t>& tokens) {
  touch();
  const ThreadId id = next_++;
  open_tail(threads_[id], id, 0, 0, false);
  extend(id, tokens);
  return id;
}

ThreadId ThreadTable::create_with_view(std::vector<Entry> view, SegmentId writes,
                                       Visibility visibility, const std::vector<int32_t>& tokens) {
  touch();
  check_given_view(view, writes);
  if (writes != kNone) {
    check_writable(writes, kNone);
    const bool listed =
        std::any_of(view.begin(), view.end(), [&](const Entry& e) { return e.segment == writes; });
    if (!listed) {
      Entry entry;
      entry.segment = writes;
      view.push_back(entry);
    }
  }
  check_rotation(view, writes);
  const ThreadId id = next_++;
  Thread& thread = threads_[id];
  thread.visibility = visibility;
  thread.is_line = view.empty();
  thread.view = std::move(view);
  retain_view(thread.view, id);
  if (writes == kNone) {
    const int64_t end = view_end(segments_, thread.view, IdleReader{});
    open_tail(thread, id, kMoving, end, false);
  } else {
    thread.tail = writes;
    Segment& segment = segments_.at(writes);
    segment.writer = id;
    segment.origin = id;
    if (segment.queued() > 0) {
      thread.logits_segment = writes;
      thread.logits_index = segment.length() - 1;
    }
  }
  extend(id, tokens);
  return id;
}

SegmentId ThreadTable::create_segment(const std::vector<int32_t>& tokens, int64_t base,
                                      std::vector<Entry> after) {
  touch();
  if (tokens.empty()) invalid("segment: got no tokens; a sealed segment needs at least one");
  check_given_view(after, kNone);
  const SegmentId id = segments_.create(base, 1);
  Segment& segment = segments_.at(id);
  segment.tokens = tokens;
  segment.sealed = true;
  segment.references = 1;
  Entry own;
  own.segment = id;
  own.offset = after.empty() ? base : kMoving;
  after.push_back(own);
  segments_.set_context(id, std::move(after), Visibility::kPrevious);
  return id;
}

SegmentId ThreadTable::create_region(const std::vector<int32_t>& tokens, int64_t base,
                                     int64_t stride) {
  touch();
  const SegmentId id = segments_.create(base, stride);
  Segment& segment = segments_.at(id);
  segment.tokens = tokens;
  segment.references = 1;
  segment.is_region = true;
  return id;
}

void ThreadTable::seal(SegmentId id) {
  touch();
  Segment& segment = segments_.at(id);
  if (segment.writer != kNone) {
    invalid("seal: segment " + std::to_string(id) + " is being written by " +
            thread_name(segment.writer) + "; release the writer or give it another region first");
  }
  segment.sealed = true;
  if (segment.queued() > 0 && segment.context.empty()) {
    Entry own;
    own.segment = id;
    own.offset = segment.base;
    segments_.set_context(id, {own}, Visibility::kPrevious);
  }
}

void ThreadTable::extend(ThreadId id, const std::vector<int32_t>& tokens) {
  Thread& thread = at(id);
  if (tokens.empty()) return;
  Segment& tail = segments_.at(thread.tail);
  tail.tokens.insert(tail.tokens.end(), tokens.begin(), tokens.end());
  thread.own_tokens.insert(thread.own_tokens.end(), tokens.begin(), tokens.end());
  thread.logits_segment = thread.tail;
  thread.logits_index = tail.length() - 1;
  ++thread.edits;
}

void ThreadTable::extend_each(const std::vector<ThreadId>& ids, const std::vector<int32_t>& tokens,
                              const std::vector<bool>& drawn) {
  if (ids.size() != tokens.size() || ids.size() != drawn.size()) {
    invalid("extend: expected one token for each thread, and whether it was drawn");
  }
  for (const ThreadId id : ids) at(id);
  for (size_t i = 0; i < ids.size(); ++i) {
    extend(ids[i], {tokens[i]});
    at(ids[i]).draws += drawn[i];
  }
}

// ---- release, re-view -----------------------------------------------------------------------

void ThreadTable::orphan_children(ThreadId id) {
  for (const ThreadId child : at(id).children) {
    at(child).joinable = false;
    at(child).parent = kNone;
  }
  at(id).children.clear();
}

void ThreadTable::release(ThreadId id) {
  touch();
  Thread& thread = at(id);
  orphan_children(id);
  if (thread.parent != kNone && alive(thread.parent)) {
    std::vector<ThreadId>& siblings = at(thread.parent).children;
    at(siblings.back()).place = thread.place;
    siblings[thread.place] = siblings.back();
    siblings.pop_back();
  }
  detach_writer(id);
  segments_.at(thread.tail).sealed = true;
  const std::vector<Entry> view = std::move(thread.view);
  threads_.erase(id);
  release_view(view);
}

std::vector<ThreadId> ThreadTable::release_dropped() {
  std::vector<ThreadId> released;
  for (const ThreadId id : dropped_threads_.take()) {
    if (!alive(id)) continue;
    release(id);
    released.push_back(id);
  }
  for (const SegmentId id : dropped_segments_.take()) {
    if (!segments_.contains(id)) continue;
    touch();
    segments_.release(id);
  }
  return released;
}

void ThreadTable::place(ThreadId id, Thread thread) {
  if (id < 0 || !threads_.emplace(id, std::move(thread)).second) {
    invalid("open: " + thread_name(id) + " is there already");
  }
  next_ = std::max(next_, id + 1);
}

void ThreadTable::settle_placed(ThreadId next_thread, SegmentId next_segment) {
  touch();
  if (next_thread < next_ || next_segment < segments_.next_number()) {
    invalid("open: numbers that were to come are taken");
  }
  next_ = next_thread;
  segments_.begin_at(next_segment);
  segments_.for_each([this](SegmentId id, const Segment& segment) {
    check_view(segment.context, kNone);
    segments_.set_context(id, segment.context, segment.context_visibility);
  });
  for (const auto& [id, thread] : threads_) {
    for (size_t i = 0; i < thread.children.size(); ++i) {
      const auto child = threads_.find(thread.children[i]);
      if (child != threads_.end()) child->second.place = i;
    }
    check_view(thread.view, thread.tail);
    if (keeps_states_ && !thread.is_line) invalid("open: layer states have read lines alone");
    retain_view(thread.view, id);
    for (const Entry& entry : thread.view) {
      const bool is_tail = entry.segment == thread.tail;
      if (is_tail && segments_.at(entry.segment).writer != id)
        invalid("open: a tail has no writer");
    }
    const SegmentId last = thread.logits_segment;
    if (last == kNone) continue;
    const Segment& segment = segments_.at(last);
    if (thread.logits_index < -segment.copied || thread.logits_index >= segment.length()) {
      invalid("open: " + thread_name(id) + " has no last token where it says");
    }
  }
  const std::vector<std::string> wrong = check(0);
  if (!wrong.empty()) invalid("open: " + wrong.front());
}

std::vector<ThreadId> ThreadTable::clear() {
  touch();
  std::vector<ThreadId> released;
  for (const auto& [id, thread] : threads_) released.push_back(id);
  threads_.clear();
  segments_.clear();
  return released;
}

void ThreadTable::set_view(ThreadId id, std::vector<Entry> view) {
  touch();
  Thread& thread = at(id);
  check_given_view(view, thread.tail);
  const bool listed = std::any_of(view.begin(), view.end(),
                                  [&](const Entry& e) { return e.segment == thread.tail; });
  if (!listed) {
    Entry entry;
    entry.segment = thread.tail;
    view.push_back(entry);
  }
  check_rotation(view, thread.tail);
  retain_view(view, id);
  const std::vector<Entry> old = std::move(thread.view);
  thread.view = std::move(view);
  release_view(old);
  for (const ThreadId child : thread.children) at(child).joinable = false;
  thread.joinable = false;
  thread.is_line = false;
  ++thread.edits;
  const Segment& tail = segments_.at(thread.tail);
  // Forks that wait for queued tokens get them as the new view makes them.
  for (auto& [number, other] : threads_) {
    if (tail.queued() == 0) break;
    const auto waits = [&](const Entry& entry) {
      return entry.segment == thread.tail && entry.hi > tail.encoded;
    };
    if (std::any_of(other.view.begin(), other.view.end(), waits)) other.is_line = false;
  }
  thread.logits_segment = tail.queued() > 0 ? thread.tail : kNone;
  thread.logits_index = tail.length() - 1;
}

void ThreadTable::set_writes(ThreadId id, SegmentId segment_id) {
  touch();
  Thread& thread = at(id);
  if (segment_id == thread.tail) return;
  check_writable(segment_id, id);
  std::vector<Entry> view = thread.view;
  const bool listed = std::any_of(view.begin(), view.end(),
                                  [&](const Entry& e) { return e.segment == segment_id; });
  if (!listed) {
    Entry entry;
    entry.segment = segment_id;
    view.push_back(entry);
  }
  check_given_view(view, segment_id);
  check_rotation(view, segment_id);
  detach_writer(id);
  segments_.at(thread.tail).followed = true;  // by this thread, whoever writes it next
  if (!listed) segments_.retain(segment_id);
  thread.view = std::move(view);
  thread.tail = segment_id;
  thread.is_line = false;
  ++thread.edits;
  Segment& segment = segments_.at(segment_id);
  segment.writer = id;
  segment.origin = id;
  thread.logits_segment = segment.queued() > 0 ? segment_id : kNone;
  thread.logits_index = segment.length() - 1;
}

}  // namespace apr
