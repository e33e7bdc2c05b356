// Compiled once per instruction set, into the namespace MEGATRON_MED_CAPABILITY.
#include "split_qkv.h"
#include "vector.h"

namespace {

using megatron_med::Heads;
using megatron_med::SplitQkv;

// Number i of the first half turns with number i of the second: first' = first * cos + second * of_first, second' =
// second * cos + first * of_second, where `sign` is that of of_first.
template <typename T>
void turn(const T* from, T* to, const T* cos, const T* of_first, const T* of_second, int64_t half, float sign) {
  over(half, [&](int64_t i, auto places) {
    const Floats x = load(from + i, places), y = load(from + half + i, places);
    store(to + i, x * load(cos + i, places) + sign * y * load(of_first + i, places), places);
    store(to + half + i, y * load(cos + half + i, places) - sign * x * load(of_second + i, places), places);
  });
}

template <typename T>
void run(const SplitQkv& task, int64_t first, int64_t last) {
  const int64_t dim = task.head_dim, slots = task.queries + 2;
  for (int64_t token = first; token < last; ++token) {
    const int64_t position = token / task.batch, sample = token % task.batch;
    const T* cos = static_cast<const T*>(task.cos) + token * dim;
    const T* sin = static_cast<const T*>(task.sin) + token * dim;
    T* mixed = static_cast<T*>(task.mixed) + token * task.groups * slots * dim;
    for (int64_t group = 0; group < task.groups; ++group) {
      for (int64_t slot = 0; slot < slots; ++slot, mixed += dim) {
        const bool is_query = slot < task.queries;
        const Heads& part = task.parts[is_query ? 0 : slot - task.queries + 1];
        const int64_t head = is_query ? group * task.queries + slot : group;
        T* apart = static_cast<T*>(part.first) + position * part.sequence + sample * part.sample + head * part.head;
        const T* from = task.join ? apart : mixed;
        T* to = task.join ? mixed : apart;
        if (task.cos == nullptr || slot > task.queries) {
          __builtin_memcpy(to, from, dim * sizeof(T));
        } else if (task.join) {
          turn(from, to, cos, sin + dim / 2, sin, dim / 2, 1.0f);
        } else {
          turn(from, to, cos, sin, sin + dim / 2, dim / 2, -1.0f);
        }
      }
    }
  }
}

}  // namespace

namespace megatron_med::MEGATRON_MED_CAPABILITY {

void split_qkv_tokens(const SplitQkv& task, int64_t first, int64_t last) {
  task.bf16 ? run<BFloat16>(task, first, last) : run<float>(task, first, last);
}

}  // namespace megatron_med::MEGATRON_MED_CAPABILITY
