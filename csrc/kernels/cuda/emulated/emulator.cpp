// Runs one CUDA block on the CPU: a fiber for each thread, in an order drawn at random wherever the
// hardware leaves it open, with shared memory that is poisoned and checked.
#undef _FORTIFY_SOURCE  // its longjmp takes a change of stacks for an attack
#include "kernels/cuda/emulated/emulator.h"

#include <ucontext.h>

#include <csetjmp>
#include <cstring>
#include <deque>
#include <exception>
#include <numeric>

namespace apr::cuda_emulated {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int64_t kGuardBytes = 1024;
constexpr uint32_t kFirstAddress = 1024;  // so that 0 is no address
constexpr char kPoison = '\xff';          // NaN in every format

thread_local Block* running_block = nullptr;
uint64_t next_seed = 1;
int multiprocessors = 1;

}  // namespace

struct Fiber {
  int index = 0;
  std::vector<char> stack;
  ucontext_t start{};
  jmp_buf resume, scheduler;
  bool started = false, done = false;
  std::exception_ptr error;
  const std::function<void()>* body = nullptr;
  const char* waits_for = "";
  // Committed groups of asynchronous work, oldest first, and the one that is open.
  std::deque<std::vector<std::function<void()>>> groups[Block::kKinds];
  std::vector<std::function<void()>> open[Block::kKinds];
};

