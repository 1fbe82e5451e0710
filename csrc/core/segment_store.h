// Owns segments: runs of tokens on pages, written by one thread at a time, read by any number.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/layer_states.h"
#include "core/page_pool.h"
#include "core/types.h"

namespace apr {

// Tokens [from, from + count) of a segment.
struct TokenRange {
  SegmentId segment;
  int64_t from, count;
};

struct Segment {
  int64_t base = 0;    // position at which token 0 is written
  int64_t stride = 1;  // positions from one token to the next
  int64_t copied = 0;  // tokens of an ancestor that lie before token 0 on the same pages
  std::vector<TokenRange> copied_from;  // where they were written, in order
  int64_t encoded = 0;          // tokens [0, encoded) have keys and values; the rest is queued
  std::vector<int32_t> tokens;  // copied ones first, then token 0, 1, ...
  std::vector<PageId> pages;    // or kNoPage, kAwayPage
  int64_t dropped_pages = 0;    // how many are kNoPage
  int64_t away_pages = 0;       // how many are kAwayPage
  std::vector<PageId> place;    // for these, while they come back
  uint64_t read_last = 0;       // by which of the steps that offload
  SegmentStates states;         // of recurrent layers, where the model has some
  ThreadId writer = kNone;
  ThreadId origin = kNone;  // the last thread that wrote it
  bool sealed = false;
  bool forked_tail = false;  // made as the tail of a fork: a descendant may copy it when short
  bool is_region = false;    // made by a user, for others to follow
  int64_t references = 0;    // views and Python handles that hold it
  // What views and contexts may come to, so that they need not be searched; neither falls as they
  // go.
  int64_t pinned = 0;     // the highest `hi` of an entry, at most
  bool followed = false;  // whether another than the writer may list it live
  std::unordered_map<SegmentId, int32_t> holders;  // whose contexts hold it, and how often

  // The view that encodes queued tokens once their writer is gone; it lists this segment too.
  std::vector<Entry> context;
  Visibility context_visibility = Visibility::kPrevious;

  // Scratch of the step in progress, valid where `stamp` is the step's number.
  uint64_t stamp = 0;
  int64_t encoded_before = 0;
  int64_t required = 0;        // tokens that the step must leave encoded
  std::vector<int64_t> stops;  // where a line goes on from, or ends
  uint64_t listed_stamp = 0;
  int32_t local = -1;                        // number in the plan
  int32_t listed_by = -1, times_listed = 0;  // reader that listed it last, and how often before
  uint64_t run_stamp = 0;
  int64_t run_from = 0, run_to = 0;  // tokens that the chunk encodes
  int32_t run = -1;                  // and its run that does

  int64_t length() const { return static_cast<int64_t>(tokens.size()) - copied; }
  int64_t queued() const { return length() - encoded; }
  // No thread will add to it: sealed, or left by its writer with tokens still queued.
  bool settled() const { return sealed || (writer == kNone && !context.empty()); }
  int64_t written_position(int64_t index) const { return base + stride * index; }
};

class SegmentStore {
 public:
  explicit SegmentStore(PagePool& pool) : pool_(pool) {}

  SegmentId create(int64_t base, int64_t stride);
  // Puts a segment of another table down by its own number; throws kInvalidInput where that is
  // taken.
  Segment& place(SegmentId id, Segment segment);
  SegmentId next_number() const { return next_; }
  void begin_at(SegmentId next) { next_ = next; }
  Segment& at(SegmentId id);
  const Segment& at(SegmentId id) const;
  bool contains(SegmentId id) const { return segments_.count(id) != 0; }
  void clear();  // lets all of them go
  int64_t size() const { return static_cast<int64_t>(segments_.size()); }

  void retain(SegmentId id) { ++at(id).references; }
  // By the view of a thread.
  void retain(const Entry& entry, ThreadId reader) {
    retain(entry.segment);
    note_reader(entry, reader);
  }
  void release(SegmentId id);  // frees the segment when nothing that a user holds leads to it

  // Where token `index` of a segment was written: elsewhere, where it is a copy.
  std::pair<SegmentId, int64_t> written_at(SegmentId id, int64_t index) const;
  // The index that a segment has for a token that was written there; nothing where it has none.
  std::optional<int64_t> index_of(SegmentId id, std::pair<SegmentId, int64_t> written) const;

  void grow_pages(Segment& segment, int64_t slots);    // throws kOutOfPages, keeps what it got
  void shrink_pages(Segment& segment, int64_t slots);  // drops pages past `slots`
  void free_place(Segment& segment);               // where pages that are away were to come back to
  void drop_page(Segment& segment, size_t index);  // frees one; the segment does without
  LayerStates& states() { return states_; }
  void drop_states_after(Segment& segment, int64_t count);
  void set_context(SegmentId id, std::vector<Entry> context, Visibility visibility);
  void clear_context(SegmentId id);

  template <typename Function>
  void for_each(Function&& function) const {
    for (const auto& [id, segment] : segments_) function(id, segment);
  }

 private:
  void note_reader(const Entry& entry, ThreadId reader) {
    Segment& segment = at(entry.segment);
    if (entry.hi != kLive) segment.pinned = std::max(segment.pinned, entry.hi);
    segment.followed |= entry.hi == kLive && (reader == kNone || segment.writer != reader);
  }
  // Each lost a holder, and goes if nothing that a user holds leads to it; so may what it held.
  void collect(std::vector<SegmentId> suspects);
  std::vector<SegmentId> lost_with(SegmentId id) const;
  void let_go(SegmentId holder, const std::vector<Entry>& context,
              std::vector<SegmentId>& suspects);

  PagePool& pool_;
  LayerStates states_;
  SegmentId next_ = 0;
  std::unordered_map<SegmentId, Segment> segments_;
};

}  // namespace apr
