// Drop: a thread lets a part out of the middle of its view go, and what stands behind moves up.
#include <algorithm>
#include <utility>

#include "core/error.h"
#include "core/thread_table.h"
#include "core/view.h"

namespace apr {

namespace {

// A tail of as many pages is sealed where a drop moves it. Shorter ones go on as they are, so that
// many small drops do not leave as many segments, each on a page of its own.
constexpr int64_t kPagesOfATail = 4;

[[noreturn]] void cuts_live(int64_t start, int64_t stop, SegmentId segment) {
  invalid("drop: " + std::to_string(start) + " to " + std::to_string(stop) +
          " cuts inside segment " + std::to_string(segment) +
          ", which is being written and read live; drop at its edges, or pin it");
}

}  // namespace

// What a drop would leave, worked out before anything is touched.
struct ThreadTable::Gap {
  bool keeps_tail = false;    // the thread goes on in its tail, and sees it elsewhere
  int64_t settled = 0;        // tokens of the own tail that stay in it; those behind are queued
  std::vector<Entry> before;  // kept, in order
  std::vector<Entry> behind;
  bool tail_before = false;      // where the own tail ends among them
  size_t tail_place = 0;         // entries of `before` or `behind` up to it
  std::vector<int32_t> queued;   // tokens of the own tail that are to run yet
  int64_t tail_begin = kNone;    // view position where a new tail goes on, by the old view
  bool tail_moves = false;       // with what stands behind
  int64_t before_end = 0;        // view position after all that is kept before
  int64_t gap_end = 0;           // after all that goes
  int64_t behind_begin = kLive;  // of the first that is kept behind
  bool was_seen = false;         // by a kept token that has run, or runs as it would have
  int64_t own_removed = 0;       // tokens that this thread wrote and loses
  int64_t own_behind = 0;        // and those it wrote after them
  SegmentId last = kNone;        // the last kept token before
  int64_t last_index = 0;

