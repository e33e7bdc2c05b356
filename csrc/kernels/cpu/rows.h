// Tensors as rows of numbers that lie side by side, and rows shared out to threads.
#pragma once

#include <algorithm>
#include <stdint.h>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace megatron_med {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBytesOfATask = 128 << 10;  // less is not worth waking another thread

inline int64_t width_of(const Tensor& x) { return x.size(x.dim() - 1); }

inline int64_t rows_of(const Tensor& x) { return x.numel() == 0 ? 0 : x.numel() / width_of(x); }

inline void check_type(const Tensor& x, const char* operation) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, operation,
                  ": fp32 or bf16");
}

inline bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

// Calls work(first, last) over all rows, some at a time; `bytes` are what a row moves.
template <typename Work>
void over_rows(int64_t rows, int64_t bytes, const Work& work) {
  if (rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, kBytesOfATask / std::max<int64_t>(1, bytes));
  torch::stable::parallel_for(0, rows, grain, work);
}

// Rows that are summed one after the other. The blocks do not depend on the number of threads, and their sums are added
// in order: neither does the result.
constexpr int64_t kRowsOfABlock = 64;

// Calls work(first, last, sums) for blocks of rows; it adds to sums, [width] floats. -> their sum over the blocks.
template <typename Work>
Tensor sum_over_rows(const Tensor& like, int64_t rows, int64_t width, int64_t bytes, const Work& work) {
  const int64_t blocks = (rows + kRowsOfABlock - 1) / kRowsOfABlock;
  Tensor total = torch::stable::new_zeros(like, {width}, ScalarType::Float);
  Tensor sums = torch::stable::new_zeros(like, {blocks, width}, ScalarType::Float);
  float* of_blocks = static_cast<float*>(sums.data_ptr());
  over_rows(blocks, kRowsOfABlock * bytes, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kRowsOfABlock;
      work(begin, std::min(begin + kRowsOfABlock, rows), of_blocks + block * width);
    }
  });
  float* sum = static_cast<float*>(total.data_ptr());
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < width; ++i) sum[i] += of_blocks[block * width + i];
  }
  return total;
}

}  // namespace megatron_med
