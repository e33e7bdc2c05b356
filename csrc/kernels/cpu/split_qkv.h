// The joint product of queries, keys and values taken apart, with rotary positions on queries and keys, and put
// together again for its gradient (Su et al. 2021).
#pragma once

#include <stdint.h>

#include "capability.h"

namespace megatron_med {

// One of three tensors [tokens, heads, head_dim] whose numbers of a head lie side by side.
struct Heads {
  void* first;
  int64_t sequence;  // numbers from a position to the next
  int64_t sample;    // from a row of the batch to the next
  int64_t head;
};

struct SplitQkv {
  void* mixed;      // [seq, batch, groups, queries + 2, head_dim]
  Heads parts[3];   // query (groups * queries heads), key, value (groups heads)
  const void* cos;  // [seq, batch, head_dim]; null: nothing is turned
  const void* sin;
  int64_t batch;
  int64_t groups;
  int64_t queries;  // of a group
  int64_t head_dim;
  bool join;  // parts -> mixed, turned back; else mixed -> parts
  bool bf16;  // all tensors; else fp32
};

// Tokens are counted through positions and samples.
MEGATRON_MED_DECLARE(void, split_qkv_tokens, const SplitQkv& task, int64_t first, int64_t last)

}  // namespace megatron_med
