// Handles that Python let go, noted until the next edit.
#pragma once

#include <cstdint>
#include <list>
#include <mutex>

namespace apr {

// Numbers of threads or segments. A handle may go at any moment, and in any Python thread: noting
// it allocates nothing, as each brings the node that it stands in.
class Dropped {
 public:
  void note(std::list<int64_t>& one) noexcept {
    const std::lock_guard<std::mutex> guard(mutex_);
    numbers_.splice(numbers_.end(), one);
  }
  std::list<int64_t> take() noexcept {
    std::list<int64_t> taken;
    const std::lock_guard<std::mutex> guard(mutex_);
    taken.swap(numbers_);
    return taken;
  }

 private:
  std::mutex mutex_;
  std::list<int64_t> numbers_;
};

}  // namespace apr
