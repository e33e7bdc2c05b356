#include "split_qkv.h"

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace megatron_med {
namespace {

using Angles = std::optional<Tensor>;

const void* check_angles(const Angles& angles, const Tensor& like, int64_t tokens, int64_t head_dim) {
  if (!angles.has_value()) return nullptr;
  STD_TORCH_CHECK(angles->is_contiguous() && angles->numel() == tokens * head_dim && head_dim % 2 == 0 &&
                      angles->scalar_type() == like.scalar_type(),
                  "split_qkv: the angles do not fit the heads");
  return angles->data_ptr();
}

Heads heads_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.stride(3) == 1 || x.numel() == 0), "split_qkv: a head does not lie side by side");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

void run(const Tensor& mixed, const Tensor& query, const Tensor& key, const Tensor& value, const Angles& cos,
         const Angles& sin, bool join) {
  check_type(mixed, "split_qkv");
  for (const Tensor& part : {query, key, value}) {
    STD_TORCH_CHECK(part.scalar_type() == mixed.scalar_type(), "split_qkv: not the same type everywhere");
  }
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "split_qkv: cosines without sines");
  const int64_t tokens = mixed.size(0) * mixed.size(1), groups = mixed.size(2), dim = mixed.size(4);
  const SplitQkv task{mixed.data_ptr(),
                      {heads_of(query), heads_of(key), heads_of(value)},
                      check_angles(cos, mixed, tokens, dim),
                      check_angles(sin, mixed, tokens, dim),
                      mixed.size(1),
                      groups,
                      mixed.size(3) - 2,
                      dim,
                      join,
                      is_bf16(mixed)};
  over_rows(mixed.numel() == 0 ? 0 : tokens, 2 * groups * mixed.size(3) * dim * mixed.element_size(),
            [&](int64_t first, int64_t last) { MEGATRON_MED_DISPATCH(split_qkv_tokens, task, first, last); });
}

// mixed: [seq, batch, groups, queries + 2, head_dim]; cos and sin: [seq, batch, 1, head_dim].
// -> query [seq, batch, groups * queries, head_dim], key and value [seq, batch, groups, head_dim].
std::tuple<Tensor, Tensor, Tensor> split(Tensor mixed, Angles cos, Angles sin, int64_t queries) {
  STD_TORCH_CHECK(mixed.dim() == 5 && mixed.is_contiguous() && mixed.size(3) == queries + 2,
                  "split_qkv: the product is no [seq, batch, groups, queries + 2, head_dim]");
  const int64_t seq = mixed.size(0), batch = mixed.size(1), groups = mixed.size(2), dim = mixed.size(4);
  Tensor query = torch::stable::new_empty(mixed, {seq, batch, groups * queries, dim});
  Tensor key = torch::stable::new_empty(mixed, {seq, batch, groups, dim});
  Tensor value = torch::stable::new_empty(mixed, {seq, batch, groups, dim});
  run(mixed, query, key, value, cos, sin, false);
  return {query, key, value};
}

// The gradients of the three -> that of the joint product.
Tensor join(Tensor query, Tensor key, Tensor value, Angles cos, Angles sin) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "split_qkv: a gradient has not 4 dimensions");
  const int64_t seq = key.size(0), batch = key.size(1), groups = key.size(2), dim = key.size(3);
  STD_TORCH_CHECK(groups > 0 && query.size(2) % groups == 0 && query.numel() == key.numel() / groups * query.size(2) &&
                      value.numel() == key.numel() && value.size(2) == groups && query.size(3) == dim,
                  "split_qkv: the gradients do not fit each other");
  Tensor mixed = torch::stable::new_empty(key, {seq, batch, groups, query.size(2) / groups + 2, dim});
  run(mixed, query, key, value, cos, sin, true);
  return mixed;
}

}  // namespace
}  // namespace megatron_med

STABLE_TORCH_LIBRARY_IMPL(megatron_med, CPU, library) {
  library.impl("split_qkv_forward", TORCH_BOX(&megatron_med::split));
  library.impl("split_qkv_backward", TORCH_BOX(&megatron_med::join));
}
