// One step as a transaction: which queued tokens run, in which forwards, and how to take it all
// back.
#pragma once

#include <deque>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "core/listed_ranges.h"
#include "core/plan.h"
#include "core/thread_table.h"

namespace apr {

struct StepThread {
  ThreadId thread;
  bool has_logits;  // the caller still holds the logits of the thread's last token
};

// Whether the thread's next step first copies a short part that it inherited.
bool copies_inheritance(const ThreadTable& table, const Thread& thread);

class Step {
 public:
  // Collects the work; throws kInvalidInput or kOutOfPages before anything is changed. `ragged`:
  // where layer states are kept, one forward takes lines of any length.
  Step(ThreadTable& table, const std::vector<StepThread>& threads, int64_t step_tokens,
       bool ragged = false);
  ~Step();
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  bool next();  // plans the next forward of at most `step_tokens` rows; false when all are planned
  void commit();
  void rollback();

  const Plan& plan() const { return plan_; }
  // Rows of the planned forward whose logits some living thread is waiting for.
  const std::vector<std::pair<ThreadId, int32_t>>& logits_rows() const { return logits_rows_; }
  int64_t copied_tokens() const { return copied_tokens_; }
  // Of each run of the planned forward the layer state that it begins with, kNone at the beginning
  // of a line, and the one that it leaves, kNone where that is there already.
  const std::vector<StateId>& starts() const { return starts_; }
  const std::vector<StateId>& ends() const { return ends_; }
  LayerStates& states() { return table_.segments().states(); }

 private:
  using Place = std::pair<SegmentId, int64_t>;  // after so many tokens of a segment
  static constexpr Place kBeginning{kNone, 0};

  struct Run {
    SegmentId segment;
    int64_t from, to;
    const std::vector<Entry>* view;
    Visibility visibility;
    ThreadId replay = kNone;   // a token that is run again for this thread's logits
    bool appends = true;       // else its keys and values are stored already
    Place start = kBeginning;  // where the layer state lies that it begins with
  };
  struct InheritedCopy {
    ThreadId thread;
    std::vector<Entry> old_view;
    SegmentId dropped;
  };

  void check_unchanged();
  void collect(const StepThread& request);
  // A segment whose queued tokens run, after what its view still asks for.
  struct PendingRun {
    SegmentId segment;
    const std::vector<Entry>* view;
    Visibility visibility;
    size_t next = 0;  // entry of the view
  };
  using PendingRuns = std::vector<PendingRun>;
  void require(const Entry& entry, PendingRuns& open);
  void enter(SegmentId id, int64_t upto, const std::vector<Entry>& view, Visibility visibility,
             PendingRuns& open);
  void finish(PendingRuns& open);
  bool room_to_copy(const std::vector<StepThread>& threads) const;
  void make_room();
  void check_split() const;
  void copy_short_inheritance(ThreadId id);
  void add_rows(const Run& run);
  void add_pairs(const Run& run, int32_t run_index);
  void collect_logits_rows();
  // The view and visibility under which a segment's queued tokens run.
  std::pair<const std::vector<Entry>*, Visibility> encoder_of(const Segment& segment) const;
  bool sees_as(const Thread& thread, const std::vector<Entry>& view, Visibility visibility) const;

  void plan_next();
  void next_runs();
  void cut_into_pieces();
  void require_state(SegmentId id, int64_t count, const std::vector<Entry>& view);
  void cut(Run run, int64_t to);
  bool has_state(const Place& place) const;
  std::optional<StateId> start_of(const Run& run);
  void forget_used();
  bool stays(const Segment& segment, int64_t count) const;
  void next_pieces();
  SegmentStates& change_states(SegmentId id);
  void commit_states();
  void restore_states();

  ThreadTable& table_;
  int64_t step_tokens_;
  uint64_t stamp_;
  uint64_t version_;  // of the table: another one means that its views were changed meanwhile
  uint64_t chunk_ = 0;
  bool open_ = true;
  std::vector<Run> runs_;
  size_t next_run_ = 0;
  int64_t next_from_ = 0;
  std::vector<Run> chunk_runs_;
  ListedRanges listed_;
  std::vector<SegmentId> touched_;
  std::vector<InheritedCopy> inherited_copies_;
  std::vector<PlanCopy> copies_;
  std::deque<std::vector<Entry>> replay_views_;
  int64_t copied_tokens_ = 0;
  std::vector<std::pair<ThreadId, int32_t>> logits_rows_;
  Plan plan_;

  // Where layer states are kept.
  bool ragged_;
  std::vector<StepThread> threads_;
  std::vector<Run> pieces_;        // that no forward has taken yet
  std::set<Place> planned_;        // where they leave states
  std::map<Place, int64_t> uses_;  // pieces that begin there, and have not run
  std::vector<StateId> starts_, ends_;
  std::map<SegmentId, SegmentStates> saved_states_;  // of segments whose states were changed
};

}  // namespace apr
