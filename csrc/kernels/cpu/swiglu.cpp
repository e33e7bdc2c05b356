#include "swiglu.h"

#include <vector>

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace megatron_med {
namespace {

void check(const Tensor& gate_up) {
  check_type(gate_up, "swiglu");
  STD_TORCH_CHECK(gate_up.dim() > 0 && width_of(gate_up) % 2 == 0, "swiglu: gate and up are not equally wide");
  STD_TORCH_CHECK(gate_up.is_contiguous(), "swiglu: a tensor is not contiguous");
}

void run(const Tensor& gate_up, const void* grad, const Tensor& out) {
  const int64_t width = width_of(gate_up) / 2;
  const SwiGlu task{gate_up.data_ptr(), grad, out.data_ptr(), width, is_bf16(gate_up)};
  over_rows(rows_of(gate_up), (grad == nullptr ? 3 : 5) * width * gate_up.element_size(),
            [&](int64_t first, int64_t last) { MEGATRON_MED_DISPATCH(swiglu_rows, task, first, last); });
}

Tensor swiglu_forward(Tensor gate_up) {
  check(gate_up);
  std::vector<int64_t> shape(gate_up.sizes().begin(), gate_up.sizes().end());
  shape.back() /= 2;
  Tensor out = torch::stable::new_empty(gate_up, shape);
  run(gate_up, nullptr, out);
  return out;
}

Tensor swiglu_backward(Tensor grad, Tensor gate_up) {
  check(gate_up);
  STD_TORCH_CHECK(grad.is_contiguous() && 2 * grad.numel() == gate_up.numel() &&
                      grad.scalar_type() == gate_up.scalar_type(),
                  "swiglu: the gradient does not fit the input");
  Tensor out = torch::stable::empty_like(gate_up);
  run(gate_up, grad.data_ptr(), out);
  return out;
}

}  // namespace
}  // namespace megatron_med

STABLE_TORCH_LIBRARY_IMPL(megatron_med, CPU, library) {
  library.impl("swiglu_forward", TORCH_BOX(&megatron_med::swiglu_forward));
  library.impl("swiglu_backward", TORCH_BOX(&megatron_med::swiglu_backward));
}
