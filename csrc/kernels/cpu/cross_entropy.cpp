#include "cross_entropy.h"

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace megatron_med {
namespace {

void check(const Tensor& logits, const Tensor& targets, int64_t true_columns) {
  check_type(logits, "cross_entropy");
  STD_TORCH_CHECK(logits.is_contiguous() && targets.is_contiguous(), "cross_entropy: a tensor is not contiguous");
  STD_TORCH_CHECK(logits.dim() > 0 && 0 <= true_columns && true_columns <= width_of(logits),
                  "cross_entropy: more true columns than columns");
  STD_TORCH_CHECK(targets.numel() == rows_of(logits) && targets.scalar_type() == ScalarType::Long,
                  "cross_entropy: not one int64 target a row");
  const int64_t* target = static_cast<const int64_t*>(targets.data_ptr());
  for (int64_t row = 0; row < targets.numel(); ++row) {
    STD_TORCH_CHECK(target[row] < true_columns, "cross_entropy: a target is no true column");
  }
}

Tensor of_rows(const Tensor& targets) { return torch::stable::new_empty(targets, targets.sizes(), ScalarType::Float); }

float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// -> maximum, sum of exp(logits - maximum) and target logit of each row, fp32.
std::tuple<Tensor, Tensor, Tensor> statistics(Tensor logits, Tensor targets, int64_t true_columns) {
  check(logits, targets, true_columns);
  Tensor maxima = of_rows(targets), totals = of_rows(targets), hits = of_rows(targets);
  const CrossEntropy task{logits.data_ptr(), static_cast<const int64_t*>(targets.data_ptr()),
                          floats(maxima), floats(totals), floats(hits), width_of(logits), true_columns,
                          is_bf16(logits)};
  over_rows(rows_of(logits), width_of(logits) * logits.element_size(), [&](int64_t first, int64_t last) {
    MEGATRON_MED_DISPATCH(cross_entropy_rows, task, first, last);
  });
  return {maxima, totals, hits};
}

// Writes (softmax - onehot) * grad to `out`, which may be the logits.
void gradient(Tensor logits, Tensor targets, Tensor maxima, Tensor totals, Tensor grads, int64_t true_columns,
              Tensor out) {
  check(logits, targets, true_columns);
  for (const Tensor& x : {maxima, totals, grads}) {
    STD_TORCH_CHECK(x.is_contiguous() && x.numel() == targets.numel() && x.scalar_type() == ScalarType::Float,
                    "cross_entropy: not one fp32 number a row");
  }
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == logits.numel() && out.scalar_type() == logits.scalar_type(),
                  "cross_entropy: the result does not fit the logits");
  const CrossEntropyGradient task{logits.data_ptr(), static_cast<const int64_t*>(targets.data_ptr()), floats(maxima),
                                  floats(totals), floats(grads), out.data_ptr(), width_of(logits), true_columns,
                                  is_bf16(logits)};
  over_rows(rows_of(logits), 2 * width_of(logits) * logits.element_size(), [&](int64_t first, int64_t last) {
    MEGATRON_MED_DISPATCH(cross_entropy_gradient_rows, task, first, last);
  });
}

}  // namespace
}  // namespace megatron_med

STABLE_TORCH_LIBRARY_IMPL(megatron_med, CPU, library) {
  library.impl("cross_entropy_statistics", TORCH_BOX(&megatron_med::statistics));
  library.impl("cross_entropy_gradient", TORCH_BOX(&megatron_med::gradient));
}
