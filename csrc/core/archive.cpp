// Threads and segments as a row of integers, and back.
#include "core/archive.h"

#include <algorithm>
#include <map>
#include <set>
#include <unordered_set>

#include "core/error.h"
#include "core/plan.h"
#include "core/view.h"

namespace apr {
namespace {

constexpr int64_t kFormat = 2;

[[noreturn]] void damaged() {
  invalid("open: the file's threads and segments do not fit together; it was not written by save");
}

// One description of what is kept serves both directions.
class Writer {
 public:
  explicit Writer(std::vector<int64_t>& out) : out_(out) {}
  template <typename T>
  void number(T& value) {
    out_.push_back(static_cast<int64_t>(value));
  }
  template <typename T, typename Each>
  void list(std::vector<T>& values, const Each& each) {
    out_.push_back(static_cast<int64_t>(values.size()));
    for (T& value : values) each(value);
  }

 private:
  std::vector<int64_t>& out_;
};

class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& in) : in_(in) {}
  template <typename T>
  void number(T& value) {
    if (at_ >= in_.size()) damaged();
    value = static_cast<T>(in_[at_++]);
    if (static_cast<int64_t>(value) != in_[at_ - 1]) damaged();
  }
  template <typename T, typename Each>
  void list(std::vector<T>& values, const Each& each) {
    uint64_t count = 0;
    number(count);
    if (count > in_.size() - at_) damaged();
    values.resize(count);
    for (T& value : values) each(value);
  }
  bool is_done() const { return at_ == in_.size(); }

 private:
  const std::vector<int64_t>& in_;
  size_t at_ = 0;
};

template <typename Direction>
void entries(Direction& archive, std::vector<Entry>& view) {
  archive.list(view, [&](Entry& entry) {
    archive.number(entry.segment);
    archive.number(entry.offset);
    archive.number(entry.lo);
    archive.number(entry.hi);
    archive.number(entry.inherited);
  });
}

template <typename Direction>
void visibility(Direction& archive, Visibility& value) {
  auto number = static_cast<uint8_t>(value);
  archive.number(number);
  if (number > static_cast<uint8_t>(Visibility::kCurrent)) damaged();
  value = static_cast<Visibility>(number);
}

template <typename Direction>
void segment_fields(Direction& archive, Segment& segment) {
  archive.number(segment.base);
  archive.number(segment.stride);
  archive.number(segment.copied);
  archive.list(segment.copied_from, [&](TokenRange& range) {
    archive.number(range.segment);
    archive.number(range.from);
    archive.number(range.count);
  });
  archive.number(segment.encoded);
  archive.list(segment.tokens, [&](int32_t& token) { archive.number(token); });
  archive.number(segment.writer);
  archive.number(segment.origin);
  archive.number(segment.sealed);
  archive.number(segment.forked_tail);
  archive.number(segment.is_region);
  entries(archive, segment.context);
  visibility(archive, segment.context_visibility);
}

template <typename Direction>
void thread_fields(Direction& archive, Thread& thread) {
  entries(archive, thread.view);
  archive.number(thread.tail);
  visibility(archive, thread.visibility);
  archive.list(thread.own_tokens, [&](int32_t& token) { archive.number(token); });
  archive.number(thread.logits_segment);
  archive.number(thread.logits_index);
  archive.number(thread.is_line);
  archive.number(thread.forks);
  archive.number(thread.draws);
  archive.number(thread.trims);
  archive.number(thread.parent);
  archive.number(thread.joinable);
  archive.number(thread.fork_position);
  archive.number(thread.fork_shift);
  archive.number(thread.fork_segment);
  archive.number(thread.fork_index);
  archive.list(thread.children, [&](ThreadId& child) { archive.number(child); });
}

