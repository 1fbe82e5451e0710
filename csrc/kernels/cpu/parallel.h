// Runs loops on the threads that torch computes with; the caller works too.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace apr::cpu {

// body(i) once for each i in [0, count).
struct Phase {
  int64_t count;
  std::function<void(int64_t)> body;
};

// Runs the phases from up to `threads` threads; every index of a phase ends before the next begins.
// The threads are those of the OpenMP runtime that torch loaded: with threads of its own beside
// them, each library would have to wait for the other's to stop spinning. Without such a runtime
// (or where `force_own_workers` says so) a small pool of sleeping workers does it.
void parallel(int threads, const std::vector<Phase>& phases);

bool has_openmp();
void force_own_workers(bool own);  // for tests

}  // namespace apr::cpu
