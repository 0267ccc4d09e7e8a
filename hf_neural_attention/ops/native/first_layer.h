// Goes back through the first layer by token, y = W x + b with W [h1, D]: what a gradient of y gives to x, W and b.
#pragma once

#include "matmul.h"
#include "tensors.h"

class FirstLayer {
 public:
  // Counts the numbers of the sums over tokens that one task makes: gradients of W, its rows padded to `width`, and of b
  static int64_t sum_size(int64_t hidden1, int64_t width) { return hidden1 * width + round_up(hidden1, LANES); }

  FirstLayer(int64_t hidden1, int64_t head_dim, int64_t width, Real* room) : hidden1(hidden1), head_dim(head_dim), width(width), padded(room) {}

  void use(const Real* weight) {
    for (int64_t c = 0; c < hidden1; c++)
      for (int64_t d = 0; d < width; d++) padded[c * width + d] = d < head_dim ? weight[c * head_dim + d] : 0;
  }

  // Takes `count` tokens' gradient dy (token i, unit c at dy[i * token + c * unit]) and x; dx [count, width] = or += W^T dy
  template <Store HOW>
  void back(const Real* dy, int64_t token, int64_t unit, int64_t count, Rows x, Real* dx, Real* sums) const {
    multiply<HOW>(dy, token, unit, count, hidden1, padded, width, dx, width, width);
    multiply<ADD>(dy, unit, token, hidden1, count, x.data, x.stride, sums, width, width);
    Real* const bias = sums + hidden1 * width;
    for (int64_t c = 0; c < hidden1; c++) {
      Real sum = 0;
      for (int64_t i = 0; i < count; i++) sum += dy[i * token + c * unit];
      bias[c] += sum;
    }
  }

  void store_sums(const double* sums, Real* grad_weight, Real* grad_bias) const {
    for (int64_t c = 0; c < hidden1; c++) {
      for (int64_t d = 0; d < head_dim; d++) grad_weight[c * head_dim + d] = Real(sums[c * width + d]);
      grad_bias[c] = Real(sums[hidden1 * width + c]);
    }
  }

 private:
  const int64_t hidden1, head_dim, width;
  Real* const padded;  // [h1, width]
};
