// Flat tables of the views of threads that each have one token queued: what a device needs to work
// out step after step by itself, and the host's part of such a step.
#include "core/view_tables.h"

#include <algorithm>

#include "core/digest.h"
#include "core/error.h"
#include "core/step.h"
#include "core/view.h"

namespace apr {
namespace {

// Pages that each thread gets ahead, so that the tables stay as they are for as many steps as they
// hold.
constexpr int64_t kMostPagesAhead = 16;

int64_t pages_ahead(const PagePool& pool, int64_t threads) {
  return std::clamp<int64_t>(pool.num_free() / (4 * threads), 1, kMostPagesAhead);
}

}  // namespace

bool ViewTables::refresh(ThreadTable& table, const std::vector<ThreadId>& threads) {
  changed_ = version_ != table.version() || table_ != &table || threads != threads_;
  if (!changed_) {
    for (const Segment* tail : tails_) {
      const auto room = static_cast<int64_t>(tail->pages.size()) * page_size_;
      if (tail->queued() != 1) {
        version_ = kNever;
        return false;
      }
      changed_ |= tail->copied + tail->encoded + 1 > room;
    }
  }
  if ((changed_ && !build(table, threads)) || (table.keeps_states() && !find_starts(table))) {
    version_ = kNever;
    return false;
  }
  table_ = &table;
  ready_ = true;
  max_position_ = 0;
  for (size_t row = 0; row < tails_.size(); ++row) {
    const Segment& tail = *tails_[row];
    ids_[row] = tail.tokens.back();
    max_position_ = std::max(max_position_, tail.written_position(tail.encoded));
  }
  return true;
}

void ViewTables::check(const ThreadTable& table) const {
  if (!ready_ || table_ != &table || version_ != table.version()) {
    invalid("views: expected the table that was refreshed from, as it was then, once");
  }
}

void ViewTables::commit(ThreadTable& table) {
  check(table);
  if (table.keeps_states()) commit_states(table);
  for (Segment* tail : tails_) ++tail->encoded;
  ready_ = false;
}

void ViewTables::forget(ThreadTable& table) {
  version_ = kNever;
  if (table_ == &table) release_ends(table);
  table.touch();
}

bool ViewTables::find_starts(const ThreadTable& table) {
  starts_.clear();
  for (size_t row = 0; row < tails_.size(); ++row) {
    const StateId state = table.state_before(threads_[row], tails_[row]->encoded);
    if (state == kNone) return false;
    starts_.push_back(state);
  }
  return true;
}

const std::vector<StateId>& ViewTables::name_ends(ThreadTable& table) {
  check(table);
  release_ends(table);
  for (size_t row = 0; row < tails_.size(); ++row) {
    ends_.push_back(table.segments().states().create());
  }
  return ends_;
}

void ViewTables::release_ends(ThreadTable& table) {
  for (const StateId state : ends_) table.segments().states().release(state);
  ends_.clear();
}

void ViewTables::commit_states(ThreadTable& table) {
  if (ends_.size() != tails_.size()) invalid("views: name_ends comes before commit");
  LayerStates& held = table.segments().states();
  // Rows may go on from one state that only one of their tails refers to.
  for (const StateId state : starts_) held.retain(state);
  for (size_t row = 0; row < tails_.size(); ++row) {
    SegmentStates& states = tails_[row]->states;
    const int64_t count = tails_[row]->encoded;
    states[count + 1] = ends_[row];
    if (!table.keeps_state_after(count)) {
      const auto former = states.find(count);
      if (former == states.end()) continue;
      held.release(former->second);
      states.erase(former);
    } else if (states.emplace(count, starts_[row]).second) {
      held.retain(starts_[row]);
    }
  }
  for (const StateId state : starts_) held.release(state);
  ends_.clear();
}

bool ViewTables::build(ThreadTable& table, const std::vector<ThreadId>& threads) {
  version_ = kNever;
  table.touch();  // what was granted before, to these threads or to others, is free again
  page_size_ = table.pool().page_size();
  threads_ = threads;
  tails_.clear();
  rows_.clear();
  entries_.clear();
  segments_.clear();
  segment_ids_.clear();
  listed_.clear();
  page_table_.clear();
  for (const ThreadId id : threads) {
    if (!add_row(table, table.at(id)) || awaited(table, id)) return false;
  }
  ids_.assign(threads.size(), 0);
  grant_pages(table);
  // Entries sorted by segment are pairs; counting keeps the readers of a segment in the order of
  // rows.
  std::vector<int32_t> next(segments_.size() + 1, 0);
  for (const DeviceEntry& entry : entries_) ++next[static_cast<size_t>(entry.segment) + 1];
  for (size_t s = 1; s < next.size(); ++s) next[s] += next[s - 1];
  for (DeviceEntry& entry : entries_) entry.pair = next[static_cast<size_t>(entry.segment)]++;
  for (size_t s = 0; s < segments_.size(); ++s) {
    segments_[s].first_page = static_cast<int32_t>(page_table_.size());
    const Segment& segment = table.segments().at(segment_ids_[s]);
    for (const PageId page : segment.pages) page_table_.push_back(std::max(page, 0));
  }
  version_ = table.version();
  return true;
}

void ViewTables::grant_pages(ThreadTable& table) {
  const auto missing = [this](const Segment& tail) {
    const int64_t room = static_cast<int64_t>(tail.pages.size()) * page_size_;
    return tail.copied + tail.encoded + 1 > room ? 1 : 0;
  };
  int64_t all = 0;
  for (const Segment* tail : tails_) all += missing(*tail);
  table.make_room(all);
  table.pool().require(all);
  const int64_t ahead = pages_ahead(table.pool(), static_cast<int64_t>(tails_.size()));
  for (Segment* tail : tails_) {  // first what this step needs, then the rest as far as it goes
    table.grant_pages(*tail, tail->copied + tail->encoded + 1);
  }
  for (Segment* tail : tails_) {
    if (table.pool().num_free() < ahead) return;
    table.grant_pages(*tail, tail->copied + tail->encoded + 1 + (ahead - 1) * page_size_);
  }
}

// Threads that were forked from a queued token wait for its logits; a planned step hands them out.
bool ViewTables::awaited(ThreadTable& table, ThreadId writer) const {
  const Thread& thread = table.at(writer);
  for (const auto& [id, other] : table.threads()) {
    if (id != writer && other.logits_segment == thread.tail &&
        other.logits_index == thread.logits_index) {
      return true;
    }
  }
  return false;
}

bool ViewTables::add_row(ThreadTable& table, const Thread& thread) {
  SegmentStore& store = table.segments();
  Segment& tail = store.at(thread.tail);
  if (tail.queued() != 1 || !tail.context.empty() || copies_inheritance(table, thread) ||
      (!table.can_rotate() && turns(table, thread))) {
    return false;
  }
  const auto row = static_cast<int32_t>(rows_.size());
  DeviceRow flat{static_cast<int32_t>(entries_.size()), static_cast<int32_t>(thread.view.size()), 0,
                 thread.visibility == Visibility::kCurrent ? 1 : 0};
  for (const Entry& entry : thread.view) {
    Segment& segment = store.at(entry.segment);
    DeviceEntry line{};
    line.segment = listed_.number(entry.segment, segment, row, [&] {
      segments_.push_back({static_cast<int32_t>(segment.base), static_cast<int32_t>(segment.stride),
                           static_cast<int32_t>(segment.copied),
                           static_cast<int32_t>(segment.encoded), 0, -1});
      segment_ids_.push_back(entry.segment);
      return static_cast<int32_t>(segments_.size()) - 1;
    });
    line.offset = entry.offset == kMoving ? kMovingOffset : static_cast<int32_t>(entry.offset);
    line.lo = static_cast<int32_t>(entry.lo);
    line.hi = kLiveEnd;
    if (entry.segment == thread.tail) {
      flat.own = static_cast<int32_t>(entries_.size()) - flat.first_entry;
      segments_[static_cast<size_t>(line.segment)].writer = row;
    } else if (entry.hi != kLive || segment.settled()) {
      const int64_t upto = visible_end(entry, segment, IdleReader{});
      if (upto > segment.encoded) return false;  // it has to run first
      line.hi = static_cast<int32_t>(upto);
    }
    entries_.push_back(line);
  }
  rows_.push_back(flat);
  tails_.push_back(&tail);
  return true;
}

// Whether some entry would be read elsewhere than where it was written, now or as lengths grow.
bool ViewTables::turns(const ThreadTable& table, const Thread& thread) const {
  const int64_t own = table.tail_offset(thread) - table.segments().at(thread.tail).base;
  bool first = true, found = false;
  walk_view(table.segments(), thread.view, IdleReader{thread.tail},
            [&](const Entry& entry, const Segment& segment, int64_t offset, int64_t) {
              found |= (entry.offset == kMoving && !first) || offset - segment.base != own;
              first = false;
            });
  return found;
}

// Tables are made anew when something else was let go, at other moments in other processes: a
// digest is of what they mean by now, not of when they were made.
uint64_t ViewTables::digest() const {
  Digest digest;
  for (const ThreadId id : threads_) digest.mix(id);
  for (const int64_t id : ids_) digest.mix(id);
  digest.mix(max_position_);
  for (const DeviceRow& row : rows_) {
    digest.mix(row.num_entries);
    digest.mix(row.current);
  }
  for (const DeviceEntry& entry : entries_) {
    const DeviceSegment& segment = segments_[entry.segment];
    const bool grows = segment.writer >= 0;
    const int64_t length = grows ? tails_[segment.writer]->encoded : segment.length;
    digest.mix(segment_ids_[entry.segment]);
    digest.mix(entry.offset);
    digest.mix(entry.lo);
    digest.mix(entry.hi == kLiveEnd ? length : entry.hi);
  }
  return digest.value();
}

}  // namespace apr
