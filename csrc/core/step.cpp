// One step as a transaction: which queued tokens run, in which forwards, and how to take it all
// back.
#include "core/step.h"

#include <algorithm>

#include "core/error.h"
#include "core/shown.h"
#include "core/view.h"

namespace apr {
Step::Step(ThreadTable& table, const std::vector<StepThread>& threads, int64_t step_tokens,
           bool ragged)
    : table_(table),
      step_tokens_(step_tokens),
      stamp_(fresh_stamp()),
      version_(0),
      ragged_(ragged),
      threads_(threads) {
  if (step_tokens < 1) {
    throw Error(ErrorKind::kInvalidInput,
                "step_tokens: got " + std::to_string(step_tokens) + "; expected at least 1");
  }
  table_.touch();
  version_ = table_.version();
  for (const StepThread& request : threads) table_.at(request.thread);
  try {
    if (room_to_copy(threads)) {
      for (const StepThread& request : threads) copy_short_inheritance(request.thread);
    }
    for (const StepThread& request : threads) collect(request);
    check_split();
    make_room();
    if (table_.keeps_states()) cut_into_pieces();
  } catch (...) {
    rollback();
    throw;
  }
}

Step::~Step() {
  if (open_) rollback();
}

// ---- before a step ---------------------------------------------------------------------------

// Copies are a convenience: near the end of the pool they must not make a step fail that would fit.
bool Step::room_to_copy(const std::vector<StepThread>& threads) const {
  int64_t pages = 0;
  for (const StepThread& request : threads) {
    const Segment& tail = table_.segments().at(table_.at(request.thread).tail);
    pages += tail.queued() / table_.pool().page_size() + 2;
  }
  return table_.pool().num_free() >= pages;
}

// Pages that nobody sees are taken before anything has run: later, rows are on their way that a
// segment without a view shows to nobody else.
void Step::make_room() {
  const int64_t page_size = table_.pool().page_size();
  int64_t pages = 0;
  for (const SegmentId id : touched_) {
    const Segment& segment = table_.segments().at(id);
    pages +=
        (segment.copied + segment.required + page_size - 1) / page_size - std::ssize(segment.pages);
  }
  table_.make_room(pages);
}

// Threads that see each other's current tokens must run in one forward.
void Step::check_split() const {
  int64_t rows = 0;
  bool mutual = false;
  for (const Run& run : runs_) {
    const Segment& segment = table_.segments().at(run.segment);
    rows += run.replay == kNone ? segment.required - run.from : 1;
    if (run.visibility != Visibility::kCurrent) continue;
    for (const Entry& entry : *run.view) {
      const Segment& seen = table_.segments().at(entry.segment);
      mutual |= entry.segment != run.segment && entry.hi == kLive && !seen.settled() &&
                seen.stamp == stamp_;
    }
  }
  if (mutual && rows > step_tokens_) {
    invalid("step: threads with visibility=\"current\" queue " + std::to_string(rows) +
            " tokens, but must run in one forward of at most step_tokens=" +
            std::to_string(step_tokens_) + "; open the Session with a larger step_tokens");
  }
}

// A child whose last inherited entry is short takes a copy of it into its own pages, so that
// repeated forks do not pile up short segments.
bool copies_inheritance(const ThreadTable& table, const Thread& thread) {
  const Segment& tail = table.segments().at(thread.tail);
  const size_t own = thread.tail_entry();
  // Its children remember where they were forked by segment and token.
  if (!thread.children.empty()) return false;
  if (own == 0 || tail.encoded != 0 || tail.copied != 0 || tail.queued() == 0) return false;
  const Entry before = thread.view[own - 1];
  const Entry mine = thread.view[own];
  if (!before.inherited || before.hi == kLive || before.offset == kMoving ||
      mine.offset == kMoving || mine.lo != 0) {
    return false;
  }
  const Segment& source = table.segments().at(before.segment);
  const int64_t count = before.hi - before.lo;
  const bool continues = before.offset + before.hi == mine.offset &&
                         source.base + before.hi == tail.base && source.stride == 1 &&
                         tail.stride == 1;
  const bool without_state = table.keeps_states() && source.states.count(before.hi) == 0;
  return source.forked_tail && continues && !without_state && count > 0 &&
         count < table.pool().page_size() && source.encoded >= before.hi;
}

void Step::copy_short_inheritance(ThreadId id) {
  Thread& thread = table_.at(id);
  if (!copies_inheritance(table_, thread)) return;
  SegmentStore& segments = table_.segments();
  Segment& tail = segments.at(thread.tail);
  const size_t own = thread.tail_entry();
  const Entry before = thread.view[own - 1];
  const Segment& source = segments.at(before.segment);
  const int64_t count = before.hi - before.lo;
  inherited_copies_.push_back({id, thread.view, before.segment});
  segments.grow_pages(tail, count);
  const int64_t page_size = table_.pool().page_size();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = source.copied + before.lo + i;
    copies_.push_back({slot_of(source.pages, from, page_size), slot_of(tail.pages, i, page_size)});
  }
  const auto first = source.tokens.begin() + source.copied + before.lo;
  tail.tokens.insert(tail.tokens.begin(), first, first + count);
  tail.copied = count;
  for (int64_t i = before.lo; i < before.hi; ++i) {
    const auto [id_written, index] = segments.written_at(before.segment, i);
    std::vector<TokenRange>& from = tail.copied_from;
    if (!from.empty() && from.back().segment == id_written &&
        from.back().from + from.back().count == index) {
      ++from.back().count;
    } else {
      from.push_back({id_written, index, 1});
    }
  }
  if (table_.keeps_states()) {
    change_states(thread.tail);
    table_.inherit_state(thread.tail, &before);
  }
  thread.view[own].lo = -count;
  thread.view.erase(thread.view.begin() + static_cast<int64_t>(own) - 1);
  copied_tokens_ += count;
}

