// Compiled once per instruction set, into the namespace MEGATRON_MED_CAPABILITY.
#include "cross_entropy.h"
#include "vector.h"

namespace {

using megatron_med::CrossEntropy;
using megatron_med::CrossEntropyGradient;

constexpr float kLowest = -__builtin_inff();

template <typename T>
float maximum(const T* z, int64_t count) {
  Floats most[4] = {broadcast(kLowest), broadcast(kLowest), broadcast(kLowest), broadcast(kLowest)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int lane = 0; lane < 4; ++lane) {
      const Floats x = load(z + i + lane * kLanes);
      most[lane] = x > most[lane] ? x : most[lane];
    }
  }
  over(count - i, [&](int64_t j, auto places) {
    const Floats x = load(z + i + j, places, kLowest);
    most[0] = x > most[0] ? x : most[0];
  });
  const Floats left = most[0] > most[1] ? most[0] : most[1], right = most[2] > most[3] ? most[2] : most[3];
  return largest(left > right ? left : right);
}

inline float exp_one(float x) { return exp(broadcast(x))[0]; }

// Sum of exp(z - highest); not a number where a logit is not, which `exp` and `maximum` would hide.
template <typename T>
float exp_sum(const T* z, int64_t count, float highest) {
  Floats sums[2] = {};
  Floats strange = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    for (int lane = 0; lane < 2; ++lane) {
      const Floats x = load(z + i + lane * kLanes);
      sums[lane] += exp(x - highest);
      strange += x == x ? Floats{} : x;
    }
  }
  over(count - i, [&](int64_t j, auto places) {
    const Floats x = load(z + i + j, places, kLowest);
    sums[0] += exp(x - highest);
    strange += x == x ? Floats{} : x;
  });
  return sum(sums[0] + sums[1]) + sum(strange);
}

template <typename T>
void measure(const CrossEntropy& task, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* z = static_cast<const T*>(task.logits) + row * task.columns;
    task.maxima[row] = maximum(z, task.true_columns);
    task.totals[row] = exp_sum(z, task.true_columns, task.maxima[row]);
    task.hits[row] = task.targets[row] < 0 ? 0.0f : to_float(z[task.targets[row]]);
  }
}

template <typename T>
void differentiate(const CrossEntropyGradient& task, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* z = static_cast<const T*>(task.logits) + row * task.columns;
    T* out = static_cast<T*>(task.out) + row * task.columns;
    const float highest = task.maxima[row], grad = task.grads[row], scale = grad / task.totals[row];
    const int64_t target = task.targets[row];
    const float of_target = target < 0 ? 0.0f : exp_one(to_float(z[target]) - highest) * scale - grad;
    over(task.true_columns, [&](int64_t i, auto places) {
      store(out + i, exp(load(z + i, places) - highest) * scale, places);
    });
    for (int64_t i = task.true_columns; i < task.columns; ++i) store_one(out + i, 0.0f);
    if (target >= 0) store_one(out + target, of_target);
  }
}

}  // namespace

namespace megatron_med::MEGATRON_MED_CAPABILITY {

void cross_entropy_rows(const CrossEntropy& task, int64_t first, int64_t last) {
  task.bf16 ? measure<BFloat16>(task, first, last) : measure<float>(task, first, last);
}

void cross_entropy_gradient_rows(const CrossEntropyGradient& task, int64_t first, int64_t last) {
  task.bf16 ? differentiate<BFloat16>(task, first, last) : differentiate<float>(task, first, last);
}

}  // namespace megatron_med::MEGATRON_MED_CAPABILITY
