#include "causal_attention.h"

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace megatron_med {
namespace {

// Tokens of a row of the batch that see each other.
struct Document {
  int64_t sample;
  int64_t first;
  int64_t length;
};

// Every row of the batch, or what `borders` cuts them into: [documents + 1] int32, cumulative lengths, row after row.
std::vector<Document> documents_of(const std::optional<Tensor>& borders, int64_t batch, int64_t seq) {
  std::vector<Document> found;
  if (!borders.has_value()) {
    for (int64_t sample = 0; sample < batch; ++sample) found.push_back({sample, 0, seq});
    return found;
  }
  STD_TORCH_CHECK(borders->scalar_type() == ScalarType::Int && borders->dim() == 1 && borders->is_contiguous(),
                  "causal_attention: the borders of documents are int32, side by side");
  const int32_t* border = static_cast<const int32_t*>(borders->data_ptr());
  const int64_t count = borders->numel() - 1;
  STD_TORCH_CHECK(count >= 0 && border[0] == 0 && border[count] == batch * seq,
                  "causal_attention: the documents do not add up to the batch");
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = border[i + 1] - border[i];
    if (length == 0) continue;
    found.push_back({border[i] / seq, border[i] % seq, length});
    STD_TORCH_CHECK(length > 0 && border[i] % seq + length <= seq,
                    "causal_attention: a document does not end in the row of the batch in which it begins");
  }
  return found;
}

constexpr int64_t kProductsOfAThread = 1 << 18;  // fewer multiplications are not worth waking another one

struct Shape {
  int64_t seq;
  int64_t batch;
  int64_t heads;
  int64_t groups;
  int64_t head_dim;
  float scale;
};

// query: [seq, batch, heads, head_dim]; key and value: [seq, batch, groups, head_dim].
Shape check(const Tensor& query, const Tensor& key, const Tensor& value) {
  for (const Tensor& part : {query, key, value}) {
    STD_TORCH_CHECK(part.dim() == 4 && (part.stride(3) == 1 || part.numel() == 0),
                    "causal_attention: query, key and value have 4 dimensions, and a head lies side by side");
    STD_TORCH_CHECK(part.scalar_type() == ScalarType::Float, "causal_attention: fp32");
    STD_TORCH_CHECK(part.size(0) == query.size(0) && part.size(1) == query.size(1) && part.size(3) == query.size(3),
                    "causal_attention: not the same tokens and head_dim everywhere");
  }
  STD_TORCH_CHECK(key.size(2) == value.size(2) && key.size(2) > 0 && query.size(2) % key.size(2) == 0,
                  "causal_attention: the heads are no multiple of the groups");
  return {query.size(0), query.size(1), query.size(2),
          key.size(2),   query.size(3), 1.0f / std::sqrt(static_cast<float>(query.size(3)))};
}

HeadRows rows_of(const Tensor& x, const Document& document, int64_t head) {
  float* first = static_cast<float*>(x.data_ptr());
  return {first + document.first * x.stride(0) + document.sample * x.stride(1) + head * x.stride(2), x.stride(0)};
}

float* statistics_of(const Tensor& logsumexp, const Shape& shape, const Document& document, int64_t head) {
  float* first = static_cast<float*>(logsumexp.data_ptr());
  return first + (document.sample * shape.heads + head) * shape.seq + document.first;
}

// Calls work(document, part, memory) for all parts of all documents. A thread gets about as many pairs of tokens as
// another, and a part is one thread's from beginning to end: the result does not depend on how many there are.
template <typename Work>
void over_parts(const std::vector<Document>& documents, int64_t parts, int64_t head_dim, int64_t floats,
                const Work& work) {
  int64_t total = 0;
  for (const Document& document : documents) total += document.length * document.length * parts;
  if (total == 0) return;
  const int64_t worth = std::max<int64_t>(1, total * head_dim / kProductsOfAThread);
  const int64_t shares = std::min<int64_t>(torch::stable::get_num_threads(), worth);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    std::vector<float> memory;
    int64_t before = 0;
    for (const Document& document : documents) {
      const int64_t pairs = document.length * document.length;
      for (int64_t part = 0; part < parts; ++part, before += pairs) {
        const int64_t share = static_cast<int64_t>(static_cast<double>(before) * shares / total);
        if (share < first || share >= last) continue;
        memory.resize(floats + 16);
        const uintptr_t line = (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64;
        work(document, part, reinterpret_cast<float*>(line));
      }
    }
  });
}

