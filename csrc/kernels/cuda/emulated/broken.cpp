// Kernels with one fault each: they show that the emulator sees such faults.
#include <map>
#include <string>

#include "kernels/cuda/bulk.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/gpu.h"

namespace apr {
namespace cuda_emulated {
namespace {

// Thread 0 writes, all others read; with `meet` they wait for it.
void broadcast(bool meet, Array<int> seen) {
  const auto shared = shared_array<int>(shared_address(shared_memory()));
  if (thread_index() == 0) shared[0] = 7;
  if (meet) sync_block();
  seen[thread_index()] = shared[0];
}

bool broadcast_works(bool meet) {
  std::vector<int> seen(64, 0);
  start(broadcast, {"broken", 1, 64, 64, nullptr, false}, meet, Array<int>(seen.data(), 64));
  for (const int value : seen) {
    if (value != 7) return false;
  }
  return true;
}

// A copy in the background that is read at once; with `wait` after it has come.
void copy_and_read(bool wait, Array<const uint16_t> from, Array<int> seen) {
  const uint32_t shared =
      shared_address(shared_memory()) + static_cast<uint32_t>(thread_index() * 16);
  copy_async16(shared, from, thread_index() * 8, true);
  copy_async_commit();
  if (wait) copy_async_wait<0>();
  seen[thread_index()] = shared_array<uint16_t>(shared)[0];
  if (!wait) copy_async_wait<0>();
}

bool copy_works(bool wait) {
  alignas(16) uint16_t from[256];
  for (int i = 0; i < 256; ++i) from[i] = static_cast<uint16_t>(i);
  std::vector<int> seen(32, -1);
  start(copy_and_read, {"broken", 1, 32, 512, nullptr, false}, wait,
        Array<const uint16_t>(from, 256), Array<int>(seen.data(), 32));
  for (int i = 0; i < 32; ++i) {
    if (seen[static_cast<size_t>(i)] != i * 8) return false;
  }
  return true;
}

// Right, and slow: each lane reads a sector of its own, and a word of one and the same bank.
void strided(Array<const float> from) {
  const auto shared = shared_array<float>(shared_address(shared_memory()));
  shared[thread_index() * 32] = from[thread_index() * 8];
}
void out_of_bounds(Array<int> memory) { memory[thread_index()] = 1; }
void past_shared() { shared_memory()[64] = 1; }
void unaligned() {
  uint32_t r[4];
  load_matrices(r, shared_address(shared_memory()) + 8);
}
void deadlock() {
  if (thread_index() < 40) sync_block();
}
void disagreement() {
  if (thread_index() % 2 == 0) {
    sync_warp();
  } else {
    shuffle_xor(1, 1);
  }
}
void unawaited(Array<const uint16_t> from) {
  for (int i = 0; i < 20; ++i) copy_async16(shared_address(shared_memory()), from, 0, true);
  copy_async_commit();
}
void late_lane() {  // waits for a phase that has passed twice
  const uint32_t barrier = shared_address(shared_memory());
  if (thread_index() == 0) barrier_init(barrier, 1);
  sync_block();
  if (thread_index() == 0) {
    barrier_arrive(barrier);
    barrier_arrive(barrier);
  }
  sync_block();
  barrier_wait(barrier, 0);
}

}  // namespace
}  // namespace cuda_emulated

// "" where a kernel ran through, else the fault that the emulator found.
std::string run_broken_kernel(const std::string& name) {
  using namespace cuda_emulated;
  int word = 0;
  alignas(16) const uint16_t numbers[8] = {};
  const auto warp = [](int64_t threads) {
    return Launch{"broken", 1, threads, 64, nullptr, false};
  };
  const std::map<std::string, std::function<bool()>> kernels{
      {"barrier", [] { return broadcast_works(true); }},
      {"no barrier", [] { return broadcast_works(false); }},
      {"awaited copy", [] { return copy_works(true); }},
      {"copy read too early", [] { return copy_works(false); }},
      {"strided",
       [&] {
         const std::vector<float> floats(32 * 8);
         const Array<const float> from(floats.data(), 32 * 8);
         return start(strided, {"strided", 1, 32, 32 * 128, nullptr, false}, from), true;
       }},
      {"out of bounds", [&] { return start(out_of_bounds, warp(32), Array<int>(&word, 1)), true; }},
      {"past shared memory", [&] { return start(past_shared, warp(32)), true; }},
      {"unaligned", [&] { return start(unaligned, warp(32)), true; }},
      {"deadlock", [&] { return start(deadlock, warp(64)), true; }},
      {"disagreement", [&] { return start(disagreement, warp(32)), true; }},
      {"unawaited copy",
       [&] { return start(unawaited, warp(32), Array<const uint16_t>(numbers, 8)), true; }},
      {"late lane", [&] { return start(late_lane, warp(32)), true; }},
  };
  try {
    return kernels.at(name)() ? "" : "wrong values";
  } catch (const Fault& fault) {
    return fault.what();
  }
}

}  // namespace apr
