#include "rms_norm.h"

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace megatron_med {
namespace {

void check(const Tensor& x, const Tensor& weight) {
  check_type(x, "rms_norm");
  STD_TORCH_CHECK(x.is_contiguous() && weight.is_contiguous(), "rms_norm: a tensor is not contiguous");
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 1 && weight.size(0) == width_of(x) &&
                      weight.scalar_type() == x.scalar_type(),
                  "rms_norm: the weight does not fit the input");
}

// -> [..., width] as x, and the scales [rows] in fp32.
std::tuple<Tensor, Tensor> rms_norm_forward(Tensor x, Tensor weight, double eps) {
  check(x, weight);
  const int64_t rows = rows_of(x), width = width_of(x);
  Tensor out = torch::stable::empty_like(x);
  Tensor scales = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  const RmsNorm task{x.data_ptr(), weight.data_ptr(), out.data_ptr(), static_cast<float*>(scales.data_ptr()), width,
                     static_cast<float>(eps), is_bf16(x)};
  over_rows(rows, 2 * width * x.element_size(), [&](int64_t first, int64_t last) {
    MEGATRON_MED_DISPATCH(rms_norm_rows, task, first, last);
  });
  return {out, scales};
}

// -> gradients of x and of the weight (fp32).
std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scales) {
  check(x, weight);
  check(grad, weight);
  const int64_t rows = rows_of(x), width = width_of(x);
  STD_TORCH_CHECK(rows_of(grad) == rows && scales.numel() == rows && scales.scalar_type() == ScalarType::Float,
                  "rms_norm: the gradient does not fit the input");
  Tensor out = torch::stable::empty_like(x);
  const float* of_rows = static_cast<const float*>(scales.data_ptr());
  const RmsNormGradient task{grad.data_ptr(), x.data_ptr(), weight.data_ptr(), of_rows,
                             out.data_ptr(),  nullptr,      width,             is_bf16(x)};
  Tensor of_weight = sum_over_rows(x, rows, width, 3 * width * x.element_size(),
                                   [&](int64_t first, int64_t last, float* sums) {
                                     auto block = task;
                                     block.sums = sums;
                                     MEGATRON_MED_DISPATCH(rms_norm_gradient_rows, block, first, last);
                                   });
  return {out, of_weight};
}

}  // namespace
}  // namespace megatron_med

STABLE_TORCH_LIBRARY_IMPL(megatron_med, CPU, library) {
  library.impl("rms_norm_forward", TORCH_BOX(&megatron_med::rms_norm_forward));
  library.impl("rms_norm_backward", TORCH_BOX(&megatron_med::rms_norm_backward));
}
