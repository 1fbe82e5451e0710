// Physical memory behind the arenas, which the operating system gives at the first touch.
#include "kernels/cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

namespace apr::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

void use_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (first + bytes) / kHugePage * kHugePage;
  // Advice: where it is not taken, ordinary pages serve as well.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

int map_file(void* data, size_t bytes, int file, int64_t offset) {
  if (bytes == 0) return 0;
  const int how = MAP_PRIVATE | MAP_FIXED;
  void* at = mmap(data, bytes, PROT_READ | PROT_WRITE, how, file, static_cast<off_t>(offset));
  return at == MAP_FAILED ? errno : 0;
}

void populate(void* data, size_t bytes) {
  if (bytes == 0) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = first / page * page, end = (first + bytes + page - 1) / page * page;
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14; older headers lack it
  if (madvise(reinterpret_cast<void*>(begin), end - begin, kPopulateWrite) == 0) return;
  if (errno != EINVAL) return;  // known here, but not to be had now: the first touch will see
#endif
  for (uintptr_t at = begin; at < end; at += page) {
    // An atomic "or 0" writes without changing what another thread may be writing here.
    const uintptr_t inside = at < first ? first : at;
    __atomic_fetch_or(reinterpret_cast<unsigned char*>(inside), 0, __ATOMIC_SEQ_CST);
  }
}

}  // namespace apr::cpu
