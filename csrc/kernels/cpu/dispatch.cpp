// Chooses the instruction set once, by what the machine says it runs.
#include <stdexcept>

#include "kernels/cpu/kernels.h"

namespace apr::cpu {
namespace portable {
extern const InstructionSet kTable;
}
#ifdef APR_HAVE_avx2
namespace avx2 {
extern const InstructionSet kTable;
}
#endif

namespace {

const InstructionSet*& forced() {
  static const InstructionSet* choice = nullptr;
  return choice;
}

}  // namespace

std::vector<const InstructionSet*> instruction_sets() {
  std::vector<const InstructionSet*> sets;
#ifdef APR_HAVE_avx2
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back(&avx2::kTable);
  }
#endif
  sets.push_back(&portable::kTable);
  return sets;
}

const InstructionSet& instruction_set() {
  if (forced() != nullptr) return *forced();
  static const InstructionSet* const best = instruction_sets().front();
  return *best;
}

void force_instruction_set(const std::string& name) {
  if (name.empty()) {
    forced() = nullptr;
    return;
  }
  for (const InstructionSet* set : instruction_sets()) {
    if (name == set->name) {
      forced() = set;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' was not built or does not run here");
}

}  // namespace apr::cpu
