// Compiled once per instruction set, into the namespace MEGATRON_MED_CAPABILITY.
#include "rms_norm.h"
#include "vector.h"

namespace {

using megatron_med::RmsNorm;
using megatron_med::RmsNormGradient;

template <typename T>
float square_sum(const T* x, int64_t width) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    for (int lane = 0; lane < 4; ++lane) {
      const Floats values = load(x + i + lane * kLanes);
      sums[lane] += values * values;
    }
  }
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < width; ++i) total += to_float(x[i]) * to_float(x[i]);
  return total;
}

// The product with the scale is rounded before that with the weight, as transformers does it.
template <typename T>
void normalize(const RmsNorm& task, int64_t first, int64_t last) {
  const int64_t width = task.width;
  const T* weight = static_cast<const T*>(task.weight);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(task.x) + row * width;
    T* out = static_cast<T*>(task.out) + row * width;
    const float scale = 1.0f / __builtin_sqrtf(square_sum(x, width) / width + task.eps);
    task.scales[row] = scale;
    over(
        width, [&](int64_t i) { store(out + i, rounded<T>(load(x + i) * scale) * load(weight + i)); },
        [&](int64_t i) { store_one(out + i, rounded_one<T>(to_float(x[i]) * scale) * to_float(weight[i])); });
  }
}

// With n = x * scale and g = grad * weight: scale * (g - n * mean(g * n)).
template <typename T>
void differentiate(const RmsNormGradient& task, int64_t first, int64_t last) {
  const int64_t width = task.width;
  const T* weight = static_cast<const T*>(task.weight);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(task.x) + row * width;
    const T* grad = static_cast<const T*>(task.grad) + row * width;
    T* out = static_cast<T*>(task.out) + row * width;
    const float scale = task.scales[row];
    Floats dots = {};
    float rest = 0;
    over(
        width,
        [&](int64_t i) {
          const Floats product = load(grad + i) * load(x + i) * scale;
          store(task.sums + i, load(task.sums + i) + product);
          dots += product * load(weight + i);
        },
        [&](int64_t i) {
          const float product = to_float(grad[i]) * to_float(x[i]) * scale;
          task.sums[i] += product;
          rest += product * to_float(weight[i]);
        });
    const float mean = (sum(dots) + rest) / width;
    over(
        width,
        [&](int64_t i) {
          store(out + i, (load(grad + i) * load(weight + i) - load(x + i) * (scale * mean)) * scale);
        },
        [&](int64_t i) {
          store_one(out + i, (to_float(grad[i]) * to_float(weight[i]) - to_float(x[i]) * (scale * mean)) * scale);
        });
  }
}

}  // namespace

namespace megatron_med::MEGATRON_MED_CAPABILITY {

void rms_norm_rows(const RmsNorm& task, int64_t first, int64_t last) {
  task.bf16 ? normalize<BFloat16>(task, first, last) : normalize<float>(task, first, last);
}

void rms_norm_gradient_rows(const RmsNormGradient& task, int64_t first, int64_t last) {
  task.bf16 ? differentiate<BFloat16>(task, first, last) : differentiate<float>(task, first, last);
}

}  // namespace megatron_med::MEGATRON_MED_CAPABILITY
