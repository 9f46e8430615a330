// The choice of instruction set.
#include <algorithm>
#include <array>
#include <cctype>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

#if defined(IA3_X86)
#include <cpuid.h>
#endif

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
  const std::string requested = environment_word("IA3_CPU_ISA");
  const auto sets = runnable();
  if (requested == "auto") return *sets.front();
  std::string names;
  for (const Kernels* set : sets) {
    if (requested == set->isa) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->isa);
  }
  throw std::runtime_error("IA3_CPU_ISA is '" + requested + "'; this processor runs " + names +
                           ". Choose one of them, or auto.");
}

}  // namespace

std::string environment_word(const char* variable) {
  const char* value = std::getenv(variable);
  std::string word = value == nullptr ? "" : value;
  const auto is_space = [](unsigned char letter) { return std::isspace(letter) != 0; };
  word.erase(std::remove_if(word.begin(), word.end(), is_space), word.end());
  for (char& letter : word) {
    const auto byte = static_cast<unsigned char>(letter);
    letter = byte < 0x80 && std::isgraph(byte) != 0 ? static_cast<char>(std::tolower(byte)) : '?';
  }
  return word.empty() ? "auto" : word.substr(0, 200);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

FastMatmul fast_matmul() {
#if defined(IA3_X86)
  const auto leaf = [](unsigned number, unsigned sub) {
    std::array<unsigned, 4> registers{};
    auto& [a, b, c, d] = registers;
    if (__get_cpuid_count(number, sub, &a, &b, &c, &d) == 0) registers = {};
    return registers;
  };
  const auto has = [](unsigned bits, int bit) { return (bits >> bit & 1) != 0; };
  bool has_tiles = false;  // AMX's registers, which the system must save
  if (has(leaf(1, 0)[2], 27)) {
    unsigned saved = 0, high = 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    has_tiles = has(saved, 17) && has(saved, 18);
  }
  const auto seven = leaf(7, 0), more = seven[0] >= 1 ? leaf(7, 1) : std::array<unsigned, 4>{};
  const bool amx_bf16 = has_tiles && has(seven[3], 22), amx_fp16 = has_tiles && has(more[0], 21);
  const bool avx512_fp16 = has(seven[3], 23), avx512_bf16 = has(more[0], 5);
  // Intel's cores multiply bf16 pairs at half the rate of fp32 values, which gains nothing without AMX; AMD's do not.
  return {amx_bf16 || (avx512_bf16 && __builtin_cpu_is("amd") != 0), amx_fp16 || avx512_fp16};
#else
  return {true, true};  // no kernel is vectorized here
#endif
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* set : runnable()) names.emplace_back(set->isa);
  return names;
}

}  // namespace cpu
}  // namespace ia3
