#include "layer_norm.h"

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace megatron_med {
namespace {

void check(const Tensor& x, const Tensor& weight) {
  check_type(x, "layer_norm");
  STD_TORCH_CHECK(x.is_contiguous() && weight.is_contiguous(), "layer_norm: a tensor is not contiguous");
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 1 && weight.size(0) == width_of(x) &&
                      weight.scalar_type() == x.scalar_type(),
                  "layer_norm: the weight does not fit the input");
}

float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// -> [..., width] as x, and mean and 1 / std [rows] in fp32.
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Tensor x, Tensor weight, Tensor bias, double eps) {
  check(x, weight);
  check(x, bias);
  const int64_t rows = rows_of(x), width = width_of(x);
  Tensor out = torch::stable::empty_like(x);
  Tensor means = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  Tensor scales = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  const LayerNorm task{x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), floats(means),
                       floats(scales), width, static_cast<float>(eps), is_bf16(x)};
  over_rows(rows, 2 * width * x.element_size(), [&](int64_t first, int64_t last) {
    MEGATRON_MED_DISPATCH(layer_norm_rows, task, first, last);
  });
  return {out, means, scales};
}

// -> gradient of x, and those of weight and bias after each other (fp32).
std::tuple<Tensor, Tensor> layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor means, Tensor scales) {
  check(x, weight);
  check(grad, weight);
  const int64_t rows = rows_of(x), width = width_of(x);
  for (const Tensor& of_rows : {means, scales}) {
    STD_TORCH_CHECK(rows_of(grad) == rows && of_rows.numel() == rows && of_rows.scalar_type() == ScalarType::Float,
                    "layer_norm: the gradient does not fit the input");
  }
  Tensor out = torch::stable::empty_like(x);
  const LayerNormGradient task{grad.data_ptr(), x.data_ptr(), weight.data_ptr(), floats(means), floats(scales),
                               out.data_ptr(), nullptr, width, is_bf16(x)};
  Tensor of_parameters = sum_over_rows(x, rows, 2 * width, 3 * width * x.element_size(),
                                       [&](int64_t first, int64_t last, float* sums) {
                                         auto block = task;
                                         block.sums = sums;
                                         MEGATRON_MED_DISPATCH(layer_norm_gradient_rows, block, first, last);
                                       });
  return {out, of_parameters};
}

}  // namespace
}  // namespace megatron_med

STABLE_TORCH_LIBRARY_IMPL(megatron_med, CPU, library) {
  library.impl("layer_norm_forward", TORCH_BOX(&megatron_med::layer_norm_forward));
  library.impl("layer_norm_backward", TORCH_BOX(&megatron_med::layer_norm_backward));
}
