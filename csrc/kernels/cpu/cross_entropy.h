// The local part of cross entropy over rows of logits: statistics, and the gradient.
#pragma once

#include <stdint.h>

#include "capability.h"

namespace megatron_med {

struct CrossEntropy {
  const void* logits;      // [rows, columns]
  const int64_t* targets;  // [rows]; negative: not in these columns
  float* maxima;           // [rows], of the true columns
  float* totals;           // [rows], sum of exp(logit - maximum)
  float* hits;             // [rows], the target's logit; 0 where it is not in these columns
  int64_t columns;
  int64_t true_columns;  // those before the padding
  bool bf16;             // the logits; else fp32
};

struct CrossEntropyGradient {
  const void* logits;
  const int64_t* targets;
  const float* maxima;  // [rows], of all columns, those of other ranks, too
  const float* totals;  // [rows], sum over all columns of exp(logit - maximum)
  const float* grads;   // [rows], of each row's loss
  void* out;            // [rows, columns], 0 in the padding; may be the logits
  int64_t columns;
  int64_t true_columns;
  bool bf16;  // logits and out
};

MEGATRON_MED_DECLARE(void, cross_entropy_rows, const CrossEntropy& task, int64_t first, int64_t last)
MEGATRON_MED_DECLARE(void, cross_entropy_gradient_rows, const CrossEntropyGradient& task, int64_t first, int64_t last)

}  // namespace megatron_med
