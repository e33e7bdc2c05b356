// Compiled once per instruction set, into the namespace MEGATRON_MED_CAPABILITY.
#include "causal_attention.h"
#include "tiles.h"

namespace {

using megatron_med::AttentionBackward;
using megatron_med::HeadRows;

const float* token_of(const HeadRows& rows, int64_t head, int64_t head_dim, int64_t token) {
  return rows.first + token * rows.stride + head * head_dim;
}

// The sum of grad * out of every token of every head: what the softmax takes off its weights' gradients.
void sum_products(const AttentionBackward& task, float* sums) {
  for (int64_t head = 0; head < task.heads; ++head) {
    for (int64_t token = 0; token < task.length; ++token) {
      const float* grad = token_of(task.grad, head, task.head_dim, token);
      const float* out = token_of(task.out, head, task.head_dim, token);
      Floats total = {};
      over(task.head_dim, [&](int64_t i, auto places) { total += load(grad + i, places) * load(out + i, places); });
      *sums++ = sum(total);
    }
  }
}

// A row of scores -> weights; a row of the weights' gradients -> the scores' gradients, without `scale`. Both are 0 where
// nothing is seen.
void weigh_row(float* scores, float* grads, int64_t seen, float scale, float logsumexp, float taken_off) {
  for (int64_t i = 0; i < seen; i += kLanes) {
    const Floats weights = exp(load(scores + i) * scale - logsumexp);
    store(scores + i, weights);
    store(grads + i, weights * (load(grads + i) - taken_off));
  }
  fill(scores + seen, kKeys - seen, 0);
  fill(grads + seen, kKeys - seen, 0);
}

// to = (begins: 0 +) rows * factor. rows: [count, width].
void write_rows(const float* rows, int64_t count, int64_t width, float factor, float* to, int64_t stride, int64_t dim,
                bool begins) {
  for (int64_t r = 0; r < count; ++r, rows += width, to += stride) {
    over(dim, [&](int64_t i, auto places) {
      const Floats x = load(rows + i, places) * factor;
      store(to + i, begins ? x : load(to + i, places) + x, places);
    });
  }
}

struct Buffers {
  float* key_panels;    // [kKeys / kTileColumns, dim, kTileColumns]
  float* value_panels;  // the same
  float* keys;          // [kKeys, width]
  float* grad_keys;     // [kKeys, width]
  float* grad_values;   // [kKeys, width]
  float* queries;       // [kQueries, width]
  float* grads;         // [kQueries, width]
  float* grad_queries;  // [kQueries, width]
  float* scores;        // [kQueries, kScores]
  float* grad_scores;   // [kQueries, kScores]
  float* taken_off;     // [heads, length]
};

Buffers take_buffers(Memory& memory, int64_t heads, int64_t length, int64_t dim) {
  const int64_t width = round_up(dim, kTileColumns);
  return {memory.take(kKeys * dim),        memory.take(kKeys * dim),        memory.take(kKeys * width),
          memory.take(kKeys * width),      memory.take(kKeys * width),      memory.take(kQueries * width),
          memory.take(kQueries * width),   memory.take(kQueries * width),   memory.take(kQueries * kScores),
          memory.take(kQueries * kScores), memory.take(heads * length)};
}

// What a block of queries of a head gives to the gradients of itself and of a block of keys.
void add_block(const AttentionBackward& task, const Buffers& buffers, int64_t head, int64_t query, int64_t key) {
  const int64_t dim = task.head_dim, width = round_up(dim, kTileColumns);
  const int64_t rows = smaller(kQueries, task.length - query), padded = round_up(rows, kTileRows);
  const Seen seen{padded, smaller(kKeys, smaller(task.length, query + rows) - key), query - key};
  copy_rows(token_of(task.query, head, dim, query), task.query.stride, rows, dim, buffers.queries, padded, width);
  copy_rows(token_of(task.grad, head, dim, query), task.grad.stride, rows, dim, buffers.grads, padded, width);
  score_block(seen, buffers.queries, width, buffers.key_panels, dim, buffers.scores);
  score_block(seen, buffers.grads, width, buffers.value_panels, dim, buffers.grad_scores);
  const float* logsumexp = task.logsumexp + head * task.logsumexp_head + query;
  const float* taken_off = buffers.taken_off + head * task.length + query;
  for (int64_t r = 0; r < padded; ++r) {
    const bool is_there = r < rows;
    weigh_row(buffers.scores + r * kScores, buffers.grad_scores + r * kScores, is_there ? seen.by(r) : 0, task.scale,
              is_there ? logsumexp[r] : 0, is_there ? taken_off[r] : 0);
  }
  add_over_queries(seen, buffers.scores, buffers.grads, buffers.grad_values, width);
  add_over_queries(seen, buffers.grad_scores, buffers.queries, buffers.grad_keys, width);
  fill(buffers.grad_queries, padded * width, 0);
  add_over_keys(seen, buffers.grad_scores, buffers.keys, buffers.grad_queries, width);
  write_rows(buffers.grad_queries, rows, width, task.scale,
             task.grad_query.first + query * task.grad_query.stride + head * dim, task.grad_query.stride, dim, key == 0);
}

void run(const AttentionBackward& task, Memory memory) {
  const int64_t dim = task.head_dim, width = round_up(dim, kTileColumns);
  const Buffers buffers = take_buffers(memory, task.heads, task.length, dim);
  sum_products(task, buffers.taken_off);
  for (int64_t key = 0; key < task.length; key += kKeys) {
    const int64_t columns = smaller(kKeys, task.length - key);
    const float* keys = task.key.first + key * task.key.stride;
    copy_panels(keys, task.key.stride, columns, dim, buffers.key_panels);
    copy_panels(task.value.first + key * task.value.stride, task.value.stride, columns, dim, buffers.value_panels);
    copy_rows(keys, task.key.stride, columns, dim, buffers.keys, columns, width);
    fill(buffers.grad_keys, kKeys * width, 0);
    fill(buffers.grad_values, kKeys * width, 0);
    for (int64_t head = 0; head < task.heads; ++head) {
      for (int64_t query = key / kQueries * kQueries; query < task.length; query += kQueries) {
        add_block(task, buffers, head, query, key);
      }
    }
    write_rows(buffers.grad_keys, columns, width, task.scale, task.grad_key.first + key * task.grad_key.stride,
               task.grad_key.stride, dim, true);
    write_rows(buffers.grad_values, columns, width, 1, task.grad_value.first + key * task.grad_value.stride,
               task.grad_value.stride, dim, true);
  }
}

}  // namespace

namespace megatron_med::MEGATRON_MED_CAPABILITY {

int64_t attention_backward_floats(int64_t heads, int64_t length, int64_t head_dim) {
  Memory memory{nullptr};
  take_buffers(memory, heads, length, head_dim);
  return memory.used;
}

void attend_backward(const AttentionBackward& task, float* memory) { run(task, Memory{memory}); }

}  // namespace megatron_med::MEGATRON_MED_CAPABILITY
