// One new token a row over all tokens of the row, for the key-value heads of one row.
#pragma once

#include <stdint.h>

#include "capability.h"

namespace megatron_med {

struct DecodeAttention {
  const void* query;   // [heads of the group, head_dim]
  const void* keys;    // [length, head_dim]
  const void* values;  // [length, head_dim]
  void* out;           // [heads of the group, head_dim]
  float* scores;       // room for heads * (length + 16)
  int64_t heads;
  int64_t head_dim;
  int64_t length;
  float scale;
  bool bf16;  // all tensors; else fp32
};

MEGATRON_MED_DECLARE(void, attend_group, const DecodeAttention& task)

}  // namespace megatron_med
