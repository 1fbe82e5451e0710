// A small pool of sleeping workers; the caller works too. No second OpenMP runtime comes with it.
#include "kernels/cpu/parallel.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

namespace apr::cpu {
namespace {

// One call of parallel_for. Workers hold it by shared pointer, so a late one finds nothing to do.
struct Job {
  const std::function<void(int64_t)>* body;
  int64_t count;
  int helpers;  // workers that may still join in
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::mutex failure_mutex;
  std::exception_ptr failure;  // of any index; rethrown on the caller's thread

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      try {
        (*body)(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failure_mutex);
        failure = std::current_exception();
      }
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

class Workers {
 public:
  void run(int64_t count, int threads, const std::function<void(int64_t)>& body) {
    auto job = std::make_shared<Job>();
    job->body = &body;
    job->count = count;
    job->helpers = static_cast<int>(std::min<int64_t>(threads, count)) - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (started_ < job->helpers) {
        std::thread([this] { loop(); }).detach();
        ++started_;
      }
      job_ = job;
      ++generation_;
    }
    wake_.notify_all();
    job->work();
    // The rest is in flight on other threads: spin briefly, then let them have the core.
    for (int spins = 0; job->done.load(std::memory_order_acquire) < count; ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
    if (job->failure) std::rethrow_exception(job->failure);
  }

 private:
  void loop() {
    uint64_t seen = 0;
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (job_ == nullptr || job_->helpers <= 0) continue;
        --job_->helpers;
        job = job_;
      }
      job->work();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  uint64_t generation_ = 0;
  int started_ = 0;
};

// Never destroyed: detached workers may outlive static destructors. A forked process has none of
// its parent's threads, so it starts its own.
Workers& workers() {
  static std::mutex mutex;
  static Workers* instance = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (instance == nullptr || owner != getpid()) {
    instance = new Workers;
    owner = getpid();
  }
  return *instance;
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  workers().run(count, threads, body);
}

}  // namespace apr::cpu
