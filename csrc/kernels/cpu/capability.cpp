#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>

namespace megatron_med {
namespace {

constexpr Capability kAll[] = {Capability::kBaseline, Capability::kAvx2, Capability::kAvx512};

Capability best() {
#ifdef MEGATRON_MED_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return Capability::kAvx512;
  if (avx2) return Capability::kAvx2;
#endif
  return Capability::kBaseline;
}

Capability choose() {
  const char* asked = std::getenv("MEGATRON_MED_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0') return best();
  for (Capability one : kAll) {
    if (std::string(asked) != name_of(one)) continue;
    if (one <= best()) return one;
    throw std::runtime_error(std::string("MEGATRON_MED_CPU_CAPABILITY is ") + asked + ", which this processor or this "
                             "build does not have; the best here is " + name_of(best()));
  }
  throw std::runtime_error(std::string("MEGATRON_MED_CPU_CAPABILITY is ") + asked +
                           "; it can be baseline, avx2 or avx512");
}

std::string cpu_capability() { return name_of(capability()); }

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::kAvx512: return "avx512";
    case Capability::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace megatron_med

STABLE_TORCH_LIBRARY_IMPL(megatron_med, CompositeExplicitAutograd, library) {
  library.impl("cpu_capability", TORCH_BOX(&megatron_med::cpu_capability));
}
