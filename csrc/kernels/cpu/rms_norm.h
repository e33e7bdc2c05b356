// x / rms(x) * weight over rows, and its gradients (Zhang and Sennrich 2019).
#pragma once

#include <stdint.h>

#include "capability.h"

namespace megatron_med {

struct RmsNorm {
  const void* x;       // [rows, width]
  const void* weight;  // [width]
  void* out;           // [rows, width]
  float* scales;       // [rows], 1 / rms
  int64_t width;
  float eps;
  bool bf16;  // all but the scales; else fp32
};

struct RmsNormGradient {
  const void* grad;     // [rows, width]
  const void* x;        // [rows, width]
  const void* weight;   // [width]
  const float* scales;  // [rows]
  void* out;            // [rows, width]
  float* sums;          // [width], to which grad * x * scale of the rows is added
  int64_t width;
  bool bf16;
};

MEGATRON_MED_DECLARE(void, rms_norm_rows, const RmsNorm& task, int64_t first, int64_t last)
MEGATRON_MED_DECLARE(void, rms_norm_gradient_rows, const RmsNormGradient& task, int64_t first, int64_t last)

}  // namespace megatron_med
