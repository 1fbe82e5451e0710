// Owns threads and their views: fork, join, trim, drop, release, live regions. docs/semantics.md
// has the rules.
#pragma once

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/handles.h"
#include "core/page_pool.h"
#include "core/segment_store.h"
#include "core/types.h"

namespace apr {

struct Thread {
  std::vector<Entry> view;
  SegmentId tail = kNone;  // the one segment that this thread appends to; `view` lists it
  Visibility visibility = Visibility::kPrevious;
  std::vector<int32_t> own_tokens;

  // The token whose logits the thread holds or will get with the next step.
  SegmentId logits_segment = kNone;
  int64_t logits_index = 0;
  int64_t edits = 0;  // another number: logits that were held are no longer that token's

  // What a loop must know of a thread, here so that one call changes it with the tokens.
  bool is_line = true;  // each token sees all before it: no view but by forks, no joined keys
  int64_t forks = 0, draws = 0, trims = 0;

  ThreadId parent = kNone;
  bool joinable = false;  // false once the parent was released, trimmed below the fork or re-viewed
  int64_t fork_position = 0;       // in this thread's own coordinates
  int64_t fork_shift = 0;          // what an ancestor's join added to the parent's coordinates
  SegmentId fork_segment = kNone;  // where the last inherited token was written; kNone: none was
  int64_t fork_index = 0;
  std::vector<ThreadId> children;
  size_t place = 0;  // among the children of its parent

  size_t tail_entry() const;  // index of the own tail in `view`
};

// How much the living threads share.
struct Sharing {
  int64_t stored_tokens = 0;     // encoded tokens, each counted once
  int64_t seen_tokens = 0;       // the same, counted once for every thread that sees them
  int64_t shared_pages = 0;      // pages that more than one thread reads
  int64_t replicated_pages = 0;  // pages that one copy of the cache per thread would take
};

// How many pages a step of some threads takes, and which segments that it reads are away.
struct StepNeeds {
  int64_t pages = 0;
  std::vector<SegmentId> away;
};

inline std::string thread_name(ThreadId id) { return "thread " + std::to_string(id); }

class ThreadTable {
 public:
  ThreadTable(int64_t num_pages, int64_t page_size, bool can_rotate, int64_t most_pages = 0);

  // For models with recurrent layers: a state is kept at the end of each segment, where a tail was
  // forked, and after every `checkpoint_tokens` tokens, if not 0. `one_token`: from a state on, the
  // model runs one token at a time.
  void keep_states(int64_t checkpoint_tokens, bool one_token);
  bool keeps_states() const { return keeps_states_; }
  int64_t checkpoint_tokens() const { return checkpoint_tokens_; }
  bool one_token_a_state() const { return one_token_; }
  // Lets a tail begin with the state after `last`, the entry that it continues, where that is
  // there.
  void inherit_state(SegmentId tail, const Entry* last);
  void inherit_state(Thread& child, SegmentId parent_tail);
  // The state that `count` tokens of a thread's tail go on from; kNone where it is not there.
  StateId state_before(ThreadId id, int64_t count) const;
  // Whether the state after `count` tokens of a segment is kept when more of it has run.
  bool keeps_state_after(int64_t count) const {
    return count == 0 || (checkpoint_tokens_ > 0 && count % checkpoint_tokens_ == 0);
  }
  // The most tokens, up to `length`, after which a thread's state is kept.
  int64_t nearest_state(ThreadId id, int64_t length) const;
  // All that these threads see, each once.
  std::vector<StateId> states_of(const std::vector<ThreadId>& ids) const;

  // Threads.
  ThreadId create(const std::vector<int32_t>& tokens);
  ThreadId create_with_view(std::vector<Entry> view, SegmentId writes, Visibility visibility,
                            const std::vector<int32_t>& tokens);
  void extend(ThreadId id, const std::vector<int32_t>& tokens);
  // One token each; all threads are checked first.
  // `drawn`: whether it was drawn at random.
  void extend_each(const std::vector<ThreadId>& ids, const std::vector<int32_t>& tokens,
                   const std::vector<bool>& drawn);
  std::vector<ThreadId> fork(ThreadId id, int64_t count);
  void check_fork(ThreadId id, int64_t count) const;  // throws kInvalidInput
  void join(ThreadId parent, const std::vector<ThreadId>& children, JoinPositions positions,
            bool reencode);
  void trim(ThreadId id, int64_t length);
  void drop(ThreadId id, int64_t start, int64_t stop);
  void release(ThreadId id);
  void set_view(ThreadId id, std::vector<Entry> view);
  void set_writes(ThreadId id, SegmentId segment);

  // Handles that are let go, at any moment, inside of a step too, are noted; this gives back what
  // they held, and returns the threads.
  std::vector<ThreadId> release_dropped();
  // For what another table saved (archive.h): puts a thread down by its number; then, when all are
  // there, counts who holds what, and throws kInvalidInput where they do not fit together.
  void place(ThreadId id, Thread thread);
  void settle_placed(ThreadId next_thread, SegmentId next_segment);
  // That no thread and no segment had yet: numbers are never used twice, in a file neither.
  std::pair<ThreadId, SegmentId> next_numbers() const { return {next_, segments_.next_number()}; }
  // What is not as it should be, with so many handles of segments.
  std::vector<std::string> check(int64_t handles) const;
  std::vector<ThreadId> clear();  // lets every segment go, and all threads, which it returns

