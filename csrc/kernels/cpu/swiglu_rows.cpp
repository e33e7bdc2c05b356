// Compiled once per instruction set, into the namespace MEGATRON_MED_CAPABILITY.
#include "swiglu.h"
#include "vector.h"

namespace {

using megatron_med::SwiGlu;

template <typename T>
void activate(const SwiGlu& task, int64_t first, int64_t last) {
  const int64_t width = task.width;
  for (int64_t row = first; row < last; ++row) {
    const T* gate = static_cast<const T*>(task.gate_up) + row * 2 * width;
    const T* up = gate + width;
    T* out = static_cast<T*>(task.out) + row * width;
    over(width, [&](int64_t i, auto places) {
      const Floats x = load(gate + i, places);
      store(out + i, rounded<T>(x * sigmoid(x)) * load(up + i, places), places);
    });
  }
}

// With s = sigmoid(gate): grad * up * s * (1 + gate * (1 - s)), and grad * gate * s.
template <typename T>
void differentiate(const SwiGlu& task, int64_t first, int64_t last) {
  const int64_t width = task.width;
  for (int64_t row = first; row < last; ++row) {
    const T* gate = static_cast<const T*>(task.gate_up) + row * 2 * width;
    const T* up = gate + width;
    const T* grad = static_cast<const T*>(task.grad) + row * width;
    T* of_gate = static_cast<T*>(task.out) + row * 2 * width;
    T* of_up = of_gate + width;
    over(width, [&](int64_t i, auto places) {
      const Floats x = load(gate + i, places), s = sigmoid(x), g = load(grad + i, places);
      store(of_gate + i, g * load(up + i, places) * s * (1.0f + x * (1.0f - s)), places);
      store(of_up + i, g * x * s, places);
    });
  }
}

template <typename T>
void run(const SwiGlu& task, int64_t first, int64_t last) {
  task.grad == nullptr ? activate<T>(task, first, last) : differentiate<T>(task, first, last);
}

}  // namespace

namespace megatron_med::MEGATRON_MED_CAPABILITY {

void swiglu_rows(const SwiGlu& task, int64_t first, int64_t last) {
  task.bf16 ? run<BFloat16>(task, first, last) : run<float>(task, first, last);
}

}  // namespace megatron_med::MEGATRON_MED_CAPABILITY
