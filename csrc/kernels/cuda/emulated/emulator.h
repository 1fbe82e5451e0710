// Runs one CUDA block on the CPU: a fiber for each thread, in an order drawn at random wherever the
// hardware leaves it open, with shared memory that is poisoned and checked.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cuda/array.h"
#include "kernels/cuda/emulated/counts.h"

namespace apr::cuda_emulated {

struct Fiber;

// Threads that meet at one place: a warp at a collective, a block at a barrier.
struct Meeting {
  int size = 0;
  const char* what = nullptr;
  int arrived = 0;
  std::vector<void*> arguments;  // by rank
  std::vector<Fiber*> waiting;
};

// A barrier of shared memory whose phase ends when all arrived and all bytes came (mbarrier).
struct PhaseBarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  int phase = 0;
  std::vector<std::pair<Fiber*, int>> waiting;
};

class Block {
 public:
  Block(int64_t threads, int64_t block, int64_t blocks, int64_t shared_bytes, uint64_t seed);
  ~Block();
  // Runs `body` on every thread to its end; throws the first Fault.
  void run(const std::function<void()>& body);

  static Block& current();
  int thread() const;
  int64_t threads() const { return threads_; }
  int64_t block() const { return block_; }
  int64_t blocks() const { return blocks_; }

  // All `size` threads of a meeting give an argument; the last to come runs `act` on all of them.
  using Act = std::function<void(std::vector<void*>&)>;
  void meet(Meeting& meeting, int size, int rank, const char* what, void* argument, const Act& act);
  Meeting& warp_meeting() { return warps_[static_cast<size_t>(thread() / 32)]; }
  Meeting& group_meeting() { return groups_[static_cast<size_t>(thread() / 128)]; }
  Meeting& barrier(int number) { return barriers_.at(static_cast<size_t>(number)); }

  // Shared memory, addressed in bytes as the hardware does.
  char* shared() { return shared_base_; }
  uint32_t shared_address(const void* pointer) const;
  char* shared_at(uint32_t address, int64_t bytes, int64_t alignment);

  // Asynchronous work: runs at once, later, or when somebody must wait for it. Work of one thread
  // is completed in groups (cp.async, wgmma); free work (TMA) completes by itself.
  enum Kind { kCopy, kProduct, kKinds };
  void start(Kind kind, std::function<void()> work);
  void commit(Kind kind);
  void wait(Kind kind, int groups_left);
  void start_free(std::function<void()> work);

  PhaseBarrier& phase_barrier(uint32_t address) { return *find_barrier(address, false); }
  void init_barrier(uint32_t address, int count);
  void advance(PhaseBarrier& barrier);
  void wait_phase(uint32_t address, int parity);

  uint64_t draw(uint64_t below);
  Counter* counter() { return counter_ ? &*counter_ : nullptr; }  // nullptr: nobody counts

 private:
  PhaseBarrier* find_barrier(uint32_t address, bool fresh);
  void block_current();
  void wake(Fiber* fiber);
  void finish_one_free();
  std::string stuck() const;

  int64_t threads_, block_, blocks_;
  uint64_t random_;
  std::vector<char> memory_;
  char* shared_base_;
  int64_t shared_bytes_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> runnable_;
  std::vector<Meeting> warps_, groups_, barriers_;
  std::vector<std::function<void()>> free_work_;
  std::vector<std::pair<uint32_t, std::unique_ptr<PhaseBarrier>>> phase_barriers_;
  Fiber* running_ = nullptr;
  std::optional<Counter> counter_;
};

// Counts an access to shared memory of the thread that runs.
void note_shared(Memory memory, uint32_t address, int64_t bytes);

// Runs all blocks of a grid, one after the other in a random order.
void run_grid(const char* kernel, int64_t blocks, int64_t threads, int64_t shared_bytes,
              const std::function<void()>& body);
// Blocks take turns on so many multiprocessors; orders of later grids are drawn from the seed.
void emulate_device(int multiprocessors, uint64_t seed);

}  // namespace apr::cuda_emulated