int64_t longest_of(const std::vector<Document>& documents) {
  int64_t longest = 0;
  for (const Document& document : documents) longest = std::max(longest, document.length);
  return longest;
}

// -> out [seq, batch, heads, head_dim], logsumexp of the scores [batch, heads, seq].
std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> borders) {
  const Shape shape = check(query, key, value);
  Tensor out = torch::stable::new_empty(query, {shape.seq, shape.batch, shape.heads, shape.head_dim});
  Tensor logsumexp = torch::stable::new_empty(query, {shape.batch, shape.heads, shape.seq});
  if (query.numel() == 0) return {out, logsumexp};
  const auto documents = documents_of(borders, shape.batch, shape.seq);
  const int64_t of_group = shape.heads / shape.groups;
  const int64_t floats = MEGATRON_MED_DISPATCH(attention_forward_floats, longest_of(documents), shape.head_dim);
  over_parts(documents, shape.heads, shape.head_dim, floats, [&](const Document& document, int64_t head, float* memory) {
    const AttentionForward task{rows_of(query, document, head),
                                rows_of(key, document, head / of_group),
                                rows_of(value, document, head / of_group),
                                rows_of(out, document, head),
                                statistics_of(logsumexp, shape, document, head),
                                document.length,
                                shape.head_dim,
                                shape.scale};
    MEGATRON_MED_DISPATCH(attend_forward, task, memory);
  });
  return {out, logsumexp};
}

// grad: of out. -> the gradients of query, key and value.
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out,
                                            Tensor logsumexp, std::optional<Tensor> borders) {
  const Shape shape = check(query, key, value);
  for (const Tensor& part : {query, grad, out}) {
    STD_TORCH_CHECK(part.dim() == 4 && part.is_contiguous() && part.numel() == query.numel() &&
                        part.scalar_type() == ScalarType::Float,
                    "causal_attention: query, output and gradient are of one shape, and contiguous");
  }
  STD_TORCH_CHECK(logsumexp.is_contiguous() && logsumexp.numel() == shape.batch * shape.heads * shape.seq,
                  "causal_attention: one logsumexp for each query");
  Tensor grad_query = torch::stable::new_empty(query, {shape.seq, shape.batch, shape.heads, shape.head_dim});
  Tensor grad_key = torch::stable::new_empty(key, {shape.seq, shape.batch, shape.groups, shape.head_dim});
  Tensor grad_value = torch::stable::new_empty(value, {shape.seq, shape.batch, shape.groups, shape.head_dim});
  if (query.numel() == 0) return {grad_query, grad_key, grad_value};
  const auto documents = documents_of(borders, shape.batch, shape.seq);
  const int64_t of_group = shape.heads / shape.groups;
  const int64_t floats =
      MEGATRON_MED_DISPATCH(attention_backward_floats, of_group, longest_of(documents), shape.head_dim);
  over_parts(documents, shape.groups, shape.head_dim, floats, [&](const Document& document, int64_t group, float* memory) {
    const int64_t head = group * of_group;
    const AttentionBackward task{rows_of(query, document, head),
                                 rows_of(key, document, group),
                                 rows_of(value, document, group),
                                 rows_of(out, document, head),
                                 rows_of(grad, document, head),
                                 rows_of(grad_query, document, head),
                                 rows_of(grad_key, document, group),
                                 rows_of(grad_value, document, group),
                                 statistics_of(logsumexp, shape, document, head),
                                 shape.seq,
                                 of_group,
                                 document.length,
                                 shape.head_dim,
                                 shape.scale};
    MEGATRON_MED_DISPATCH(attend_backward, task, memory);
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace megatron_med

STABLE_TORCH_LIBRARY_IMPL(megatron_med, CPU, library) {
  library.impl("causal_attention_forward", TORCH_BOX(&megatron_med::forward));
  library.impl("causal_attention_backward", TORCH_BOX(&megatron_med::backward));
}
