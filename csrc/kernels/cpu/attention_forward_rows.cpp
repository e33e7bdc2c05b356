// Compiled once per instruction set, into the namespace MEGATRON_MED_CAPABILITY.
#include "causal_attention.h"
#include "tiles.h"

namespace {

using megatron_med::AttentionForward;

constexpr float kNothing = -__builtin_inff();

struct Buffers {
  float* panels;   // of the keys: [length / kTileColumns, dim, kTileColumns]
  float* values;   // [length, width]
  float* queries;  // [kQueries, dim]
  float* scores;   // [kQueries, kScores]
  // What a block of queries has come to after some of the keys:
  float* out;      // [kQueries, width], not divided by the totals
  float* highest;  // [kQueries], of the scores
  float* totals;   // [kQueries], of e^(scale * (score - highest))
};

Buffers take_buffers(Memory& memory, int64_t length, int64_t dim) {
  const int64_t width = round_up(dim, kTileColumns);
  return {memory.take(round_up(length, kTileColumns) * dim),
          memory.take(length * width),
          memory.take(kQueries * dim),
          memory.take(kQueries * kScores),
          memory.take(kQueries * width),
          memory.take(kQueries),
          memory.take(kQueries)};
}

// A row of scores -> weights that are not divided by their total; 0 where nothing is seen, up to `end`.
void weigh_row(float* scores, int64_t seen, int64_t end, float scale, int64_t width, float* out, float& highest,
               float& total) {
  const int64_t padded = round_up(end, kLanes);
  if (seen == 0) return fill(scores, padded, 0);
  fill(scores + seen, padded - seen, kNothing);
  Floats most = broadcast(highest);
  for (int64_t i = 0; i < seen; i += kLanes) {
    const Floats x = load(scores + i);
    most = x > most ? x : most;
  }
  const float before = highest;
  highest = largest(most);
  Floats sums = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Floats weights = exp((load(scores + i) - highest) * scale);
    store(scores + i, weights);
    sums += weights;
  }
  if (before == highest) {
    total += sum(sums);
    return;
  }
  const float factor = exp(broadcast((before - highest) * scale))[0];
  total = total * factor + sum(sums);
  for (int64_t i = 0; i < width; i += kLanes) store(out + i, load(out + i) * factor);
}

// A block of queries over all keys that they see; what is written is in `buffers`.
void attend_block(const AttentionForward& task, const Buffers& buffers, int64_t query, int64_t rows) {
  const int64_t dim = task.head_dim, width = round_up(dim, kTileColumns), padded = round_up(rows, kTileRows);
  copy_rows(task.query.first + query * task.query.stride, task.query.stride, rows, dim, buffers.queries, padded, dim);
  fill(buffers.out, padded * width, 0);
  fill(buffers.highest, padded, kNothing);
  fill(buffers.totals, padded, 0);
  for (int64_t key = 0; key < query + rows; key += kKeys) {
    const Seen seen{padded, smaller(kKeys, query + rows - key), query - key};
    score_block(seen, buffers.queries, dim, buffers.panels + key * dim, dim, buffers.scores);
    for (int64_t r = 0; r < padded; ++r) {
      weigh_row(buffers.scores + r * kScores, seen.by(r), seen.by_tile(r / kTileRows * kTileRows), task.scale, width,
                buffers.out + r * width, buffers.highest[r], buffers.totals[r]);
    }
    add_over_keys(seen, buffers.scores, buffers.values + key * width, buffers.out, width);
  }
}

void run(const AttentionForward& task, Memory memory) {
  const int64_t length = task.length, dim = task.head_dim, width = round_up(dim, kTileColumns);
  const Buffers buffers = take_buffers(memory, length, dim);
  copy_panels(task.key.first, task.key.stride, length, dim, buffers.panels);
  copy_rows(task.value.first, task.value.stride, length, dim, buffers.values, length, width);
  for (int64_t query = 0; query < length; query += kQueries) {
    const int64_t rows = smaller(kQueries, length - query);
    attend_block(task, buffers, query, rows);
    for (int64_t r = 0; r < rows; ++r) {
      const float total = buffers.totals[r];
      const float* from = buffers.out + r * width;
      float* to = task.out.first + (query + r) * task.out.stride;
      over(dim, [&](int64_t i, auto places) { store(to + i, load(from + i, places) / total, places); });
      task.logsumexp[query + r] = buffers.highest[r] * task.scale + __builtin_logf(total);
    }
  }
}

}  // namespace

namespace megatron_med::MEGATRON_MED_CAPABILITY {

int64_t attention_forward_floats(int64_t length, int64_t head_dim) {
  Memory memory{nullptr};
  take_buffers(memory, length, head_dim);
  return memory.used;
}

void attend_forward(const AttentionForward& task, float* memory) { run(task, Memory{memory}); }

}  // namespace megatron_med::MEGATRON_MED_CAPABILITY