// ---- one forward ----------------------------------------------------------------------------

void Step::check_unchanged() {
  if (open_ && version_ == table_.version()) return;
  rollback();
  invalid("step: it is over, or the table was changed meanwhile; begin another one");
}

bool Step::next() {
  check_unchanged();
  if (table_.keeps_states() ? pieces_.empty() : next_run_ >= runs_.size()) return false;
  try {
    plan_next();
  } catch (...) {
    plan_.clear(table_.pool().page_size());  // half of one is nobody's
    throw;
  }
  return true;
}

void Step::plan_next() {
  chunk_ = fresh_stamp();
  plan_.clear(table_.pool().page_size());
  plan_.copies.swap(copies_);
  if (table_.keeps_states()) forget_used();
  chunk_runs_.clear();
  listed_.clear();
  if (table_.keeps_states()) {
    next_pieces();
  } else {
    next_runs();
  }
  for (size_t i = 0; i < chunk_runs_.size(); ++i) {
    add_pairs(chunk_runs_[i], static_cast<int32_t>(i));
  }
  plan_.finish();
  collect_logits_rows();
}

void Step::next_runs() {
  int64_t room = step_tokens_;
  while (room > 0 && next_run_ < runs_.size()) {
    Run run = runs_[next_run_];
    if (run.replay == kNone) {
      run.from = std::max(run.from, next_from_);
      run.to = table_.segments().at(run.segment).required;
    }
    const int64_t take = std::min(room, run.to - run.from);
    const bool done = run.from + take == run.to;
    run.to = run.from + take;
    add_rows(run);
    chunk_runs_.push_back(run);
    room -= take;
    next_from_ = done ? 0 : run.to;
    if (done) ++next_run_;
  }
}

void Step::add_rows(const Run& run) {
  Segment& segment = table_.segments().at(run.segment);
  const int64_t page_size = plan_.page_size;
  if (run.appends) {
    table_.segments().grow_pages(segment, segment.copied + run.to);
    segment.encoded = run.to;
    segment.run_stamp = chunk_;
    segment.run_from = run.from;
    segment.run_to = run.to;
    segment.run = static_cast<int32_t>(plan_.runs.size());
  }
  plan_.add_run(run.to - run.from);
  for (int64_t i = run.from; i < run.to; ++i) {
    const int64_t slot = segment.copied + i;
    plan_.slots.push_back(run.appends ? slot_of(segment.pages, slot, page_size) : -1);
    plan_.ids.push_back(segment.tokens[slot]);
    plan_.positions.push_back(segment.written_position(i));
    plan_.writers.push_back(segment.writer != kNone ? segment.writer : segment.origin);
  }
}