// Segments that the threads and the given ones lead to, in order.
std::set<SegmentId> reached(const ThreadTable& table, const std::set<ThreadId>& threads,
                            const std::vector<SegmentId>& segments) {
  std::set<SegmentId> found;
  std::vector<SegmentId> open(segments);
  for (const ThreadId id : threads) {
    for (const Entry& entry : table.at(id).view) open.push_back(entry.segment);
  }
  while (!open.empty()) {
    const SegmentId id = open.back();
    open.pop_back();
    if (!found.insert(id).second) continue;
    const Segment& segment = table.segments().at(id);
    for (const Entry& entry : segment.context) open.push_back(entry.segment);
    const bool orphaned = segment.writer != kNone && threads.count(segment.writer) == 0;
    if (!orphaned || segment.queued() == 0) continue;
    for (const Entry& entry : table.at(segment.writer).view) open.push_back(entry.segment);
  }
  return found;
}

// A segment whose writer stays behind is as one whose writer has left.
Segment without_writer(const ThreadTable& table, const Segment& segment) {
  Segment copy = segment;
  copy.writer = kNone;
  copy.sealed = true;
  if (copy.queued() > 0 && copy.context.empty()) {
    copy.context = table.at(segment.writer).view;
    copy.context_visibility = table.at(segment.writer).visibility;
  }
  return copy;
}

// Up to which token of each segment some of these threads see.
std::map<SegmentId, int64_t> seen_of(const ThreadTable& table, const std::set<ThreadId>& threads) {
  std::map<SegmentId, int64_t> seen;
  for (const ThreadId id : threads) {
    for (const Entry& entry : table.at(id).view) {
      const Segment& segment = table.segments().at(entry.segment);
      int64_t& end = seen[entry.segment];
      end = std::max(end, visible_end(entry, segment, IdleReader{table.at(id).tail}));
    }
  }
  return seen;
}

// Leaves out what stands behind the first `length` tokens of a segment.
void cut(const ThreadTable& table, Segment& segment, int64_t length,
         std::map<SegmentId, int64_t>& seen) {
  const int64_t page_size = table.pool().page_size();
  if (length < segment.length()) {
    segment.tokens.resize(static_cast<size_t>(segment.copied + length));
    segment.encoded = std::min(segment.encoded, length);
    const int64_t slots = segment.copied + segment.encoded;
    segment.pages.resize(static_cast<size_t>((slots + page_size - 1) / page_size));
  }
  for (Entry& entry : segment.context) {
    if (entry.hi != kLive) entry.hi = std::min(entry.hi, seen[entry.segment]);
  }
}

// Pages for the first slots of a segment, but those that were dropped.
void take_pages(ThreadTable& table, Segment& segment, int64_t slots,
                const std::vector<int64_t>& dropped) {
  const int64_t page_size = table.pool().page_size();
  const int64_t pages = (slots + page_size - 1) / page_size;
  for (const int64_t page : dropped) {
    const auto next = static_cast<int64_t>(segment.pages.size());
    if (page < next || page >= pages) damaged();
    table.segments().grow_pages(segment, page * page_size);
    segment.pages.push_back(kNoPage);
    ++segment.dropped_pages;
  }
  table.segments().grow_pages(segment, slots);
}

}  // namespace

