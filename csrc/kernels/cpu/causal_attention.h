// Causal attention over a document, and its gradients, without its matrix of scores: block by block (Dao et al. 2022).
#pragma once

#include <stdint.h>

#include "capability.h"

namespace megatron_med {

// The numbers of one head lie side by side.
struct HeadRows {
  float* first;
  int64_t stride;  // numbers from a token to the next
};

struct AttentionForward {  // of one query head
  HeadRows query;
  HeadRows key;
  HeadRows value;
  HeadRows out;
  float* logsumexp;  // [length], of the scores
  int64_t length;
  int64_t head_dim;
  float scale;
};

struct AttentionBackward {  // of all query heads that share a key head
  HeadRows query;           // its first head; the others of the group follow after head_dim numbers
  HeadRows key;
  HeadRows value;
  HeadRows out;
  HeadRows grad;  // of out
  HeadRows grad_query;
  HeadRows grad_key;
  HeadRows grad_value;
  const float* logsumexp;  // [heads, length], `logsumexp_head` numbers from a head to the next
  int64_t logsumexp_head;
  int64_t heads;
  int64_t length;
  int64_t head_dim;
  float scale;
};

// Floats of memory that a task needs beside its tensors.
MEGATRON_MED_DECLARE(int64_t, attention_forward_floats, int64_t length, int64_t head_dim)
MEGATRON_MED_DECLARE(int64_t, attention_backward_floats, int64_t heads, int64_t length, int64_t head_dim)

MEGATRON_MED_DECLARE(void, attend_forward, const AttentionForward& task, float* memory)
MEGATRON_MED_DECLARE(void, attend_backward, const AttentionBackward& task, float* memory)

}  // namespace megatron_med
