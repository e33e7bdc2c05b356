// Compiled once per instruction set, into the namespace MEGATRON_MED_CAPABILITY.
#include "layer_norm.h"
#include "vector.h"

namespace {

using megatron_med::LayerNorm;
using megatron_med::LayerNormGradient;

// Sum of x - shift, or of its square.
template <bool kSquare, typename T>
float sum_of(const T* x, int64_t width, float shift) {
  Floats sums[4] = {};
  const auto term = [shift](Floats values) {
    const Floats apart = values - shift;
    return kSquare ? apart * apart : apart;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    for (int lane = 0; lane < 4; ++lane) sums[lane] += term(load(x + i + lane * kLanes));
  }
  over(width - i, [&](int64_t j, auto places) { sums[0] += term(load(x + i + j, places, shift)); });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The variance is taken around the mean: that of large numbers close to each other stays exact.
template <typename T>
void normalize(const LayerNorm& task, int64_t first, int64_t last) {
  const int64_t width = task.width;
  const T* weight = static_cast<const T*>(task.weight);
  const T* bias = static_cast<const T*>(task.bias);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(task.x) + row * width;
    T* out = static_cast<T*>(task.out) + row * width;
    const float mean = sum_of<false>(x, width, 0.0f) / width;
    const float scale = 1.0f / __builtin_sqrtf(sum_of<true>(x, width, mean) / width + task.eps);
    task.means[row] = mean;
    task.scales[row] = scale;
    over(width, [&](int64_t i, auto places) {
      const Floats normed = (load(x + i, places) - mean) * scale;
      store(out + i, normed * load(weight + i, places) + load(bias + i, places), places);
    });
  }
}

// With n = (x - mean) * scale and g = grad * weight: scale * (g - mean(g) - n * mean(g * n)).
template <typename T>
void differentiate(const LayerNormGradient& task, int64_t first, int64_t last) {
  const int64_t width = task.width;
  const T* weight = static_cast<const T*>(task.weight);
  float* of_weight = task.sums;
  float* of_bias = task.sums + width;
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(task.x) + row * width;
    const T* grad = static_cast<const T*>(task.grad) + row * width;
    T* out = static_cast<T*>(task.out) + row * width;
    const float center = task.means[row], scale = task.scales[row];
    Floats dots = {}, plain = {};
    over(width, [&](int64_t i, auto places) {
      const Floats dy = load(grad + i, places), normed = (load(x + i, places, center) - center) * scale;
      store(of_weight + i, load(of_weight + i, places) + dy * normed, places);
      store(of_bias + i, load(of_bias + i, places) + dy, places);
      const Floats g = dy * load(weight + i, places);
      plain += g;
      dots += g * normed;
    });
    const float mean = sum(plain) / width, mean_dot = sum(dots) / width;
    over(width, [&](int64_t i, auto places) {
      const Floats g = load(grad + i, places) * load(weight + i, places);
      const Floats normed = (load(x + i, places) - center) * scale;
      store(out + i, (g - mean - normed * mean_dot) * scale, places);
    });
  }
}

}  // namespace

namespace megatron_med::MEGATRON_MED_CAPABILITY {

void layer_norm_rows(const LayerNorm& task, int64_t first, int64_t last) {
  task.bf16 ? normalize<BFloat16>(task, first, last) : normalize<float>(task, first, last);
}

void layer_norm_gradient_rows(const LayerNormGradient& task, int64_t first, int64_t last) {
  task.bf16 ? differentiate<BFloat16>(task, first, last) : differentiate<float>(task, first, last);
}

}  // namespace megatron_med::MEGATRON_MED_CAPABILITY
