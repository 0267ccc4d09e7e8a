// Computes scores of one query against a strip of keys, from what each contributes to the scorer's first hidden layer.
//
// Uses relu(u + w) = max(w, -u) + u: the sum over the first layer's units of weight2 * u is the same for all keys and goes
// into the bias of the second layer, so that a pair costs one operation per unit of the first layer, h1 * h2 products, and
// two operations per unit of the second. Scores come in units of log2(e), for exp2.
#pragma once

#include "tensors.h"

// Holds the scorer's layers that act on pairs, laid out for the kernels: the second layer padded to a multiple of its block
// with units that are always zero
struct PairNetwork {
  int64_t hidden1, hidden2;  // hidden2 padded
  const Real* weight2;       // [h1, h2]: transposed
  const Real* bias2;         // [h2]
  const Real* weight3;       // [h2], times log2(e)

  static int64_t size(int64_t hidden1, int64_t padded2) { return round_up(hidden1 * padded2, LANES) + 2 * round_up(padded2, LANES); }

  PairNetwork(const Problem& problem, int64_t set, int64_t padded2, Real* room) : hidden1(problem.hidden1), hidden2(padded2) {
    Real* const w2 = room;
    Real* const b2 = w2 + round_up(hidden1 * padded2, LANES);
    Real* const w3 = b2 + round_up(padded2, LANES);
    for (int64_t r = 0; r < padded2; r++) {
      const bool real = r < problem.hidden2;
      const int64_t row = set * problem.hidden2 + r;
      for (int64_t c = 0; c < hidden1; c++) w2[c * padded2 + r] = real ? problem.weight2[row * hidden1 + c] : 0;
      b2[r] = real ? problem.bias2[row] : 0;
      w3[r] = real ? problem.weight3[row] * Real(LOG2_E) : 0;
    }
    weight2 = w2, bias2 = b2, weight3 = w3;
  }
};

// Points to one query: its numbers lie `ld` apart
struct QueryRow {
  const Real* minus_u;  // [h1]
  const Real* bias2;    // [h2]: the second layer's, with the query's share
  int64_t ld;
};

// Returns how many vectors of keys go together, so that the second layer's sums stay in registers
template <int R2>
constexpr int strip_vectors() {
  return NUM_REGISTERS == 32 ? (R2 == 8 ? 3 : 4) : (R2 == 8 ? 1 : R2 == 4 ? 2 : 4);
}

// Computes the second hidden layer before its ReLU, units r0 to r0 + R2, for S vectors of keys
template <int R2, int S>
INLINE void second_layer(const PairNetwork& net, const QueryRow& row, int64_t r0, const Real* w, int64_t ld, Vec (&a)[R2][S]) {
  unroll<R2>([&](auto r) INLINE_LAMBDA {
    const Vec bias = splat(row.bias2[(r0 + r) * row.ld]);
    unroll<S>([&](auto s) INLINE_LAMBDA { a[r][s] = bias; });
  });
  const Real* weight = net.weight2 + r0;
  const Real* minus_u = row.minus_u;
  for (int64_t c = 0; c < net.hidden1; c++, weight += net.hidden2, minus_u += row.ld, w += ld) {
    const Vec threshold = splat(*minus_u);
    Vec hidden[S];
    unroll<S>([&](auto s) INLINE_LAMBDA { hidden[s] = larger(threshold, load(w + s * LANES)); });
    unroll<R2>([&](auto r) INLINE_LAMBDA {
      const Vec x = splat(weight[r]);
      unroll<S>([&](auto s) INLINE_LAMBDA { a[r][s] += x * hidden[s]; });
    });
  }
}

// Adds the mask's bias to a score, or chooses NEVER where a pair does not count, so that a NaN in its key goes no further. A NaN
// in the bias does
INLINE Vec masked(Vec score, Vec bias) { return bias <= splat(NEVER / 2) ? splat(NEVER) : score + bias; }

// Takes the pivot off at the end: a sum that starts from it is rounded otherwise for every pivot that a row has had, which
// far from zero is much. Most rows keep the one that they start with, zero.
template <int S>
INLINE void subtract_pivot(Real pivot, Vec (&score)[S]) {
  if (pivot != 0) unroll<S>([&](auto s) INLINE_LAMBDA { score[s] -= splat(pivot); });
}

// Makes scores minus `pivot` of S vectors of keys; `initial` (residual mode: dot products) and `bias` (the mask) may be null
template <int R2, int S>
INLINE void score_strip(const PairNetwork& net, const QueryRow& row, const Real* w, int64_t ld, const Real* initial,
                        const Real* bias, Real pivot, Vec (&score)[S]) {
  unroll<S>([&](auto s) INLINE_LAMBDA { score[s] = Vec{}; });
  for (int64_t r0 = 0; r0 < net.hidden2; r0 += R2) {
    Vec a[R2][S];
    second_layer<R2, S>(net, row, r0, w, ld, a);
    unroll<R2>([&](auto r) INLINE_LAMBDA {
      const Vec weight = splat(net.weight3[r0 + r]);
      unroll<S>([&](auto s) INLINE_LAMBDA { score[s] += weight * relu(a[r][s]); });
    });
  }
  if (initial) unroll<S>([&](auto s) INLINE_LAMBDA { score[s] += load(initial + s * LANES); });
  if (bias) unroll<S>([&](auto s) INLINE_LAMBDA { score[s] = masked(score[s], load(bias + s * LANES)); });
  subtract_pivot<S>(pivot, score);
}

// Computes minus_u [h1, ld] and the second layer's bias [h2, ld] of `count` queries, from u [h1, ld]
static void prepare_queries(const PairNetwork& net, Real* u, int64_t ld, int64_t count, Real* bias2) {
  for (int64_t i = 0; i < count; i += LANES) {
    for (int64_t r = 0; r < net.hidden2; r++) {
      Vec sum = splat(net.bias2[r]);
      for (int64_t c = 0; c < net.hidden1; c++) sum += load(u + c * ld + i) * net.weight2[c * net.hidden2 + r];
      store(bias2 + r * ld + i, sum);
    }
    for (int64_t c = 0; c < net.hidden1; c++) store(u + c * ld + i, -load(u + c * ld + i));
  }
}
