// Chooses the instruction set once, by what the machine says it runs.
#include <atomic>
#include <stdexcept>

#include "kernels/cpu/kernels.h"
#ifdef APR_HAVE_amx
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace apr::cpu {
#define APR_DECLARE(name)             \
  namespace name {                    \
  extern const InstructionSet kTable; \
  }
APR_DECLARE(portable)
APR_DECLARE(avx2)
APR_DECLARE(avx512)
APR_DECLARE(avx512_bf16)
APR_DECLARE(amx)
APR_DECLARE(amx_emulated)

namespace {

std::atomic<const InstructionSet*> forced{nullptr};

#ifdef APR_HAVE_avx512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#ifdef APR_HAVE_amx
// The processor has the unit, and the kernel lets this process use its registers: they are given
// only to those who ask.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kMatrixBFloat16 = 1u << 22, kTiles = 1u << 24;
  if ((d & kMatrixBFloat16) == 0 || (d & kTiles) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

std::vector<const InstructionSet*> instruction_sets() {
  std::vector<const InstructionSet*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#ifdef APR_HAVE_amx
  if (has_avx512() && __builtin_cpu_supports("avx512bf16") && has_amx()) {
    sets.push_back(&amx::kTable);
  }
#endif
#ifdef APR_HAVE_avx512_bf16
  if (has_avx512() && __builtin_cpu_supports("avx512bf16")) sets.push_back(&avx512_bf16::kTable);
#endif
#ifdef APR_HAVE_avx512
  if (has_avx512()) sets.push_back(&avx512::kTable);
#endif
#ifdef APR_HAVE_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    sets.push_back(&avx2::kTable);
  }
#endif
  sets.push_back(&portable::kTable);
  return sets;
}

const InstructionSet& instruction_set() {
  if (const InstructionSet* choice = forced.load(std::memory_order_relaxed)) return *choice;
  static const InstructionSet* const best = instruction_sets().front();
  return *best;
}

void force_instruction_set(const std::string& name) {
  if (name.empty()) {
    forced = nullptr;
    return;
  }
  std::vector<const InstructionSet*> sets = instruction_sets();
  sets.push_back(&amx_emulated::kTable);
  for (const InstructionSet* set : sets) {
    if (name == set->name) {
      forced = set;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' was not built or does not run here");
}

}  // namespace apr::cpu
