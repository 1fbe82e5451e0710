// Runs loops on the threads that torch computes with; the caller works too.
#include "kernels/cpu/parallel.h"

#include <dlfcn.h>
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

// One call of parallel(). Workers hold it by shared pointer, so a late one finds nothing to do.
class Job {
 public:
  explicit Job(const std::vector<Phase>& phases) : phases_(phases), progress_(phases.size()) {}

  void work() {
    for (size_t p = 0; p < counts_.size(); ++p) {
      Progress& progress = progress_[p];
      // The phase is read only while it has an index to give: the caller waits for those, so the
      // reference is alive; `count` is copied for the late ones.
      for (int64_t i; (i = progress.next.fetch_add(1, std::memory_order_relaxed)) < counts_[p];) {
        run(phases_[p], i);
        progress.done.fetch_add(1, std::memory_order_release);
      }
      // The rest is in flight on other threads: spin briefly, then let them have the core.
      for (int spins = 0; progress.done.load(std::memory_order_acquire) < counts_[p]; ++spins) {
        if (spins > 1000) std::this_thread::yield();
      }
    }
  }

  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  struct Progress {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };

  void run(const Phase& phase, int64_t i) {
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      phase.body(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failure_mutex_);
      failure_ = std::current_exception();
      failed_ = true;
    }
  }

  static std::vector<int64_t> counts_of(const std::vector<Phase>& phases) {
    std::vector<int64_t> counts;
    for (const Phase& phase : phases) counts.push_back(phase.count);
    return counts;
  }

  const std::vector<Phase>& phases_;
  const std::vector<int64_t> counts_ = counts_of(phases_);
  std::vector<Progress> progress_;
  std::atomic<bool> failed_{false};
  std::mutex failure_mutex_;
  std::exception_ptr failure_;  // of any index; rethrown on the caller's thread
};

class Workers {
 public:
  void run(int helpers, const std::shared_ptr<Job>& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; started_ < helpers; ++started_) std::thread([this] { loop(); }).detach();
      job_ = job;
      wanted_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job->work();
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
        if (wanted_ <= 0) continue;
        --wanted_;
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
  int wanted_ = 0;
};

// Never destroyed: detached workers may outlive static destructors.
Workers& workers() {
  static Workers* const instance = new Workers;
  return *instance;
}

// The entry that compilers call for `#pragma omp parallel`; GNU's and LLVM's runtimes both have it.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
OpenMpParallel openmp() {
  static const auto entry = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
}

std::atomic<bool> own_workers{false};

// A forked process has none of its parent's threads, and neither runtime can tell.
const pid_t loaded_in = getpid();
bool is_forked() { return getpid() != loaded_in; }

}  // namespace

bool has_openmp() { return openmp() != nullptr; }

void force_own_workers(bool own) { own_workers = own; }

void parallel(int threads, const std::vector<Phase>& phases) {
  int64_t most = 0;
  for (const Phase& phase : phases) most = std::max(most, phase.count);
  const int used = static_cast<int>(std::min<int64_t>(threads, most));
  if (used <= 1 || is_forked()) {
    for (const Phase& phase : phases) {
      for (int64_t i = 0; i < phase.count; ++i) phase.body(i);
    }
    return;
  }
  const auto job = std::make_shared<Job>(phases);
  if (openmp() != nullptr && !own_workers) {
    // All of torch's threads, wanted or not: a smaller team would end the others, and torch would
    // have to start them again.
    openmp()([](void* data) { static_cast<Job*>(data)->work(); }, job.get(), threads, 0);
  } else {
    workers().run(used - 1, job);
  }
  job->rethrow();
}

}  // namespace apr::cpu
