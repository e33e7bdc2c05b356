// GELU in its tanh approximation, and its gradient (Hendrycks and Gimpel 2016).
#pragma once

#include <stdint.h>

#include "capability.h"

namespace megatron_med {

struct Gelu {
  const void* x;     // [count]
  const void* grad;  // [count]; null: forward
  void* out;         // [count]
  bool bf16;         // all tensors; else fp32
};

MEGATRON_MED_DECLARE(void, gelu_rows, const Gelu& task, int64_t first, int64_t last)

}  // namespace megatron_med
