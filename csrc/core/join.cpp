// Joins: a parent takes the parts that its forked children wrote into its own view.
#include <algorithm>
#include <unordered_set>

#include "core/error.h"
#include "core/thread_table.h"
#include "core/view.h"

namespace apr {

std::vector<Entry> ThreadTable::own_part(const Thread& child) const {
  std::vector<Entry> part;
  walk_view(segments_, child.view, IdleReader{child.tail},
            [&](Entry entry, const Segment&, int64_t offset, int64_t end) {
              if (entry.inherited) return;
              entry.offset = offset;
              entry.hi = end;
              entry.lo = std::max<int64_t>(entry.lo, 0);
              if (entry.hi > entry.lo) part.push_back(entry);
            });
  return part;
}

// Where the child's own part begins, in the child's coordinates now.
int64_t ThreadTable::fork_position(const Thread& child) const {
  if (child.view[child.tail_entry()].offset != kMoving) return child.fork_position;
  int64_t after = 0;
  walk_view(segments_, child.view, IdleReader{child.tail},
            [&](const Entry& entry, const Segment& segment, int64_t offset, int64_t end) {
              if (entry.inherited) after = std::max(after, offset + segment.stride * end);
            });
  return after;
}

void ThreadTable::check_joinable(ThreadId parent, const std::vector<ThreadId>& children) const {
  at(parent);
  std::unordered_set<ThreadId> seen;
  for (const ThreadId id : children) {
    const Thread& child = at(id);
    if (!seen.insert(id).second) invalid("join: " + thread_name(id) + " is listed twice");
    if (child.parent != parent || !child.joinable) {
      const std::string why =
          child.parent != parent
              ? "it was not forked from " + thread_name(parent)
              : "the parent was trimmed before the fork point or its view was replaced since";
      throw Error(ErrorKind::kForeignThread,
                  "join: " + thread_name(id) + " cannot be joined into " + thread_name(parent) +
                      ": " + why +
                      "; join it into the thread it was forked from, or extend the parent with "
                      "its own_tokens");
    }
    for (const Entry& entry : child.view) {
      if (!entry.inherited && entry.segment != child.tail && entry.hi == kLive &&
          !segments_.at(entry.segment).settled()) {
        invalid("join: " + thread_name(id) + " lists segment " + std::to_string(entry.segment) +
                " live in its own part; end its writer (seal it) or pin it with hi first");
      }
    }
  }
}

// The joined parts get fixed places, so nothing before them may still grow.
static void check_still(const Thread& parent, const SegmentStore& segments) {
  if (parent.view[parent.tail_entry()].offset != kMoving) return;
  for (const Entry& entry : parent.view) {
    if (entry.segment != parent.tail && entry.hi == kLive &&
        !segments.at(entry.segment).settled()) {
      invalid("join: the parent reads segment " + std::to_string(entry.segment) +
              " live, and its own place moves as that grows; pin it with hi, seal it, or join with "
              "reencode=True");
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

// The children of a joined thread go on as children of the parent, which now has what they were
// forked from, `shift` positions further on.
void ThreadTable::regraft(ThreadId child, ThreadId parent, int64_t shift) {
  const std::vector<ThreadId> grandchildren = at(child).children;
  at(child).children.clear();
  for (const ThreadId id : grandchildren) {
    at(id).parent = parent;
    at(id).fork_shift += shift;
    at(id).place = at(parent).children.size();
    at(parent).children.push_back(id);
  }
}

void ThreadTable::join_text(ThreadId parent_id, const std::vector<ThreadId>& children) {
  for (const ThreadId id : children) {
    std::vector<int32_t> text;
    for (const Entry& entry : own_part(at(id))) {
      const Segment& segment = segments_.at(entry.segment);
      text.insert(text.end(), segment.tokens.begin() + segment.copied + entry.lo,
                  segment.tokens.begin() + segment.copied + entry.hi);
    }
    const int64_t shift = position(parent_id) - fork_position(at(id));
    extend(parent_id, text);
    const Thread& parent = at(parent_id);
    for (const ThreadId grandchild : at(id).children) {
      if (text.empty()) break;
      at(grandchild).fork_segment = parent.tail;
      at(grandchild).fork_index = segments_.at(parent.tail).length() - 1;
    }
    regraft(id, parent_id, shift);
    release(id);
  }
}

void ThreadTable::join(ThreadId parent_id, const std::vector<ThreadId>& children,
                       JoinPositions positions, bool reencode) {
  touch();
  check_joinable(parent_id, children);
  if (children.empty()) return;
  ++at(parent_id).edits;
  if (reencode) return join_text(parent_id, children);

  Thread& parent = at(parent_id);
  check_still(parent, segments_);
  const Entry old_tail = parent.view[parent.tail_entry()];
  const int64_t difference = tail_offset(parent) - segments_.at(parent.tail).base;
  const bool forked = segments_.at(parent.tail).forked_tail;
  int64_t cursor = position(parent_id);
  std::vector<Entry> joined;
  std::vector<int64_t> shifts;
  for (const ThreadId id : children) {
    const Thread& child = at(id);
    const int64_t shift =
        positions == JoinPositions::kSum ? cursor - fork_position(child) : child.fork_shift;
    int64_t end = cursor;
    for (Entry entry : own_part(child)) {
      const Segment& segment = segments_.at(entry.segment);
      entry.offset = positions == JoinPositions::kKeep ? segment.base : entry.offset + shift;
      end = std::max(end, entry.offset + segment.stride * entry.hi);
      if (!can_rotate_ && entry.offset - segment.base != difference) {
        throw Error(ErrorKind::kUnsupportedRope,
                    "join: this model's positions cannot be re-rotated, and " + thread_name(id) +
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
  retain_view(joined, parent_id);
  parent.view.insert(parent.view.end(), joined.begin(), joined.end());
  const int64_t offset = old_tail.offset == kMoving ? kMoving : cursor;
  open_tail(parent, parent_id, offset, cursor - difference, forked);
  parent.logits_segment = kNone;
  parent.is_line = false;
  for (size_t i = 0; i < children.size(); ++i) {
    regraft(children[i], parent_id, shifts[i]);
    release(children[i]);
  }
}

}  // namespace apr
