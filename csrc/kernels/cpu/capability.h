// Which instruction set the operations use on this processor.
#pragma once

namespace megatron_med {

enum class Capability { kBaseline, kAvx2, kAvx512 };

// The best that the processor has, and this build. MEGATRON_MED_CPU_CAPABILITY (baseline, avx2, avx512) asks for a
// lesser one; whatever else it says is an error. Chosen once.
Capability capability();

const char* name_of(Capability capability);

}  // namespace megatron_med

// Calls NAME of the namespace that was compiled for the chosen instruction set.
#ifdef MEGATRON_MED_X86
#define MEGATRON_MED_DISPATCH(NAME, ...)                                   \
  (capability() == Capability::kAvx512 ? avx512::NAME(__VA_ARGS__)         \
   : capability() == Capability::kAvx2 ? avx2::NAME(__VA_ARGS__)           \
                                       : baseline::NAME(__VA_ARGS__))
#define MEGATRON_MED_DECLARE(RETURNS, NAME, ...)      \
  namespace baseline { RETURNS NAME(__VA_ARGS__); }   \
  namespace avx2 { RETURNS NAME(__VA_ARGS__); }       \
  namespace avx512 { RETURNS NAME(__VA_ARGS__); }
#else
#define MEGATRON_MED_DISPATCH(NAME, ...) baseline::NAME(__VA_ARGS__)
#define MEGATRON_MED_DECLARE(RETURNS, NAME, ...) \
  namespace baseline { RETURNS NAME(__VA_ARGS__); }
#endif