Archive save(ThreadTable& table, const std::vector<ThreadId>& threads,
             const std::vector<SegmentId>& segments, bool keys) {
  table.touch();
  const std::set<ThreadId> chosen(threads.begin(), threads.end());
  const std::set<SegmentId> kept = reached(table, chosen, segments);
  Archive out;
  Writer writer(out.numbers);
  int64_t format = kFormat, page_size = table.pool().page_size();
  auto [next_thread, next_segment] = table.next_numbers();
  writer.number(format);
  writer.number(page_size);
  writer.number(next_thread);
  writer.number(next_segment);
  std::map<SegmentId, int64_t> seen;
  if (!keys) seen = seen_of(table, chosen);
  std::vector<SegmentId> segment_ids(kept.begin(), kept.end());
  std::vector<ThreadId> thread_ids(chosen.begin(), chosen.end());
  writer.list(segment_ids, [&](SegmentId& id) {
    writer.number(id);
    Segment segment = table.segments().at(id);
    const bool orphaned = segment.writer != kNone && chosen.count(segment.writer) == 0;
    if (orphaned) segment = without_writer(table, segment);
    if (!keys) cut(table, segment, seen[id], seen);
    segment_fields(writer, segment);
    if (keys && segment.away_pages > 0) invalid("save: pages are away; bring them back first");
    std::vector<int64_t> dropped;
    for (size_t i = 0; i < segment.pages.size(); ++i) {
      const int64_t before = static_cast<int64_t>(i) * page_size;
      if (segment.pages[i] == kNoPage) {
        dropped.push_back(static_cast<int64_t>(i));
        continue;
      }
      out.pages.push_back(segment.pages[i]);
      out.filled.push_back(std::min(page_size, segment.copied + segment.encoded - before));
    }
    writer.list(dropped, [&](int64_t& page) { writer.number(page); });
  });
  writer.list(thread_ids, [&](ThreadId& id) {
    writer.number(id);
    Thread thread = table.at(id);
    if (thread.parent != kNone && chosen.count(thread.parent) == 0) {
      thread.parent = kNone;
      thread.joinable = false;
    }
    std::erase_if(thread.children, [&](ThreadId child) { return chosen.count(child) == 0; });
    thread_fields(writer, thread);
  });
  return out;
}

std::vector<int64_t> stored_slots(const ThreadTable& table, ThreadId id) {
  const int64_t page_size = table.pool().page_size();
  std::vector<int64_t> slots;
  for (const Entry& entry : table.at(id).view) {
    const Segment& segment = table.segments().at(entry.segment);
    const int64_t end = visible_end(entry, segment, IdleReader{table.at(id).tail});
    for (int64_t i = entry.lo; i < std::min(end, segment.encoded); ++i) {
      slots.push_back(slot_of(segment.pages, segment.copied + i, page_size));
    }
  }
  return slots;
}

Archive load(ThreadTable& table, const std::vector<int64_t>& numbers) {
  if (table.num_threads() > 0 || table.segments().size() > 0) {
    invalid("open: expected a table that is empty");
  }
  Archive out;
  Reader reader(numbers);
  int64_t format = 0, page_size = 0, next_thread = 0, next_segment = 0;
  reader.number(format);
  reader.number(page_size);
  reader.number(next_thread);
  reader.number(next_segment);
  if (format != kFormat || page_size != table.pool().page_size()) damaged();
  try {
    std::vector<SegmentId> segment_ids;
    reader.list(segment_ids, [&](SegmentId& id) {
      reader.number(id);
      Segment segment;
      segment_fields(reader, segment);
      std::vector<int64_t> dropped;
      reader.list(dropped, [&](int64_t& page) { reader.number(page); });
      const int64_t slots = segment.copied + segment.encoded;
      if (segment.stride < 1 || segment.copied < 0 || slots < 0 ||
          segment.encoded > segment.length()) {
        damaged();
      }
      std::vector<Entry> context;
      context.swap(segment.context);
      Segment& placed = table.segments().place(id, std::move(segment));
      placed.context = std::move(context);  // who holds whom is known when all are there
      take_pages(table, placed, slots, dropped);
      for (const PageId page : placed.pages) {
        if (page != kNoPage) out.pages.push_back(page);
      }
    });
    std::vector<ThreadId> thread_ids;
    reader.list(thread_ids, [&](ThreadId& id) {
      reader.number(id);
      Thread thread;
      thread_fields(reader, thread);
      table.place(id, std::move(thread));
    });
    if (!reader.is_done()) damaged();
    table.settle_placed(next_thread, next_segment);
  } catch (...) {
    table.clear();
    throw;
  }
  return out;
}

}  // namespace apr
