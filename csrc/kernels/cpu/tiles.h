// Products of matrices that lie in the cache, in tiles whose sums stay in registers, and the blocks of attention that
// they are cut from.
#pragma once

#include <stdint.h>

#include "vector.h"

namespace {

constexpr int64_t kTileRows = kLanes == 16 ? 12 : 6;  // 2 vectors a row, and the processor has 32 registers or 16
constexpr int64_t kTileColumns = 2 * kLanes;

constexpr int64_t kQueries = 96;  // of a block
constexpr int64_t kKeys = 192;
constexpr int64_t kScores = kKeys + 16;  // numbers from a row of scores to the next: no power of 2, for the cache

static_assert(kQueries % kTileRows == 0 && kKeys % kTileRows == 0 && kKeys % kTileColumns == 0, "whole tiles");

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
inline int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

// out[r, c] = (kAdd: out[r, c] +) the sum over k < depth of left[r * row + k * step] * right[k * right_step + c], where
// row is kRow, or left_row for 0, and step is kStep. Not inlined: what is around would take registers from the sums.
template <bool kAdd, int64_t kRow, int64_t kStep>
__attribute__((noinline)) void multiply_tile(const float* left, int64_t left_row, const float* right,
                                             int64_t right_step, float* out, int64_t out_row, int64_t depth) {
  const int64_t row = kRow == 0 ? left_row : kRow;
  Floats sums[kTileRows][2];
#pragma GCC unroll 12
  for (int64_t r = 0; r < kTileRows; ++r) {
    sums[r][0] = kAdd ? load(out + r * out_row) : Floats{};
    sums[r][1] = kAdd ? load(out + r * out_row + kLanes) : Floats{};
  }
  for (int64_t k = 0; k < depth; ++k, left += kStep, right += right_step) {
    const Floats first = load(right), second = load(right + kLanes);
#pragma GCC unroll 12
    for (int64_t r = 0; r < kTileRows; ++r) {
      const float x = left[r * row];
      sums[r][0] += x * first;
      sums[r][1] += x * second;
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < kTileRows; ++r) {
    store(out + r * out_row, sums[r][0]);
    store(out + r * out_row + kLanes, sums[r][1]);
  }
}

// Which pairs of a block see each other: query row r sees the keys c <= r + offset, of `columns`.
struct Seen {
  int64_t rows;  // whole tiles
  int64_t columns;
  int64_t offset;

  int64_t by(int64_t row) const { return larger(0, smaller(columns, row + offset + 1)); }
  int64_t by_tile(int64_t row) const { return by(row + kTileRows - 1); }
  int64_t first_row_of(int64_t column) const { return larger(0, column - offset); }
};

// scores = rows * panels: of the tiles in which something is seen. rows: [rows, depth]; panels: kTileColumns keys each,
// [columns / kTileColumns, depth, kTileColumns].
inline void score_block(const Seen& seen, const float* rows, int64_t row, const float* panels, int64_t depth,
                        float* scores) {
  for (int64_t c = 0; c < seen.columns; c += kTileColumns) {
    for (int64_t r = 0; r < seen.rows; r += kTileRows) {
      if (seen.by_tile(r) <= c) continue;
      multiply_tile<false, 0, 1>(rows + r * row, row, panels + c * depth, kTileColumns, scores + r * kScores + c,
                                 kScores, depth);
    }
  }
}

// out += scores * keys. keys: [columns, width]; out: [rows, width], where width is of whole tiles.
inline void add_over_keys(const Seen& seen, const float* scores, const float* keys, float* out, int64_t width) {
  for (int64_t i = 0; i < width; i += kTileColumns) {
    for (int64_t r = 0; r < seen.rows; r += kTileRows) {
      multiply_tile<true, kScores, 1>(scores + r * kScores, 0, keys + i, width, out + r * width + i, width,
                                      seen.by_tile(r));
    }
  }
}

// out += scores^T * queries. queries: [rows, width]; out: [columns, width].
inline void add_over_queries(const Seen& seen, const float* scores, const float* queries, float* out, int64_t width) {
  for (int64_t i = 0; i < width; i += kTileColumns) {
    for (int64_t c = 0; c < seen.columns; c += kTileRows) {
      const int64_t first = seen.first_row_of(c);
      if (first >= seen.rows) continue;
      multiply_tile<true, 1, kScores>(scores + first * kScores + c, 0, queries + first * width + i, width,
                                      out + c * width + i, width, seen.rows - first);
    }
  }
}

inline void fill(float* to, int64_t count, float x) {
  for (int64_t i = 0; i < count; ++i) to[i] = x;
}

// Rows into [padded, width]; what is behind them is 0.
inline void copy_rows(const float* from, int64_t stride, int64_t count, int64_t dim, float* to, int64_t padded,
                      int64_t width) {
  for (int64_t r = 0; r < count; ++r, from += stride, to += width) {
    __builtin_memcpy(to, from, dim * sizeof(float));
    fill(to + dim, width - dim, 0);
  }
  fill(to, (padded - count) * width, 0);
}

// Rows into panels of kTileColumns of them, [dim, kTileColumns] each; what is behind them is 0.
inline void copy_panels(const float* from, int64_t stride, int64_t count, int64_t dim, float* to) {
  for (int64_t first = 0; first < count; first += kTileColumns, to += dim * kTileColumns) {
    const int64_t here = smaller(kTileColumns, count - first);
    if (here < kTileColumns) fill(to, dim * kTileColumns, 0);
    for (int64_t r = 0; r < here; ++r) {
      const float* row = from + (first + r) * stride;
      for (int64_t i = 0; i < dim; ++i) to[i * kTileColumns + r] = row[i];
    }
  }
}

// Memory given out piece by piece, each at a border of the cache's lines.
struct Memory {
  float* first;  // null: it is only counted
  int64_t used = 0;

  float* take(int64_t count) {
    float* piece = first == nullptr ? nullptr : first + used;
    used += round_up(count, 16);
    return piece;
  }
};

}  // namespace
