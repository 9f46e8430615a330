// The choice of instruction set.
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace ia3 {

#define IA3_DECLARE(isa)              \
  namespace isa {                     \
  extern const cpu::Kernels kKernels; \
  }
IA3_DECLARE(plain)
#if defined(IA3_X86)
IA3_DECLARE(avx512_bf16)
IA3_DECLARE(avx512)
IA3_DECLARE(avx2)
#endif
#undef IA3_DECLARE

namespace cpu {
namespace {

// Best first
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> sets;
#if defined(IA3_X86)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) sets.push_back(&avx512_bf16::kKernels);
  if (avx512) sets.push_back(&avx512::kKernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    sets.push_back(&avx2::kKernels);
  }
#endif
  sets.push_back(&plain::kKernels);
  return sets;
}

const Kernels& choose() {
  const char* variable = std::getenv("IA3_CPU_ISA");
  const std::string requested = variable == nullptr ? "auto" : variable;
  const auto sets = runnable();
  if (requested.empty() || requested == "auto") return *sets.front();
  std::string names;
  for (const Kernels* set : sets) {
    if (requested == set->isa) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->isa);
  }
  throw std::runtime_error("IA3_CPU_ISA is '" + requested + "'; this processor runs " + names +
                           ". Choose one of them, or auto.");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* set : runnable()) names.emplace_back(set->isa);
  return names;
}

}  // namespace cpu
}  // namespace ia3
