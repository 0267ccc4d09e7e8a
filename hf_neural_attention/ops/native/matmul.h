// Makes small matrix products on blocks that lie in cache. Rows of the results are vectors along the last dimension.
#pragma once

#include <algorithm>

#include "simd.h"

// Says what becomes of what c held
enum Store { REPLACE, ADD };

// Computes c [R, V vectors] = or += a [R, n] times b [n, V vectors]. `a_row` and `a_column` are the strides of a.
template <Store HOW, int R, int V>
INLINE void multiply_tile(const Real* a, int64_t a_row, int64_t a_column, int64_t n, const Real* b, int64_t b_row, Real* c,
                          int64_t c_row) {
  Vec sum[R][V];
  unroll<R>([&](auto r) INLINE_LAMBDA { unroll<V>([&](auto v) INLINE_LAMBDA { sum[r][v] = Vec{}; }); });
  for (int64_t j = 0; j < n; j++) {
    Vec row[V];
    unroll<V>([&](auto v) INLINE_LAMBDA { keep(row[v] = load(b + j * b_row + v * LANES)); });
    unroll<R>([&](auto r) INLINE_LAMBDA {
      const Vec x = splat(a[r * a_row + j * a_column]);
      unroll<V>([&](auto v) INLINE_LAMBDA { sum[r][v] += x * row[v]; });
    });
  }
  unroll<R>([&](auto r) INLINE_LAMBDA {
    unroll<V>([&](auto v) INLINE_LAMBDA {
      Real* const place = c + r * c_row + v * LANES;
      // adds c last: sums of many products grow by partial sums, which rounds less
      store(place, HOW == ADD ? load(place) + sum[r][v] : sum[r][v]);
    });
  });
}

template <Store HOW, int R>
INLINE void multiply_rows(const Real* a, int64_t a_row, int64_t a_column, int64_t n, const Real* b, int64_t b_row, Real* c,
                          int64_t c_row, int64_t width) {
  constexpr int wide = NUM_REGISTERS == 32 ? (R <= 4 ? 4 : 3) : 2;
  int64_t d = 0;
  for (; d + wide * LANES <= width; d += wide * LANES) multiply_tile<HOW, R, wide>(a, a_row, a_column, n, b + d, b_row, c + d, c_row);
  if constexpr (wide > 2)
    for (; d + 2 * LANES <= width; d += 2 * LANES) multiply_tile<HOW, R, 2>(a, a_row, a_column, n, b + d, b_row, c + d, c_row);
  for (; d < width; d += LANES) multiply_tile<HOW, R, 1>(a, a_row, a_column, n, b + d, b_row, c + d, c_row);
}

// Takes the most rows of c at a time that leave registers for the rest
constexpr int ROWS_AT_ONCE = 4;

// Computes c [rows, width] = or += a [rows, n] times b [n, width]; width is a multiple of LANES
template <Store HOW>
static void multiply(const Real* a, int64_t a_row, int64_t a_column, int64_t rows, int64_t n, const Real* b, int64_t b_row,
                     Real* c, int64_t c_row, int64_t width) {
  int64_t r = 0;
  for (; r + ROWS_AT_ONCE <= rows; r += ROWS_AT_ONCE)
    multiply_rows<HOW, ROWS_AT_ONCE>(a + r * a_row, a_row, a_column, n, b, b_row, c + r * c_row, c_row, width);
  for (; r < rows; r++) multiply_rows<HOW, 1>(a + r * a_row, a_row, a_column, n, b, b_row, c + r * c_row, c_row, width);
}

// Limits the products in a row that are added up by themselves. The error of such a sum grows with their number.
constexpr int64_t PRODUCTS_IN_A_SUM = 32;

// Computes c = a b as above, in sums of fewer products
INLINE void multiply_accurately(const Real* a, int64_t a_row, int64_t rows, int64_t n, const Real* b, int64_t b_row, Real* c,
                                int64_t c_row, int64_t width) {
  multiply<REPLACE>(a, a_row, 1, rows, std::min(n, PRODUCTS_IN_A_SUM), b, b_row, c, c_row, width);
  for (int64_t j = PRODUCTS_IN_A_SUM; j < n; j += PRODUCTS_IN_A_SUM)
    multiply<ADD>(a + j, a_row, 1, rows, std::min(n - j, PRODUCTS_IN_A_SUM), b + j * b_row, b_row, c, c_row, width);
}
