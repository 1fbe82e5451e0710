// What a step has to run: the queued tokens of its threads, and what their views still ask for.
#include <algorithm>

#include "core/error.h"
#include "core/step.h"
#include "core/view.h"

namespace apr {

void Step::collect(const StepThread& request) {
  Thread& thread = table_.at(request.thread);
  const Segment& tail = table_.segments().at(thread.tail);
  PendingRuns open;
  if (tail.queued() > 0) {
    enter(thread.tail, tail.length(), thread.view, thread.visibility, open);
    finish(open);
    return;
  }
  if (thread.logits_segment == kNone) {
    throw Error(ErrorKind::kInvalidInput,
                "step: thread " + std::to_string(request.thread) +
                    " has nothing queued and no logits (after a join or a new view there are "
                    "none); extend it before the step");
  }
  for (const Entry& entry : thread.view) {
    require(entry, open);
    finish(open);
  }
  const Segment& last = table_.segments().at(thread.logits_segment);
  if (request.has_logits) return;
  // A token that is queued runs under its writer's view; where that is another one than this
  // thread's, its logits are another's.
  if (thread.logits_index >= last.encoded) {
    const auto [view, visibility] = encoder_of(last);
    if (sees_as(thread, *view, visibility)) return;
  }
  std::vector<Entry> view;
  for (Entry entry : thread.view) {
    if (shows(entry, thread.logits_segment, thread.logits_index)) {
      entry.hi = thread.logits_index + 1;
    }
    view.push_back(entry);
  }
  replay_views_.push_back(std::move(view));
  runs_.push_back({thread.logits_segment, thread.logits_index, thread.logits_index + 1,
                   &replay_views_.back(), thread.visibility, request.thread, false});
}

void Step::require(const Entry& entry, PendingRuns& open) {
  const Segment& segment = table_.segments().at(entry.segment);
  int64_t upto;
  if (entry.hi != kLive) {
    upto = std::min(entry.hi, segment.length());
  } else if (segment.settled()) {
    upto = segment.length();
  } else {
    return;  // live: its writer decides when it runs
  }
  if (upto <= segment.encoded) return;
  const auto [view, visibility] = encoder_of(segment);
  enter(entry.segment, upto, *view, visibility, open);
}

std::pair<const std::vector<Entry>*, Visibility> Step::encoder_of(const Segment& segment) const {
  if (segment.writer == kNone) return {&segment.context, segment.context_visibility};
  const Thread& writer = table_.at(segment.writer);
  return {&writer.view, writer.visibility};
}

// Whether the token whose logits the thread wants sees under `view` what the thread sees before it.
bool Step::sees_as(const Thread& thread, const std::vector<Entry>& view,
                   Visibility visibility) const {
  if (&view == &thread.view) return true;
  if (visibility != thread.visibility) return false;
  bool found = false;
  auto mine = thread.view.begin();
  for (const Entry& entry : view) {
    // A child's own tail, in which nothing stands yet, comes before what its parent has behind its.
    if (found && mine != thread.view.end() && mine->segment == thread.tail) ++mine;
    if (mine == thread.view.end() || entry.segment != mine->segment ||
        entry.offset != mine->offset || entry.lo != mine->lo) {
      return false;
    }
    const bool is_last = shows(entry, thread.logits_segment, thread.logits_index);
    if (!is_last && entry.hi != mine->hi) return false;
    found |= is_last;
    ++mine;
  }
  if (mine != thread.view.end() && mine->segment == thread.tail) ++mine;
  return found && mine == thread.view.end();
}

void Step::enter(SegmentId id, int64_t upto, const std::vector<Entry>& view, Visibility visibility,
                 PendingRuns& open) {
  Segment& segment = table_.segments().at(id);
  if (upto <= segment.encoded) return;
  if (segment.stamp == stamp_) {
    segment.required = std::max(segment.required, upto);
    segment.stops.push_back(upto);
    return;
  }
  segment.stamp = stamp_;
  segment.stops = {upto};
  segment.encoded_before = segment.encoded;
  segment.required = upto;
  touched_.push_back(id);
  open.push_back({id, &view, visibility});
}

// Chains of segments may be as long as users make them: no recursion.
void Step::finish(PendingRuns& open) {
  while (!open.empty()) {
    PendingRun& last = open.back();
    if (last.next < last.view->size()) {
      const Entry& entry = (*last.view)[last.next++];
      if (entry.segment != last.segment) require(entry, open);
      continue;
    }
    // `to` is `required`, known later.
    const int64_t from = table_.segments().at(last.segment).encoded;
    runs_.push_back({last.segment, from, 0, last.view, last.visibility});
    open.pop_back();
  }
}

}  // namespace apr
