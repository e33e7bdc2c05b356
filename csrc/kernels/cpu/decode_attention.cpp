#include "decode_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace megatron_med {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBytesOfAThread = 64 << 10;  // reading less is not worth waking another one

// Puts the token of a row behind those that its cache holds. token: [rows, groups, head_dim]; kept: [rows, groups,
// capacity, head_dim].
void append(const Tensor& token, Tensor& kept, int64_t row, int64_t group, int64_t place, int64_t bytes) {
  const char* from = static_cast<const char*>(token.data_ptr());
  char* to = static_cast<char*>(kept.data_ptr());
  from += (row * token.stride(0) + group * token.stride(1)) * bytes;
  to += (row * kept.stride(0) + group * kept.stride(1) + place * kept.stride(2)) * bytes;
  std::memcpy(to, from, kept.size(3) * bytes);
}

void check(const Tensor& query, const Tensor& token, const Tensor& kept, const Tensor& lengths) {
  const int64_t rows = query.size(0);
  STD_TORCH_CHECK(query.dim() == 3 && token.dim() == 3 && kept.dim() == 4 && lengths.dim() == 1,
                  "decode_attention: query, key and value have 3 dimensions, the caches 4, the lengths 1");
  STD_TORCH_CHECK(token.size(0) == rows && lengths.size(0) == rows && kept.size(0) >= rows,
                  "decode_attention: not as many rows everywhere");
  STD_TORCH_CHECK(token.size(1) == kept.size(1) && query.size(1) % kept.size(1) == 0,
                  "decode_attention: the heads are no multiple of the groups");
  STD_TORCH_CHECK(query.size(2) == kept.size(3) && token.size(2) == kept.size(3),
                  "decode_attention: not the same head_dim everywhere");
  STD_TORCH_CHECK(query.scalar_type() == kept.scalar_type() && token.scalar_type() == kept.scalar_type(),
                  "decode_attention: not the same type everywhere");
  STD_TORCH_CHECK(query.is_contiguous() && token.stride(2) == 1 && kept.stride(3) == 1 &&
                      kept.stride(2) == kept.size(3) && lengths.is_contiguous(),
                  "decode_attention: the numbers of a head, and the tokens of a row, do not lie side by side");
  STD_TORCH_CHECK(lengths.scalar_type() == torch::headeronly::ScalarType::Long, "decode_attention: lengths are int64");
}

// lengths: tokens of each row before this one. -> [rows, heads, head_dim].
Tensor decode_attention(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, Tensor lengths) {
  check(query, key, keys, lengths);
  check(query, value, values, lengths);
  using torch::headeronly::ScalarType;
  const auto type = query.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "decode_attention: fp32 or bf16");
  Tensor out = torch::stable::empty_like(query);
  const int64_t rows = query.size(0), heads = query.size(1), dim = query.size(2), groups = keys.size(1);
  const int64_t together = heads / groups, bytes = type == ScalarType::Float ? 4 : 2;
  const int64_t* length_of = static_cast<const int64_t*>(lengths.data_ptr());
  std::vector<int64_t> ends(rows);  // keys of all rows up to and with this one
  int64_t total = 0, longest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(0 <= length_of[row] && length_of[row] < keys.size(2) && keys.size(2) == values.size(2),
                    "decode_attention: a row is longer than its cache");
    ends[row] = total += length_of[row] + 1;
    longest = std::max(longest, length_of[row] + 1);
  }
  auto attend = [&](int64_t row, int64_t group, float* scores) {
    append(key, keys, row, group, length_of[row], bytes);
    append(value, values, row, group, length_of[row], bytes);
    const int64_t head = (row * heads + group * together) * dim * bytes;
    const int64_t kept = (row * keys.stride(0) + group * keys.stride(1)) * bytes;
    const int64_t weighed = (row * values.stride(0) + group * values.stride(1)) * bytes;
    const DecodeAttention task{static_cast<const char*>(query.data_ptr()) + head,
                               static_cast<const char*>(keys.data_ptr()) + kept,
                               static_cast<const char*>(values.data_ptr()) + weighed,
                               static_cast<char*>(out.data_ptr()) + head,
                               scores, together, dim, length_of[row] + 1,
                               1.0f / std::sqrt(static_cast<float>(dim)), type == ScalarType::BFloat16};
    MEGATRON_MED_DISPATCH(attend_group, task);
  };
  // Every thread gets about the same number of keys; a group of a row is one thread's from beginning to end, so that
  // the result does not depend on how many there are.
  const int64_t worth = std::max<int64_t>(1, total * groups * dim * bytes * 2 / kBytesOfAThread);
  const int64_t shares = std::min<int64_t>(torch::stable::get_num_threads(), worth);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scores(together * (longest + 16));
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t length = length_of[row] + 1, before = (ends[row] - length) * groups;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t share = (before + group * length) * shares / (total * groups);
        if (first <= share && share < last) attend(row, group, scores.data());
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace megatron_med

STABLE_TORCH_LIBRARY_IMPL(megatron_med, CPU, library) {
  library.impl("decode_attention", TORCH_BOX(&megatron_med::decode_attention));
}
