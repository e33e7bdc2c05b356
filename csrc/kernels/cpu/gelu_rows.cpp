// Compiled once per instruction set, into the namespace MEGATRON_MED_CAPABILITY.
#include "gelu.h"
#include "vector.h"

namespace {

using megatron_med::Gelu;

constexpr float kTwice = 2 * 0.7978845608028654f;  // 2 * sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

// (1 + tanh(u)) / 2 = sigmoid(2 u), with u = sqrt(2 / pi) * (x + 0.044715 x^3).
inline Floats gate_of(Floats x) { return sigmoid(kTwice * x * (1.0f + kCubic * x * x)); }

template <typename T>
void run(const Gelu& task, int64_t first, int64_t last) {
  const T* x = static_cast<const T*>(task.x) + first;
  T* out = static_cast<T*>(task.out) + first;
  if (task.grad == nullptr) {
    over(last - first, [&](int64_t i, auto places) {
      const Floats values = load(x + i, places);
      store(out + i, values * gate_of(values), places);
    });
    return;
  }
  // With g = sigmoid(2 u): g + x * g * (1 - g) * 2 u', and 2 u' = 2 sqrt(2 / pi) * (1 + 3 * 0.044715 x^2).
  const T* grad = static_cast<const T*>(task.grad) + first;
  over(last - first, [&](int64_t i, auto places) {
    const Floats values = load(x + i, places), gate = gate_of(values);
    const Floats slope = kTwice * (1.0f + 3 * kCubic * values * values);
    const Floats bend = values * slope * gate * (1.0f - gate);
    store(out + i, load(grad + i, places) * (gate + bend), places);
  });
}

}  // namespace

namespace megatron_med::MEGATRON_MED_CAPABILITY {

void gelu_rows(const Gelu& task, int64_t first, int64_t last) {
  task.bf16 ? run<BFloat16>(task, first, last) : run<float>(task, first, last);
}

}  // namespace megatron_med::MEGATRON_MED_CAPABILITY
