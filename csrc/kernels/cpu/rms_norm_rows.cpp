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
  over(width - i, [&](int64_t j, auto places) {
    const Floats values = load(x + i + j, places);
    sums[0] += values * values;
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
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
    over(width, [&](int64_t i, auto places) {
      store(out + i, rounded<T>(load(x + i, places) * scale) * load(weight + i, places), places);
    });
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
    over(width, [&](int64_t i, auto places) {
      const Floats product = load(grad + i, places) * load(x + i, places) * scale;
      store(task.sums + i, load(task.sums + i, places) + product, places);
      dots += product * load(weight + i, places);
    });
    const float mean = sum(dots) / width;
    over(width, [&](int64_t i, auto places) {
      const Floats g = load(grad + i, places) * load(weight + i, places);
      store(out + i, (g - load(x + i, places) * (scale * mean)) * scale, places);
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