  int64_t closed() const {
    return std::max<int64_t>(std::min(behind_begin, gap_end) - before_end, 0);
  }
  // Where a place of the old view is in the new one.
  int64_t moved(int64_t position) const {
    return position >= gap_end ? position - closed() : std::min(position, before_end);
  }
  void keep(Entry entry, const Segment& segment, ThreadId id, int64_t offset, int64_t end,
            bool is_behind);
};

// Keeps tokens [entry.lo, end) of an entry.
void ThreadTable::Gap::keep(Entry entry, const Segment& segment, ThreadId id, int64_t offset,
                            int64_t end, bool is_behind) {
  const bool is_tail = segment.writer == id;
  if (end > entry.lo) {
    if (is_behind) {
      behind_begin = std::min(behind_begin, offset + segment.stride * entry.lo);
      was_seen |= !is_tail || entry.lo < settled;
    } else {
      before_end = std::max(before_end, offset + segment.stride * end);
      last = entry.segment;
      last_index = end - 1;
    }
    if (is_behind && segment.origin == id) {
      own_behind += std::max<int64_t>(end, 0) - std::max<int64_t>(entry.lo, 0);
    }
  }
  std::vector<Entry>& kept = is_behind ? behind : before;
  if (is_tail && !keeps_tail) {
    const int64_t first = std::max(entry.lo, settled);
    if (end > entry.lo && queued.empty()) {
      tail_begin = offset + segment.stride * std::min(first, end);
      tail_moves = is_behind;
    }
    for (int64_t i = first; i < end; ++i) queued.push_back(segment.tokens[segment.copied + i]);
    entry.hi = std::min(end, settled);
    if (entry.hi > entry.lo) kept.push_back(entry);
  } else {
    kept.push_back(entry);
  }
  if (is_tail) {
    tail_before = !is_behind;
    tail_place = kept.size();
  }
}

ThreadTable::Gap ThreadTable::plan_gap(const Thread& thread, ThreadId id, int64_t start,
                                       int64_t stop) const {
  const Segment& tail = segments_.at(thread.tail);
  const Entry& listed = thread.view[thread.tail_entry()];
  // What is pinned of tokens that have run makes no difference, so that others are seldom asked.
  const bool asks = tail.followed || tail.pinned > tail.encoded;
  const Readers others = asks ? readers_besides(thread.tail, id) : Readers{};
  Gap gap;
  gap.settled = std::min(tail.length(), std::max(tail.encoded, others.pinned));
  int64_t before_tail = 0;
  for (const Entry& entry : thread.view) {
    if (entry.segment == thread.tail) break;
    const int64_t end = visible_end(entry, segments_.at(entry.segment), IdleReader{thread.tail});
    before_tail += std::max<int64_t>(end - entry.lo, 0);
  }
  const bool is_cut = start < before_tail + tail.length() - listed.lo && stop > before_tail;
  const bool is_followed = tail.is_region || others.follow;
  if (is_cut && is_followed) cuts_live(start, stop, thread.tail);
  const bool is_short = tail.copied + tail.encoded < kPagesOfATail * pool_.page_size();
  const bool goes_on = is_short && tail.encoded > listed.lo && others.pinned <= tail.encoded;
  gap.keeps_tail = is_followed || (goes_on && !is_cut);
  int64_t before = 0;
  walk_view(segments_, thread.view, IdleReader{thread.tail},
            [&](const Entry& entry, const Segment& segment, int64_t offset, int64_t end) {
              const int64_t count = std::max<int64_t>(end - entry.lo, 0);
              const int64_t first = entry.lo + std::clamp<int64_t>(start - before, 0, count);
              const int64_t last = entry.lo + std::clamp<int64_t>(stop - before, 0, count);
              const bool is_behind = before >= stop || (count == 0 && before > start);
              before += count;
              if (first == last) return gap.keep(entry, segment, id, offset, end, is_behind);
              const bool own = entry.segment == thread.tail;
              const bool is_live = !own && entry.hi == kLive && !segment.settled();
              if (is_live && last - first < count) cuts_live(start, stop, entry.segment);
              gap.gap_end = std::max(gap.gap_end, offset + segment.stride * last);
              if (segment.origin == id) {
                gap.own_removed += std::max<int64_t>(last, 0) - std::max<int64_t>(first, 0);
              }
              Entry part = entry;
              part.hi = first;
              if (own || first > entry.lo) gap.keep(part, segment, id, offset, first, false);
              part.lo = last;
              part.hi = end;
              if (end > last) gap.keep(part, segment, id, offset, end, true);
            });
  return gap;
}

// Models without re-rotation read each token as far from the tail as before.
void ThreadTable::check_closed(const Thread& thread, const std::vector<Entry>& view) const {
  if (can_rotate_) return;
  const int64_t difference = tail_offset(thread) - segments_.at(thread.tail).base;
  walk_view(segments_, view, IdleReader{thread.tail},
            [&](const Entry& entry, const Segment& segment, int64_t offset, int64_t end) {
              if (end <= entry.lo || offset - segment.base == difference) return;
              throw Error(ErrorKind::kUnsupportedRope,
                          "drop: this model's positions cannot be re-rotated, and tokens written "
                          "at position " +
                              std::to_string(segment.base + segment.stride * entry.lo) +
                              " would move to " +
                              std::to_string(offset - difference + segment.stride * entry.lo) +
                              "; make a new thread of the tokens that are to stay");
            });
}

// What the thread wrote is sealed, and it goes on in a tail that is written where it is seen, so
// that positions stay small however often a thread drops tokens.
void ThreadTable::reopen_tail(Thread& thread, ThreadId id, const Gap& gap,
                              std::vector<Entry> view) {
  Segment& old_tail = segments_.at(thread.tail);
  const bool moving = thread.view[thread.tail_entry()].offset == kMoving;
  const bool forked = old_tail.forked_tail;
  const int64_t difference = can_rotate_ ? 0 : tail_offset(thread) - old_tail.base;
  old_tail.tokens.resize(old_tail.copied + gap.settled);
  detach_writer(id);
  old_tail.sealed = true;

  const auto place = view.begin() + static_cast<int64_t>(gap.tail_place) +
                     (gap.tail_before ? 0 : static_cast<int64_t>(gap.before.size()));
  const std::vector<Entry> rest(place, view.end());
  view.erase(place, view.end());
  int64_t begin = gap.tail_begin - (gap.tail_moves ? gap.closed() : 0);
  if (gap.tail_begin == kNone) {  // nothing is left of the old one
    begin = view_end(segments_, view, IdleReader{});
  }
  thread.view = std::move(view);
  open_tail(thread, id, moving ? kMoving : begin, begin - difference, forked);
  thread.view.insert(thread.view.end(), rest.begin(), rest.end());
  segments_.at(thread.tail).tokens = gap.queued;
}

void ThreadTable::drop(ThreadId id, int64_t start, int64_t stop) {
  touch();
  Thread& thread = at(id);
  const int64_t total = length(id);
  if (start < 0 || stop < start || stop > total) {
    invalid("drop: got " + std::to_string(start) + " to " + std::to_string(stop) + " for " +
            thread_name(id) + "; expected a range of its " + std::to_string(total) + " tokens");
  }
  if (keeps_states_) invalid("drop: a layer state has read what is to go; trim instead");
  if (start == stop) return;
  if (stop == total) return trim(id, start);
  const Gap gap = plan_gap(thread, id, start, stop);
  std::vector<Entry> view = gap.before;
  for (Entry entry : gap.behind) {
    if (entry.offset != kMoving) entry.offset -= gap.closed();
    view.push_back(entry);
  }
  check_closed(thread, view);

  const int64_t fork_at = fork_position(thread);
  std::vector<int64_t> forks_at;
  for (const ThreadId child : thread.children) {
    forks_at.push_back(fork_position(at(child)) + at(child).fork_shift);
  }
  retain_view(view, id);
  const std::vector<Entry> old_view = thread.view;
  if (gap.keeps_tail) {
    thread.view = std::move(view);
  } else {
    reopen_tail(thread, id, gap, std::move(view));
  }
  ++thread.edits;
  ++thread.trims;
  thread.is_line &= !gap.was_seen;
  std::vector<int32_t>& own = thread.own_tokens;
  const auto own_end = own.end() - std::min<int64_t>(gap.own_behind, std::ssize(own));
  own.erase(own_end - std::min<int64_t>(gap.own_removed, own_end - own.begin()), own_end);

  const Segment& tail = segments_.at(thread.tail);
  const bool sees_last = std::any_of(
      thread.view.begin(), thread.view.end(),
      [&](const Entry& entry) { return shows(entry, thread.logits_segment, thread.logits_index); });
  if (tail.queued() > 0) {
    thread.logits_segment = thread.tail;
    thread.logits_index = tail.length() - 1;
  } else if (thread.logits_segment != kNone && !sees_last) {
    thread.logits_segment = gap.last;
    thread.logits_index = gap.last_index;
  }

  thread.fork_position = gap.moved(fork_at);
  thread.fork_shift += fork_at - fork_position(thread);
  for (size_t i = 0; i < thread.children.size(); ++i) {
    Thread& child = at(thread.children[i]);
    child.fork_shift += gap.moved(forks_at[i]) - forks_at[i];
    if (child.fork_segment != kNone && !sees(thread, child.fork_segment, child.fork_index)) {
      child.joinable = false;
    }
  }
  release_view(old_view);
  free_hidden(thread);
}

}  // namespace apr
