// Names and types of the operations; their code for a device registers itself in the device's folder.
#include <torch/csrc/stable/library.h>

namespace {

// Of names and arguments, the same as in megatron_med/kernels/native.py: what was built from older sources is refused.
int64_t version() { return 3; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_med, library) {
  library.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor lengths) "
      "-> Tensor");
  library.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  library.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scales) -> (Tensor, Tensor)");
  library.def("layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");
  library.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor means, Tensor scales) -> (Tensor, Tensor)");
  library.def("gelu_forward(Tensor x) -> Tensor");
  library.def("gelu_backward(Tensor grad, Tensor x) -> Tensor");
  library.def(
      "split_qkv_forward(Tensor mixed, Tensor? cos, Tensor? sin, int queries) -> (Tensor, Tensor, Tensor)");
  library.def("split_qkv_backward(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin) -> Tensor");
  library.def(
      "causal_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? borders) -> (Tensor, Tensor)");
  library.def(
      "causal_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
      "Tensor? borders) -> (Tensor, Tensor, Tensor)");
  library.def("swiglu_forward(Tensor gate_up) -> Tensor");
  library.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
  library.def(
      "cross_entropy_statistics(Tensor logits, Tensor targets, int true_columns) -> (Tensor, Tensor, Tensor)");
  library.def(
      "cross_entropy_gradient(Tensor logits, Tensor targets, Tensor maxima, Tensor totals, Tensor grads, "
      "int true_columns, Tensor(a!) out) -> ()");
  library.def("cpu_capability() -> str");
  library.def("version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_med, CompositeExplicitAutograd, library) {
  library.impl("version", TORCH_BOX(&version));
}
