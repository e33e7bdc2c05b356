#include "gelu.h"

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace megatron_med {
namespace {

Tensor run(const Tensor& x, const void* grad) {
  check_type(x, "gelu_tanh");
  STD_TORCH_CHECK(x.is_contiguous(), "gelu_tanh: a tensor is not contiguous");
  Tensor out = torch::stable::empty_like(x);
  const Gelu task{x.data_ptr(), grad, out.data_ptr(), is_bf16(x)};
  over_rows(x.numel(), (grad == nullptr ? 2 : 3) * x.element_size(),
            [&](int64_t first, int64_t last) { MEGATRON_MED_DISPATCH(gelu_rows, task, first, last); });
  return out;
}

Tensor gelu_forward(Tensor x) { return run(x, nullptr); }

Tensor gelu_backward(Tensor grad, Tensor x) {
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type(),
                  "gelu_tanh: the gradient does not fit the input");
  return run(x, grad.data_ptr());
}

}  // namespace
}  // namespace megatron_med

STABLE_TORCH_LIBRARY_IMPL(megatron_med, CPU, library) {
  library.impl("gelu_forward", TORCH_BOX(&megatron_med::gelu_forward));
  library.impl("gelu_backward", TORCH_BOX(&megatron_med::gelu_backward));
}
