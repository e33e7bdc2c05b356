// Names and types of the operations; their code for a device registers itself in the device's folder.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_med, library) {
  library.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor lengths) "
      "-> Tensor");
  library.def("cpu_capability() -> str");
}
