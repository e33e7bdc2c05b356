// silu(gate) * up over rows, gate and up side by side in a row, and its gradients (Shazeer 2020).
#pragma once

#include <stdint.h>

#include "capability.h"

namespace megatron_med {

struct SwiGlu {
  const void* gate_up;  // [rows, 2 * width]
  const void* grad;     // [rows, width]; null: forward
  void* out;            // [rows, width]; of the gradients [rows, 2 * width]
  int64_t width;
  bool bf16;  // all tensors; else fp32
};

MEGATRON_MED_DECLARE(void, swiglu_rows, const SwiGlu& task, int64_t first, int64_t last)

}  // namespace megatron_med
