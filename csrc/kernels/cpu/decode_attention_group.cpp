// Compiled once per instruction set, into the namespace MEGATRON_MED_CAPABILITY.
#include "decode_attention.h"
#include "vector.h"

namespace {

using megatron_med::DecodeAttention;

// Scores of kHeads query heads, head after head with `stride` between them: each key is read once for all of them.
template <int kHeads, typename T>
void score(const DecodeAttention& task, const T* query, float* scores, int64_t stride) {
  const int64_t dim = task.head_dim, whole = dim / kLanes * kLanes;
  const T* key = static_cast<const T*>(task.keys);
  for (int64_t token = 0; token < task.length; ++token, key += dim) {
    Floats sums[kHeads] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Floats k = load(key + i);
      for (int head = 0; head < kHeads; ++head) sums[head] += load(query + head * dim + i) * k;
    }
    for (int head = 0; head < kHeads; ++head) {
      float total = sum(sums[head]);
      for (int64_t i = whole; i < dim; ++i) total += to_float(query[head * dim + i]) * to_float(key[i]);
      scores[head * stride + token] = total * task.scale;
    }
  }
}

// Scores -> weights that are not divided by their sum, which is returned. Behind the end up to `padded`: zeros.
float exponentiate(float* scores, int64_t length, int64_t padded) {
  const float lowest = -__builtin_inff();
  for (int64_t token = length; token < padded; ++token) scores[token] = lowest;
  Floats most = broadcast(lowest);
  for (int64_t token = 0; token < padded; token += kLanes) {
    const Floats x = load(scores + token);
    most = x > most ? x : most;
  }
  const float highest = largest(most);
  Floats sums = {};
  for (int64_t token = 0; token < padded; token += kLanes) {
    const Floats weights = exp(load(scores + token) - highest);
    store(scores + token, weights);
    sums += weights;
  }
  return sum(sums);
}

// kVectors of the output of one head, from place `first` on.
template <int kVectors, typename T>
void weigh(const DecodeAttention& task, const float* weights, float total, int64_t first, T* out) {
  Floats sums[kVectors] = {};
  const T* value = static_cast<const T*>(task.values) + first;
  for (int64_t token = 0; token < task.length; ++token, value += task.head_dim) {
    for (int i = 0; i < kVectors; ++i) sums[i] += weights[token] * load(value + i * kLanes);
  }
  for (int i = 0; i < kVectors; ++i) store(out + first + i * kLanes, sums[i] / total);
}

template <typename T>
void weigh_one(const DecodeAttention& task, const float* weights, float total, int64_t place, T* out) {
  float sum = 0;
  const T* value = static_cast<const T*>(task.values) + place;
  for (int64_t token = 0; token < task.length; ++token, value += task.head_dim) sum += weights[token] * to_float(*value);
  store_one(out + place, sum / total);
}

template <typename T>
void attend(const DecodeAttention& task) {
  const T* query = static_cast<const T*>(task.query);
  T* out = static_cast<T*>(task.out);
  const int64_t dim = task.head_dim, padded = (task.length + kLanes - 1) / kLanes * kLanes;
  int64_t head = 0;
  for (; head + 4 <= task.heads; head += 4) score<4>(task, query + head * dim, task.scores + head * padded, padded);
  for (; head < task.heads; ++head) score<1>(task, query + head * dim, task.scores + head * padded, padded);
  for (head = 0; head < task.heads; ++head, out += dim) {
    float* weights = task.scores + head * padded;
    const float total = exponentiate(weights, task.length, padded);
    int64_t place = 0;
    for (; place + 8 * kLanes <= dim; place += 8 * kLanes) weigh<8>(task, weights, total, place, out);
    for (; place + 4 * kLanes <= dim; place += 4 * kLanes) weigh<4>(task, weights, total, place, out);
    for (; place + kLanes <= dim; place += kLanes) weigh<1>(task, weights, total, place, out);
    for (; place < dim; ++place) weigh_one(task, weights, total, place, out);
  }
}

}  // namespace

namespace megatron_med::MEGATRON_MED_CAPABILITY {

void attend_group(const DecodeAttention& task) {
  if (task.bf16) {
    attend<BFloat16>(task);
  } else {
    attend<float>(task);
  }
}

}  // namespace megatron_med::MEGATRON_MED_CAPABILITY
