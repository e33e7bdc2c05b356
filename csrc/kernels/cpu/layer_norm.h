// (x - mean) / std * weight + bias over rows, and its gradients (Ba et al. 2016).
#pragma once

#include <stdint.h>

#include "capability.h"

namespace megatron_med {

struct LayerNorm {
  const void* x;       // [rows, width]
  const void* weight;  // [width]
  const void* bias;    // [width]
  void* out;           // [rows, width]
  float* means;        // [rows]
  float* scales;       // [rows], 1 / std
  int64_t width;
  float eps;
  bool bf16;  // all but means and scales; else fp32
};

struct LayerNormGradient {
  const void* grad;     // [rows, width]
  const void* x;        // [rows, width]
  const void* weight;   // [width]
  const float* means;   // [rows]
  const float* scales;  // [rows]
  void* out;            // [rows, width]
  float* sums;          // [2, width], to which grad * (x - mean) * scale and grad of the rows are added
  int64_t width;
  bool bf16;
};

MEGATRON_MED_DECLARE(void, layer_norm_rows, const LayerNorm& task, int64_t first, int64_t last)
MEGATRON_MED_DECLARE(void, layer_norm_gradient_rows, const LayerNormGradient& task, int64_t first, int64_t last)

}  // namespace megatron_med