namespace {

void enter(unsigned low, unsigned high) {
  auto* fiber = reinterpret_cast<Fiber*>((static_cast<uintptr_t>(high) << 32) | low);
  try {
    (*fiber->body)();
  } catch (...) {
    fiber->error = std::current_exception();
  }
  fiber->done = true;
  _longjmp(fiber->scheduler, 1);
}

void switch_to(Fiber& fiber) {
  if (_setjmp(fiber.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = fiber.stack.size();
  fiber.start.uc_link = nullptr;
  const auto address = reinterpret_cast<uintptr_t>(&fiber);
  makecontext(&fiber.start, reinterpret_cast<void (*)()>(enter), 2,
              static_cast<unsigned>(address & 0xffffffffu), static_cast<unsigned>(address >> 32));
  setcontext(&fiber.start);
}

// Stacks are kept between blocks: touching fresh ones would cost more than most kernels.
std::vector<std::vector<char>>& spare_stacks() {
  thread_local std::vector<std::vector<char>> stacks;
  return stacks;
}

}  // namespace

Block::Block(int64_t threads, int64_t block, int64_t blocks, int64_t shared_bytes, uint64_t seed)
    : threads_(threads),
      block_(block),
      blocks_(blocks),
      random_(seed * 0x9e3779b97f4a7c15u + 1),
      memory_(static_cast<size_t>(shared_bytes + 1024 + kGuardBytes), kPoison),
      shared_bytes_(shared_bytes),
      warps_(static_cast<size_t>((threads + 31) / 32)),
      groups_(static_cast<size_t>((threads + 127) / 128)),
      barriers_(16) {
  if (counting()) counter_.emplace(threads);
  const auto address = reinterpret_cast<uintptr_t>(memory_.data());
  shared_base_ = memory_.data() + (1024 - address % 1024) % 1024;
  for (int64_t i = 0; i < threads; ++i) {
    auto fiber = std::make_unique<Fiber>();
    fiber->index = static_cast<int>(i);
    if (spare_stacks().empty()) {
      fiber->stack.resize(kStackBytes);
    } else {
      fiber->stack = std::move(spare_stacks().back());
      spare_stacks().pop_back();
    }
    fibers_.push_back(std::move(fiber));
  }
}

Block::~Block() {
  for (auto& fiber : fibers_) spare_stacks().push_back(std::move(fiber->stack));
}

Block& Block::current() { return *running_block; }

// Calls from one place in a kernel are one instruction.
__attribute__((noinline)) void note_global(const void* address, int64_t bytes) {
  if (running_block == nullptr || running_block->counter() == nullptr) return;
  running_block->counter()->access(kGlobal, running_block->thread(), __builtin_return_address(0),
                                   reinterpret_cast<uint64_t>(address), bytes);
}
__attribute__((noinline)) void note_shared(Memory memory, uint32_t address, int64_t bytes) {
  if (running_block->counter() == nullptr) return;
  running_block->counter()->access(memory, running_block->thread(), __builtin_return_address(0),
                                   address, bytes);
}

int Block::thread() const { return running_->index; }

uint64_t Block::draw(uint64_t below) {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return random_ % below;
}

void Block::run(const std::function<void()>& body) {
  const struct Running {
    explicit Running(Block* block) { running_block = block; }
    ~Running() { running_block = nullptr; }
  } running(this);
  for (auto& fiber : fibers_) {
    fiber->body = &body;
    runnable_.push_back(fiber.get());
  }
  int64_t alive = threads_;
  while (alive > 0) {
    if (!free_work_.empty() && (runnable_.empty() || draw(8) == 0)) finish_one_free();
    if (runnable_.empty()) {
      if (!free_work_.empty()) continue;
      throw Fault("deadlock: " + stuck());
    }
    const size_t pick = draw(runnable_.size());
    running_ = runnable_[pick];
    runnable_[pick] = runnable_.back();
    runnable_.pop_back();
    switch_to(*running_);
    if (running_->error) std::rethrow_exception(running_->error);
    alive -= running_->done ? 1 : 0;
  }
  for (const auto& fiber : fibers_) {
    for (int kind = 0; kind < kKinds; ++kind) {
      for (const auto& group : fiber->groups[kind]) {
        if (!group.empty())
          throw Fault("a thread ended with asynchronous work that nobody awaited");
      }
      if (!fiber->open[kind].empty()) throw Fault("a thread ended with uncommitted work");
    }
  }
  if (!free_work_.empty()) throw Fault("the block ended with bulk copies in flight");
  const char* end = shared_base_ + shared_bytes_;
  for (const char* p = end; p < memory_.data() + memory_.size(); ++p) {
    if (*p != kPoison) throw Fault("a thread wrote past the end of shared memory");
  }
}

std::string Block::stuck() const {
  std::string text;
  for (size_t i = 0; i < fibers_.size();) {
    size_t end = i + 1;
    const auto same = [&](const Fiber& a, const Fiber& b) {
      return a.done == b.done && (a.done || a.waits_for == b.waits_for);
    };
    while (end < fibers_.size() && same(*fibers_[end], *fibers_[i])) ++end;
    text += "threads " + std::to_string(i) + " to " + std::to_string(end - 1) +
            (fibers_[i]->done ? " ended" : std::string(" at ") + fibers_[i]->waits_for) + "; ";
    i = end;
  }
  return text;
}

void Block::block_current() {
  Fiber* fiber = running_;
  if (_setjmp(fiber->resume) == 0) _longjmp(fiber->scheduler, 1);
}

void Block::wake(Fiber* fiber) { runnable_.push_back(fiber); }

void Block::meet(Meeting& meeting, int size, int rank, const char* what, void* argument,
                 const Act& act) {
  if (meeting.arrived == 0) {
    meeting.size = size;
    meeting.what = what;
    meeting.arguments.assign(static_cast<size_t>(size), nullptr);
  } else if (meeting.what != what || meeting.size != size) {
    throw Fault(std::string("threads disagree: some at ") + meeting.what + ", some at " + what);
  }
  meeting.arguments[static_cast<size_t>(rank)] = argument;
  if (++meeting.arrived < size) {
    running_->waits_for = what;
    meeting.waiting.push_back(running_);
    block_current();
    return;
  }
  meeting.arrived = 0;
  act(meeting.arguments);
  if (counter_) {
    counter_->meet(running_->index / 32);
    for (const Fiber* fiber : meeting.waiting) {
      if (fiber->index % 32 == 0) counter_->meet(fiber->index / 32);
    }
  }
  for (Fiber* fiber : meeting.waiting) wake(fiber);
  meeting.waiting.clear();
  wake(running_);  // others may go first
  block_current();
}

uint32_t Block::shared_address(const void* pointer) const {
  return kFirstAddress + static_cast<uint32_t>(static_cast<const char*>(pointer) - shared_base_);
}

char* Block::shared_at(uint32_t address, int64_t bytes, int64_t alignment) {
  const int64_t offset = static_cast<int64_t>(address) - kFirstAddress;
  if (offset < 0 || offset + bytes > shared_bytes_ || offset % alignment != 0) {
    throw Fault("shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                " of " + std::to_string(shared_bytes_) + ", aligned to " +
                std::to_string(alignment));
  }
  return shared_base_ + offset;
}

// ---- asynchronous work ----------------------------------------------------------------------

void Block::start(Kind kind, std::function<void()> work) {
  if (kind == kCopy && draw(2) == 0) {
    work();
    return;
  }
  running_->open[kind].push_back(std::move(work));
}

void Block::commit(Kind kind) {
  running_->groups[kind].push_back(std::move(running_->open[kind]));
  running_->open[kind].clear();
}

void Block::wait(Kind kind, int groups_left) {
  auto& groups = running_->groups[kind];
  while (static_cast<int>(groups.size()) > groups_left) {
    for (auto& work : groups.front()) work();
    groups.pop_front();
  }
}

void Block::start_free(std::function<void()> work) { free_work_.push_back(std::move(work)); }

void Block::finish_one_free() {
  const size_t pick = draw(free_work_.size());
  const auto work = std::move(free_work_[pick]);
  free_work_.erase(free_work_.begin() + static_cast<int64_t>(pick));
  work();
}

PhaseBarrier* Block::find_barrier(uint32_t address, bool fresh) {
  shared_at(address, 8, 8);
  for (auto& [at, barrier] : phase_barriers_) {
    if (at == address) return barrier.get();
  }
  if (!fresh) throw Fault("a barrier of shared memory was used before it was initialised");
  phase_barriers_.emplace_back(address, std::make_unique<PhaseBarrier>());
  return phase_barriers_.back().second.get();
}

void Block::init_barrier(uint32_t address, int count) {
  PhaseBarrier* barrier = find_barrier(address, true);
  barrier->expected = barrier->pending = count;
}

void Block::advance(PhaseBarrier& barrier) {
  if (barrier.pending < 0) throw Fault("more arrivals at a barrier than it expects");
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.expected;
  for (auto& [fiber, parity] : barrier.waiting) wake(fiber);
  barrier.waiting.clear();
}

void Block::wait_phase(uint32_t address, int parity) {
  PhaseBarrier& barrier = phase_barrier(address);
  while (barrier.phase == parity) {  // the phase of that parity has not ended
    running_->waits_for = "a barrier of shared memory";
    barrier.waiting.emplace_back(running_, parity);
    block_current();
  }
}

// ---- grids ----------------------------------------------------------------------------------

void emulate_device(int count, uint64_t seed) {
  multiprocessors = count;
  next_seed = seed;
}

void run_grid(const char* kernel, int64_t blocks, int64_t threads, int64_t shared_bytes,
              const std::function<void()>& body) {
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0);
  uint64_t random = ++next_seed * 0x9e3779b97f4a7c15u;
  for (size_t i = order.size(); i > 1; --i) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i - 1], order[(random >> 33) % i]);
  }
  std::vector<GpuCounts> counts(static_cast<size_t>(counting() ? blocks : 0));
  for (const int64_t number : order) {
    Block block(threads, number, blocks, shared_bytes, random + static_cast<uint64_t>(number));
    block.run(body);
    if (block.counter() != nullptr) counts[static_cast<size_t>(number)] = block.counter()->finish();
  }
  if (counting()) add_counts(kernel, counts, multiprocessors);
}

}  // namespace apr::cuda_emulated
