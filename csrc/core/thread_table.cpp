// Owns threads and their views: fork, join, trim, release, live regions. docs/semantics.md has the
// rules.
#include "core/thread_table.h"

#include <algorithm>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "core/error.h"

namespace apr {
namespace {

std::string name(ThreadId id) { return "thread " + std::to_string(id); }

[[noreturn]] void invalid(const std::string& message) {
  throw Error(ErrorKind::kInvalidInput, message);
}

}  // namespace

size_t Thread::tail_entry() const {
  for (size_t i = view.size(); i-- > 0;) {
    if (view[i].segment == tail) return i;
  }
  invalid("a thread's view must list the segment that it writes");
}

ThreadTable::ThreadTable(int64_t num_pages, int64_t page_size, bool can_rotate)
    : pool_(num_pages, page_size), segments_(pool_), can_rotate_(can_rotate) {}

Thread& ThreadTable::at(ThreadId id) {
  const auto found = threads_.find(id);
  if (found == threads_.end()) {
    throw Error(ErrorKind::kThreadReleased,
                name(id) +
                    " was released (by release(), or by the join that took it in); "
                    "expected a living thread; fork or create a new one");
  }
  return found->second;
}

const Thread& ThreadTable::at(ThreadId id) const { return const_cast<ThreadTable*>(this)->at(id); }

// ---- views ----------------------------------------------------------------------------------

int64_t ThreadTable::visible_end(const Entry& entry, SegmentId own) const {
  const Segment& segment = segments_.at(entry.segment);
  if (entry.hi != kLive) return std::min(entry.hi, segment.length());
  // Other writers' queued tokens are not there before the step that encodes them.
  return entry.segment == own || segment.sealed ? segment.length() : segment.encoded;
}

std::vector<int64_t> ThreadTable::offsets(const std::vector<Entry>& view, SegmentId own) const {
  std::vector<int64_t> result(view.size());
  int64_t end = 0;
  for (size_t i = 0; i < view.size(); ++i) {
    const Segment& segment = segments_.at(view[i].segment);
    result[i] = view[i].offset == kMoving ? end : view[i].offset;
    end = std::max(end, result[i] + segment.stride * visible_end(view[i], own));
  }
  return result;
}

int64_t ThreadTable::view_end(const std::vector<Entry>& view, SegmentId own) const {
  const std::vector<int64_t> start = offsets(view, own);
  int64_t end = 0;
  for (size_t i = 0; i < view.size(); ++i) {
    const Segment& segment = segments_.at(view[i].segment);
    end = std::max(end, start[i] + segment.stride * visible_end(view[i], own));
  }
  return end;
}

void ThreadTable::check_view(const std::vector<Entry>& view, SegmentId own) const {
  std::unordered_set<SegmentId> seen;
  for (const Entry& entry : view) {
    const Segment& segment = segments_.at(entry.segment);
    if (!seen.insert(entry.segment).second) {
      invalid("view: segment " + std::to_string(entry.segment) +
              " stands twice; a segment may stand once in a view");
    }
    if (entry.hi != kLive && (entry.hi < 0 || entry.hi > segment.length())) {
      invalid("view: got hi " + std::to_string(entry.hi) + " for segment " +
              std::to_string(entry.segment) + "; expected 0 to its length " +
              std::to_string(segment.length()));
    }
    if (entry.lo != 0 && entry.lo != -segment.head) {
      invalid("view: got lo " + std::to_string(entry.lo) + "; expected 0 or " +
              std::to_string(-segment.head));
    }
    if (entry.segment == own && entry.hi != kLive) {
      invalid("view: the segment that the thread writes takes no hi; leave it out");
    }
  }
}

void ThreadTable::check_rotation(const std::vector<Entry>& view, SegmentId own) const {
  if (can_rotate_) return;
  const std::vector<int64_t> start = offsets(view, own);
  int64_t own_difference = 0;
  for (size_t i = 0; i < view.size(); ++i) {
    if (view[i].segment == own) own_difference = start[i] - segments_.at(own).base;
  }
  for (size_t i = 0; i < view.size(); ++i) {
    const Segment& segment = segments_.at(view[i].segment);
    if (visible_end(view[i], own) <= view[i].lo) continue;
    if (start[i] - segment.base != own_difference) {
      throw Error(ErrorKind::kUnsupportedRope,
                  "this model's positions cannot be re-rotated: a segment written at position " +
                      std::to_string(segment.base) + " would be read at " +
                      std::to_string(start[i] - own_difference) +
                      "; keep keys where they were written (fork, or join with positions=\"max\" "
                      "or reencode=True)");
    }
  }
}

void ThreadTable::retain_view(const std::vector<Entry>& view) {
  for (const Entry& entry : view) segments_.retain(entry.segment);
}

void ThreadTable::release_view(const std::vector<Entry>& view) {
  for (const Entry& entry : view) segments_.release(entry.segment);
}

void ThreadTable::check_writable(SegmentId id, ThreadId writer) const {
  const Segment& segment = segments_.at(id);
  if (segment.sealed) {
    invalid("writes: segment " + std::to_string(id) + " is sealed; write to an open region");
  }
  if (segment.writer != kNone && segment.writer != writer) {
    invalid("writes: segment " + std::to_string(id) + " is already written by " +
            name(segment.writer) + "; one writer at a time: release it or give it another region");
  }
}

// The writer leaves its tail: tokens still queued keep the view that they must be encoded under.
void ThreadTable::detach_writer(ThreadId id) {
  Thread& thread = at(id);
  Segment& tail = segments_.at(thread.tail);
  tail.writer = kNone;
  if (tail.queued() > 0 && tail.context.empty()) {
    tail.context = thread.view;
    tail.context_visibility = thread.visibility;
    for (const Entry& entry : tail.context) {
      if (entry.segment != thread.tail) segments_.retain(entry.segment);
    }
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
  const ThreadId id = next_++;
  open_tail(threads_[id], id, 0, 0, false);
  extend(id, tokens);
  return id;
}

ThreadId ThreadTable::create_with_view(std::vector<Entry> view, SegmentId writes,
                                       Visibility visibility) {
  check_view(view, writes);
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
  thread.view = std::move(view);
  retain_view(thread.view);
  if (writes == kNone) {
    open_tail(thread, id, kMoving, view_end(thread.view, kNone), false);
  } else {
    thread.tail = writes;
    Segment& segment = segments_.at(writes);
    segment.writer = id;
    segment.origin = id;
    segments_.clear_context(segment);
    if (segment.queued() > 0) {
      thread.logits_segment = writes;
      thread.logits_index = segment.length() - 1;
    }
  }
  return id;
}

SegmentId ThreadTable::create_segment(const std::vector<int32_t>& tokens, int64_t base,
                                      std::vector<Entry> after) {
  if (tokens.empty()) invalid("segment: got no tokens; a sealed segment needs at least one");
  check_view(after, kNone);
  const SegmentId id = segments_.create(base, 1);
  Segment& segment = segments_.at(id);
  segment.tokens = tokens;
  segment.sealed = true;
  segment.references = 1;
  retain_view(after);
  segment.context = std::move(after);
  Entry own;
  own.segment = id;
  own.offset = segment.context.empty() ? base : kMoving;
  segment.context.push_back(own);
  return id;
}

SegmentId ThreadTable::create_region(const std::vector<int32_t>& tokens, int64_t base,
                                     int64_t stride) {
  const SegmentId id = segments_.create(base, stride);
  Segment& segment = segments_.at(id);
  segment.tokens = tokens;
  segment.references = 1;
  return id;
}

void ThreadTable::seal(SegmentId id) {
  Segment& segment = segments_.at(id);
  if (segment.writer != kNone) {
    invalid("seal: segment " + std::to_string(id) + " is being written by " + name(segment.writer) +
            "; release the writer or give it another region first");
  }
  segment.sealed = true;
  if (segment.queued() > 0 && segment.context.empty()) {
    Entry own;
    own.segment = id;
    own.offset = segment.base;
    segment.context.push_back(own);
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
}

// ---- fork -----------------------------------------------------------------------------------

std::vector<ThreadId> ThreadTable::fork(ThreadId id, int64_t count) {
  at(id);
  if (count < 1) {
    invalid("fork: got " + std::to_string(count) + " children; expected at least 1");
  }
  std::vector<ThreadId> ids;
  ids.reserve(count);
  const int64_t fork_position = position(id), fork_length = length(id);
  for (int64_t i = 0; i < count; ++i) {
    const ThreadId child_id = next_++;
    Thread& child = threads_[child_id];
    Thread& parent = at(id);
    const size_t own = parent.tail_entry();
    const Segment& tail = segments_.at(parent.tail);
    const Entry parent_tail = parent.view[own];
    child.visibility = parent.visibility;
    child.logits_segment = parent.logits_segment;
    child.logits_index = parent.logits_index;
    child.parent = id;
    child.joinable = true;
    child.fork_position = fork_position;
    child.fork_length = fork_length;
    child.view.reserve(parent.view.size() + 1);
    const int64_t written = tail.written_position(tail.length());
    for (size_t k = 0; k <= own; ++k) {
      Entry entry = parent.view[k];
      entry.inherited = true;
      if (k == own) entry.hi = tail.length();
      if (entry.hi == kLive || entry.hi > entry.lo) child.view.push_back(entry);
    }
    retain_view(child.view);
    const int64_t offset = parent_tail.offset == kMoving ? kMoving : fork_position;
    open_tail(child, child_id, offset, written, true);
    for (size_t k = own + 1; k < parent.view.size(); ++k) {
      Entry entry = parent.view[k];
      entry.inherited = true;
      child.view.push_back(entry);
      segments_.retain(entry.segment);
    }
    parent.children.push_back(child_id);
    ids.push_back(child_id);
  }
  return ids;
}

// ---- join -----------------------------------------------------------------------------------

std::vector<Entry> ThreadTable::own_part(const Thread& child) const {
  const std::vector<int64_t> start = offsets(child.view, child.tail);
  std::vector<Entry> part;
  for (size_t i = 0; i < child.view.size(); ++i) {
    Entry entry = child.view[i];
    if (entry.inherited) continue;
    entry.offset = start[i];
    entry.hi = visible_end(entry, child.tail);
    entry.lo = std::max<int64_t>(entry.lo, 0);
    if (entry.hi > entry.lo) part.push_back(entry);
  }
  return part;
}

void ThreadTable::check_joinable(ThreadId parent, const std::vector<ThreadId>& children) const {
  at(parent);
  std::unordered_set<ThreadId> seen;
  for (const ThreadId id : children) {
    const Thread& child = at(id);
    if (!seen.insert(id).second) invalid("join: " + name(id) + " is listed twice");
    if (child.parent != parent || !child.joinable) {
      const std::string why =
          child.parent != parent
              ? "it was not forked from " + name(parent)
              : "the parent was trimmed before the fork point or its view was replaced since";
      throw Error(ErrorKind::kForeignThread,
                  "join: " + name(id) + " cannot be joined into " + name(parent) + ": " + why +
                      "; join it into the thread it was forked from, or extend the parent with "
                      "its own_tokens");
    }
    for (const Entry& entry : child.view) {
      if (!entry.inherited && entry.segment != child.tail && entry.hi == kLive &&
          !segments_.at(entry.segment).sealed) {
        invalid("join: " + name(id) + " lists segment " + std::to_string(entry.segment) +
                " live in its own part; end its writer (seal it) or pin it with hi first");
      }
    }
  }
}

void ThreadTable::seal_tail_for_join(ThreadId id) {
  Thread& thread = at(id);
  Segment& tail = segments_.at(thread.tail);
  Entry& entry = thread.view[thread.tail_entry()];
  detach_writer(id);
  tail.sealed = true;
  if (tail.length() > entry.lo) {
    entry.hi = tail.length();
  } else {
    const SegmentId empty = thread.tail;
    thread.view.erase(thread.view.begin() + static_cast<int64_t>(thread.tail_entry()));
    segments_.release(empty);
  }
}

void ThreadTable::join(ThreadId parent_id, const std::vector<ThreadId>& children,
                       JoinPositions positions, bool reencode) {
  check_joinable(parent_id, children);
  if (children.empty()) return;
  if (reencode) {
    std::vector<int32_t> text;
    for (const ThreadId id : children) {
      for (const Entry& entry : own_part(at(id))) {
        const Segment& segment = segments_.at(entry.segment);
        text.insert(text.end(), segment.tokens.begin() + segment.head + entry.lo,
                    segment.tokens.begin() + segment.head + entry.hi);
      }
    }
    extend(parent_id, text);
    for (const ThreadId id : children) release(id);
    return;
  }

  Thread& parent = at(parent_id);
  const Entry old_tail = parent.view[parent.tail_entry()];
  const int64_t old_offset = offsets(parent.view, parent.tail)[parent.tail_entry()];
  const int64_t difference = old_offset - segments_.at(parent.tail).base;
  const bool forked = segments_.at(parent.tail).forked_tail;
  int64_t cursor = position(parent_id);
  std::vector<Entry> joined;
  std::vector<int64_t> shifts;
  for (const ThreadId id : children) {
    const Thread& child = at(id);
    const int64_t shift =
        positions == JoinPositions::kSum ? cursor - child.fork_position : child.fork_shift;
    int64_t end = cursor;
    for (Entry entry : own_part(child)) {
      const Segment& segment = segments_.at(entry.segment);
      entry.offset = positions == JoinPositions::kKeep ? segment.base : entry.offset + shift;
      end = std::max(end, entry.offset + segment.stride * entry.hi);
      if (!can_rotate_ && entry.offset - segment.base != difference) {
        throw Error(ErrorKind::kUnsupportedRope,
                    "join: this model's positions cannot be re-rotated, and " + name(id) +
                        " was written at position " + std::to_string(segment.base) +
                        " but would be read at " + std::to_string(entry.offset - difference) +
                        "; use positions=\"max\" or reencode=True");
      }
      joined.push_back(entry);
    }
    shifts.push_back(shift);
    cursor = std::max(cursor, end);
  }

  seal_tail_for_join(parent_id);
  retain_view(joined);
  parent.view.insert(parent.view.end(), joined.begin(), joined.end());
  const int64_t offset = old_tail.offset == kMoving ? kMoving : cursor;
  open_tail(parent, parent_id, offset, cursor - difference, forked);
  parent.logits_segment = kNone;
  for (size_t i = 0; i < children.size(); ++i) {
    const std::vector<ThreadId> grandchildren = at(children[i]).children;
    at(children[i]).children.clear();
    for (const ThreadId id : grandchildren) {
      Thread& grandchild = at(id);
      grandchild.parent = parent_id;
      grandchild.fork_shift += shifts[i];
      at(parent_id).children.push_back(id);
    }
    release(children[i]);
  }
}

// ---- trim, release, re-view -----------------------------------------------------------------

int64_t ThreadTable::pinned_length(SegmentId id, ThreadId except) const {
  int64_t pinned = 0;
  const auto scan = [&](const std::vector<Entry>& view) {
    for (const Entry& entry : view) {
      if (entry.segment == id && entry.hi != kLive) pinned = std::max(pinned, entry.hi);
    }
  };
  for (const auto& [thread_id, thread] : threads_) {
    if (thread_id != except) scan(thread.view);
  }
  const_cast<SegmentStore&>(segments_).for_each([&](SegmentId, Segment& s) { scan(s.context); });
  return pinned;
}

void ThreadTable::trim(ThreadId id, int64_t length_kept) {
  Thread& thread = at(id);
  const int64_t total = length(id);
  if (length_kept < 0 || length_kept > total) {
    invalid("trim: got " + std::to_string(length_kept) + " for " + name(id) +
            "; expected 0 to its length " + std::to_string(total));
  }
  if (length_kept == total) return;
  const std::vector<int64_t> start = offsets(thread.view, thread.tail);
  const size_t own = thread.tail_entry();

  // First look, then touch: a refused trim leaves everything as it was.
  int64_t left = length_kept, own_kept = 0, own_removed = 0, end = 0;
  bool cut_elsewhere = false;
  SegmentId last = kNone;
  int64_t last_index = 0;
  std::vector<Entry> kept;
  for (size_t i = 0; i < thread.view.size(); ++i) {
    Entry entry = thread.view[i];
    const Segment& segment = segments_.at(entry.segment);
    const int64_t count = std::max<int64_t>(visible_end(entry, thread.tail) - entry.lo, 0);
    const int64_t keep = std::min(count, left);
    left -= keep;
    if (keep > 0) {
      last = entry.segment;
      last_index = entry.lo + keep - 1;
    }
    if (i == own) {
      own_kept = entry.lo + keep;
      own_removed += segment.length() - std::max<int64_t>(own_kept, 0);
      kept.push_back(entry);
    } else {
      if (keep < count) {
        cut_elsewhere = true;
        if (keep > 0 && entry.hi == kLive && !segment.sealed) {
          invalid("trim: " + std::to_string(length_kept) + " cuts inside segment " +
                  std::to_string(entry.segment) +
                  ", which another thread is still writing; cut at its edge or pin it first");
        }
        entry.hi = entry.lo + keep;
        if (segment.origin == id) own_removed += count - keep;
      }
      if (keep > 0 || (left > 0 && entry.hi == kLive)) kept.push_back(entry);
    }
    if (keep > 0) end = std::max(end, start[i] + segment.stride * (entry.lo + keep));
  }

  Segment& tail = segments_.at(thread.tail);
  const bool tail_pinned = pinned_length(thread.tail, id) > own_kept;
  const bool new_tail = tail_pinned || own_kept < 0 || (own_kept == 0 && cut_elsewhere);
  for (const ThreadId child : thread.children) {
    if (at(child).fork_length > length_kept) at(child).joinable = false;
  }
  const Entry old_tail = thread.view[own];
  const int64_t difference = start[own] - tail.base;
  const bool forked = tail.forked_tail;
  if (!new_tail) {
    tail.tokens.resize(tail.head + own_kept);
    tail.encoded = std::min(tail.encoded, own_kept);
    segments_.shrink_pages(tail, tail.head + tail.encoded);
  } else {
    detach_writer(id);
    tail.sealed = true;
  }
  std::vector<Entry> view;
  for (Entry entry : kept) {
    if (entry.segment == thread.tail && new_tail) {
      if (own_kept <= entry.lo) continue;
      entry.hi = own_kept;
    }
    view.push_back(entry);
  }
  retain_view(view);
  const std::vector<Entry> old_view = std::move(thread.view);
  thread.view = std::move(view);
  if (new_tail) {
    const int64_t offset = old_tail.offset == kMoving ? kMoving : end;
    open_tail(thread, id, offset, end - difference, forked);
  }
  thread.own_tokens.resize(
      std::max<int64_t>(static_cast<int64_t>(thread.own_tokens.size()) - own_removed, 0));
  thread.logits_segment = last;
  thread.logits_index = last_index;
  release_view(old_view);
}

void ThreadTable::orphan_children(ThreadId id) {
  for (const ThreadId child : at(id).children) {
    at(child).joinable = false;
    at(child).parent = kNone;
  }
  at(id).children.clear();
}

void ThreadTable::release(ThreadId id) {
  Thread& thread = at(id);
  orphan_children(id);
  if (thread.parent != kNone && alive(thread.parent)) {
    std::erase(at(thread.parent).children, id);
  }
  detach_writer(id);
  segments_.at(thread.tail).sealed = true;
  const std::vector<Entry> view = std::move(thread.view);
  threads_.erase(id);
  release_view(view);
}

void ThreadTable::set_view(ThreadId id, std::vector<Entry> view) {
  Thread& thread = at(id);
  check_view(view, thread.tail);
  const bool listed = std::any_of(view.begin(), view.end(),
                                  [&](const Entry& e) { return e.segment == thread.tail; });
  if (!listed) {
    Entry entry;
    entry.segment = thread.tail;
    view.push_back(entry);
  }
  check_rotation(view, thread.tail);
  retain_view(view);
  const std::vector<Entry> old = std::move(thread.view);
  thread.view = std::move(view);
  release_view(old);
  for (const ThreadId child : thread.children) at(child).joinable = false;
  thread.joinable = false;
  const Segment& tail = segments_.at(thread.tail);
  thread.logits_segment = tail.queued() > 0 ? thread.tail : kNone;
  thread.logits_index = tail.length() - 1;
}

void ThreadTable::set_writes(ThreadId id, SegmentId segment_id) {
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
  check_view(view, segment_id);
  check_rotation(view, segment_id);
  detach_writer(id);
  if (!listed) segments_.retain(segment_id);
  thread.view = std::move(view);
  thread.tail = segment_id;
  Segment& segment = segments_.at(segment_id);
  segment.writer = id;
  segment.origin = id;
  segments_.clear_context(segment);
  thread.logits_segment = segment.queued() > 0 ? segment_id : kNone;
  thread.logits_index = segment.length() - 1;
}

// ---- questions ------------------------------------------------------------------------------

int64_t ThreadTable::length(ThreadId id) const {
  const Thread& thread = at(id);
  int64_t total = 0;
  for (const Entry& entry : thread.view) {
    total += std::max<int64_t>(visible_end(entry, thread.tail) - entry.lo, 0);
  }
  return total;
}

int64_t ThreadTable::position(ThreadId id) const {
  const Thread& thread = at(id);
  const Segment& tail = segments_.at(thread.tail);
  return offsets(thread.view, thread.tail)[thread.tail_entry()] + tail.stride * tail.length();
}

Sharing ThreadTable::sharing() {
  Sharing result;
  std::unordered_map<SegmentId, std::pair<int64_t, int64_t>> readers;  // count, furthest token
  const int64_t page_size = pool_.page_size();
  for (const auto& [id, thread] : threads_) {
    int64_t seen = 0;
    for (const Entry& entry : thread.view) {
      const Segment& segment = segments_.at(entry.segment);
      const int64_t hi = std::min(visible_end(entry, thread.tail), segment.encoded);
      if (hi <= entry.lo) continue;
      seen += hi - entry.lo;
      auto& [count, furthest] = readers[entry.segment];
      furthest = count == 0 ? hi : std::min(furthest, hi);
      ++count;
    }
    result.seen_tokens += seen;
    result.replicated_pages += (seen + page_size - 1) / page_size;
  }
  for (const auto& [id, reader] : readers) {
    const Segment& segment = segments_.at(id);
    if (reader.first > 1) {
      result.shared_pages += (segment.head + reader.second + page_size - 1) / page_size;
    }
  }
  segments_.for_each(
      [&](SegmentId, Segment& segment) { result.stored_tokens += segment.head + segment.encoded; });
  return result;
}

std::vector<int32_t> ThreadTable::tokens(ThreadId id) const {
  const Thread& thread = at(id);
  std::vector<int32_t> result;
  for (const Entry& entry : thread.view) {
    const Segment& segment = segments_.at(entry.segment);
    const int64_t hi = visible_end(entry, thread.tail);
    if (hi > entry.lo) {
      result.insert(result.end(), segment.tokens.begin() + segment.head + entry.lo,
                    segment.tokens.begin() + segment.head + hi);
    }
  }
  return result;
}

}  // namespace apr