  // Segments that users make themselves; each call returns with one reference, the handle's.
  SegmentId create_segment(const std::vector<int32_t>& tokens, int64_t base,
                           std::vector<Entry> after);
  SegmentId create_region(const std::vector<int32_t>& tokens, int64_t base, int64_t stride);
  void seal(SegmentId id);

  // What a user may ask.
  bool alive(ThreadId id) const { return threads_.count(id) != 0; }
  Dropped& dropped_threads() { return dropped_threads_; }
  Dropped& dropped_segments() { return dropped_segments_; }
  int64_t num_threads() const { return static_cast<int64_t>(threads_.size()); }
  int64_t length(ThreadId id) const;
  int64_t position(ThreadId id) const;
  std::vector<int32_t> tokens(ThreadId id) const;
  Sharing sharing() const;
  const Thread& at(ThreadId id) const;
  Thread& at(ThreadId id);
  std::unordered_map<ThreadId, Thread>& threads() { return threads_; }

  // Changes with whatever may change a view; tokens that are queued or encoded do not.
  uint64_t version() const { return version_; }
  // Called before each such change; pages that were granted ahead go back.
  void touch();
  // Gives a segment pages for `slots` of its slots until the next touch(), though fewer are
  // encoded.
  void grant_pages(Segment& segment, int64_t slots);
  // Frees what nobody sees where fewer pages are free; between steps, or as one begins.
  void make_room(int64_t pages);

  // Contents of pages that lie elsewhere while others need the pages (offload.cpp): who moves them
  // asks what a step needs, and which other segments nobody has read for longest, copies their
  // pages and sends them away; or makes place, fills it, and brings them back.
  // `all_of_it`: to be saved, with all that their queued tokens will see.
  StepNeeds needs_of(const std::vector<ThreadId>& threads, const std::vector<SegmentId>& handles,
                     bool all_of_it);
  std::vector<SegmentId> idle_segments() const;  // but those that were needed last
  void send_away(SegmentId id);
  std::vector<PageId> make_place(SegmentId id);  // of each page that is away; throws kOutOfPages
  void bring_back(SegmentId id);
  int64_t offloaded_pages() const;
  // Whether one of them reads what another is writing: who writes when decides what they write.
  bool follows_others(const std::vector<ThreadId>& threads) const;

  PagePool& pool() { return pool_; }
  const PagePool& pool() const { return pool_; }
  SegmentStore& segments() { return segments_; }
  const SegmentStore& segments() const { return segments_; }
  bool can_rotate() const { return can_rotate_; }

  // View position of token 0 of the thread's own tail.
  int64_t tail_offset(const Thread& thread) const;

 private:
  friend class Step;

  void check_view(const std::vector<Entry>& view, SegmentId own) const;
  void check_given_view(const std::vector<Entry>& view, SegmentId own) const;  // by a user
  void check_writable(SegmentId id, ThreadId writer) const;
  void check_rotation(const std::vector<Entry>& view, SegmentId own) const;
  void retain_view(const std::vector<Entry>& view, ThreadId reader);
  void release_view(const std::vector<Entry>& view);
  void detach_writer(ThreadId id);
  void open_tail(Thread& thread, ThreadId id, int64_t offset, int64_t base, bool forked);
  void seal_tail_for_join(ThreadId id);
  void join_text(ThreadId parent_id, const std::vector<ThreadId>& children);
  void regraft(ThreadId child, ThreadId parent, int64_t shift);
  int64_t fork_position(const Thread& child) const;
  bool sees(const Thread& thread, SegmentId segment, int64_t index) const;
  // Of a segment: up to which token other views and contexts pin it, and whether one follows it
  // live.
  struct Readers {
    int64_t pinned = 0;
    bool follow = false;
  };
  Readers readers_besides(SegmentId id, ThreadId except) const;
  void orphan_children(ThreadId id);
  ThreadId fork_once(ThreadId id, int64_t at_position);
  void check_joinable(ThreadId parent, const std::vector<ThreadId>& children) const;
  std::vector<Entry> own_part(const Thread& child) const;
  struct Cut;
  Cut plan_cut(const Thread& thread, ThreadId id, int64_t length_kept) const;
  struct Gap;
  Gap plan_gap(const Thread& thread, ThreadId id, int64_t start, int64_t stop) const;
  void check_closed(const Thread& thread, const std::vector<Entry>& view) const;
  void reopen_tail(Thread& thread, ThreadId id, const Gap& gap, std::vector<Entry> view);
  void free_hidden();                      // pages that nobody sees
  void free_hidden(const Thread& thread);  // the same, of segments that only this thread lists

  PagePool pool_;
  SegmentStore segments_;
  bool can_rotate_;
  bool keeps_states_ = false, one_token_ = false;
  int64_t checkpoint_tokens_ = 0;
  ThreadId next_ = 0;
  Dropped dropped_threads_, dropped_segments_;
  uint64_t version_ = 0;
  bool granted_ = false;  // some segment has pages ahead of what is encoded
  uint64_t reading_ = 0;  // how often needs_of was asked
  std::unordered_map<ThreadId, Thread> threads_;
};

}  // namespace apr