void Step::add_pairs(const Run& run, int32_t run_index) {
  const size_t first_pair = plan_.pairs.size();
  SeenSlots own{};
  own.first_own = kNone;
  const auto see = [&](const Entry& entry, Segment& segment, int64_t offset, int64_t end) {
    if (end <= entry.lo) return;
    if (lacks_pages(entry, segment, plan_.page_size, true)) {
      invalid("step: pages that it reads are not there; please report this");
    }
    const auto add = [&] {
      plan_.segment_numbers.push_back(entry.segment);
      return plan_.add_segment(segment.pages);
    };
    const int32_t number = listed_.number(entry.segment, segment, run_index, add);
    const int64_t copied = segment.copied, behind = segment.stride * copied;
    SeenSlots seen{number,
                   copied + entry.lo,
                   copied + end,
                   offset - behind,
                   segment.base - behind,
                   segment.stride,
                   kNone};
    if (shows(entry, run.segment, run.from)) {
      seen.first_own = copied + run.from;
      own = seen;
    }
    plan_.add_pair(run_index, seen);
  };
  SegmentStore& segments = table_.segments();
  walk_view(segments, *run.view, StepReader{run.segment, run.to, run.visibility, stamp_}, see);
  if (own.first_own == kNone) {  // a region pinned by a reader before any thread wrote it
    Entry entry;
    entry.segment = run.segment;
    Segment& segment = segments.at(run.segment);
    see(entry, segment, segment.base, run.to);
  }
  plan_.end_view(run_index, first_pair, own);
  for (size_t i = first_pair; i < plan_.pairs.size() && !table_.can_rotate(); ++i) {
    if (plan_.pairs[i].rotation == 0) continue;
    throw Error(ErrorKind::kUnsupportedRope,
                "step: a segment would be read " + std::to_string(plan_.pairs[i].rotation) +
                    " positions from where it was written, and this model's positions cannot "
                    "be re-rotated; keep every segment at its written position");
  }
}

void Step::collect_logits_rows() {
  logits_rows_.clear();
  for (size_t i = 0; i < chunk_runs_.size(); ++i) {
    if (chunk_runs_[i].replay != kNone) {
      logits_rows_.emplace_back(chunk_runs_[i].replay, plan_.runs[i].row_begin);
    }
  }
  for (const auto& [id, thread] : table_.threads()) {
    if (thread.logits_segment == kNone) continue;
    const Segment& segment = table_.segments().at(thread.logits_segment);
    const int64_t index = thread.logits_index;
    if (segment.run_stamp != chunk_ || index < segment.run_from || index >= segment.run_to)
      continue;
    const Run& run = chunk_runs_[segment.run];
    if (!sees_as(thread, *run.view, run.visibility)) continue;
    const int32_t row = plan_.runs[segment.run].row_begin;
    logits_rows_.emplace_back(id, row + static_cast<int32_t>(index - segment.run_from));
  }
}

// ---- the transaction ------------------------------------------------------------------------

void Step::commit() {
  check_unchanged();
  open_ = false;
  SegmentStore& segments = table_.segments();
  for (const SegmentId id : touched_) {
    // Clearing one context may free a segment that nothing else held.
    if (segments.contains(id) && segments.at(id).queued() == 0) segments.clear_context(id);
  }
  if (table_.keeps_states()) commit_states();
  for (const InheritedCopy& copy : inherited_copies_) segments.release(copy.dropped);
}

void Step::rollback() {
  if (!open_) return;
  open_ = false;
  SegmentStore& segments = table_.segments();
  // A step that was let go late, by a destructor, may find less than it left: it must not throw.
  restore_states();
  for (const SegmentId id : touched_) {
    if (!segments.contains(id)) continue;
    Segment& segment = segments.at(id);
    segment.encoded = segment.encoded_before;
    segments.shrink_pages(segment, segment.copied + segment.encoded);
  }
  for (auto copy = inherited_copies_.rbegin(); copy != inherited_copies_.rend(); ++copy) {
    if (!table_.alive(copy->thread)) continue;
    Thread& thread = table_.at(copy->thread);
    Segment& tail = segments.at(thread.tail);
    tail.tokens.erase(tail.tokens.begin(), tail.tokens.begin() + tail.copied);
    tail.copied = 0;
    tail.copied_from.clear();
    segments.shrink_pages(tail, 0);
    thread.view = std::move(copy->old_view);
  }
}

}  // namespace apr
