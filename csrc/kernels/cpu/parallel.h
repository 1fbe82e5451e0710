// A small pool of sleeping workers; the caller works too. No second OpenMP runtime comes with it.
#pragma once

#include <cstdint>
#include <functional>

namespace apr::cpu {

// Calls body(i) once for each i in [0, count), from up to `threads` threads.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body);

}  // namespace apr::cpu
