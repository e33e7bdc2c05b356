#include "rms_norm.h"

#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace megatron_med {
namespace {

// Rows whose weight gradients are summed one after the other. The blocks do not depend on the number of threads, and
// their sums are added in order: neither does the result.
constexpr int64_t kRowsOfABlock = 64;

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
  const int64_t rows = rows_of(x), width = width_of(x), blocks = (rows + kRowsOfABlock - 1) / kRowsOfABlock;
  STD_TORCH_CHECK(rows_of(grad) == rows && scales.numel() == rows && scales.scalar_type() == ScalarType::Float,
                  "rms_norm: the gradient does not fit the input");
  Tensor out = torch::stable::empty_like(x);
  Tensor total = torch::stable::new_zeros(x, {width}, ScalarType::Float);
  Tensor sums = torch::stable::new_zeros(x, {blocks, width}, ScalarType::Float);
  float* of_blocks = static_cast<float*>(sums.data_ptr());
  over_rows(blocks, 3 * kRowsOfABlock * width * x.element_size(), [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const RmsNormGradient task{grad.data_ptr(), x.data_ptr(), weight.data_ptr(),
                                 static_cast<const float*>(scales.data_ptr()), out.data_ptr(),
                                 of_blocks + block * width, width, is_bf16(x)};
      const int64_t begin = block * kRowsOfABlock, end = std::min(begin + kRowsOfABlock, rows);
      MEGATRON_MED_DISPATCH(rms_norm_gradient_rows, task, begin, end);
    }
  });
  float* sum = static_cast<float*>(total.data_ptr());
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < width; ++i) sum[i] += of_blocks[block * width + i];
  }
  return {out, total};
}

}  // namespace
}  // namespace megatron_med

STABLE_TORCH_LIBRARY_IMPL(megatron_med, CPU, library) {
  library.impl("rms_norm_forward", TORCH_BOX(&megatron_med::rms_norm_forward));
  library.impl("rms_norm_backward", TORCH_BOX(&megatron_med::rms_norm_backward));
}
