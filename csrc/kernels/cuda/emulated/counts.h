// What kernels ask of a GPU, counted while the emulator runs them: a warp's accesses are put
// together as the hardware does, in sectors of 32 bytes of device memory and rounds of 32 banks of
// shared memory.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kernels/gpu.h"

namespace apr::cuda_emulated {

enum Memory { kGlobal, kOperands, kShared, kMemories };

// The counts of one block.
class Counter {
 public:
  explicit Counter(int64_t threads);

  // Thread `thread` reaches `bytes` of memory from one place in the code. Lanes of a warp that come
  // there equally often between two meetings make one request. Without bytes the lane takes no
  // part.
  void access(Memory memory, int64_t thread, const void* place, uint64_t address, int64_t bytes);
  // The thread goes on to another span; begins a copy, for whose address it may have waited for
  // whatever it looked up in tables since the span began.
  void span(int64_t thread);
  void copy_begins(int64_t thread);
  // All lanes of a warp have met, or ended.
  void meet(int64_t warp);
  void add_products(int64_t count) { total_.products += count; }
  void add_exponential() { ++total_.exponentials; }
  void add_barrier() { ++total_.barriers; }
  // Bytes that a bulk copy reads in rows.
  void bulk_copy(int64_t thread, uint64_t address, int64_t row_bytes, int64_t rows, int64_t pitch);

  GpuCounts finish();

 private:
  struct Access {
    uint64_t address;
    int64_t bytes;
    int lane;
  };
  using Place = std::pair<const void*, int64_t>;  // in the code, and how often before
  struct Warp {
    std::map<Place, std::vector<Access>> requests[kMemories];
  };
  struct Thread {
    std::map<const void*, int64_t> times[kMemories];
    int64_t lookups = 0, spans = 0;
    bool waits = true;  // for the first copy of its span
  };
  void count_global(std::vector<Access> request);
  void count_shared(GpuShared& to, const std::vector<Access>& request);

  std::vector<Warp> warps_;
  std::vector<Thread> threads_;
  GpuCounts total_;
};

// Whether kernels are counted, which then multiply nothing, and what the data they are given is
// called.
bool counting();
void name_data(const char* name, const void* begin, int64_t bytes);
void add_counts(const char* kernel, const std::vector<GpuCounts>& blocks, int multiprocessors);

}  // namespace apr::cuda_emulated
