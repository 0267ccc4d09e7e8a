// What backward needs of the queries and their outputs, block by block, prepared once for all tiles of keys.
#pragma once

#include "forward.h"

constexpr int64_t BACKWARD_QUERIES = 32;

struct BackwardResult {
  Tensor output, grad_output;   // [B, H, Tq, Dv]
  const Real* softmax;          // [B, H, Tq, 2], as ForwardResult has it
  Tensor grad_query;            // [B, H, Tq, D]
  Tensor grad_key;              // [B, Hkv, Tk, D], or [B, Hw, Tk, h1] where keys come projected
  Tensor grad_value;            // [B, Hkv, Tk, Dv]
  Real* grad_query_weight;      // [weight_sets, h1, D], contiguous, as all that follows
  Real* grad_query_bias;        // [weight_sets, h1]
  Real* grad_key_weight;        // [weight_sets, h1, D], or null where keys come projected
  Real* grad_key_bias;          // [weight_sets, h1], or null
  Real* grad_weight2;           // [weight_sets, h2, h1]
  Real* grad_bias2;             // [weight_sets, h2]
  Real* grad_weight3;           // [weight_sets, h2]
  Real* grad_mask;              // [B, H, Tq, Tk], zeros, or null
};

struct QueryBlock {
  Real *minus_u, *bias2;          // [h1, n], and the second layer's bias with the query's share [h2, n]
  Real *pivot, *inverse, *delta;  // [n]: of the softmax, and grad_output . output
};

class QueryBlocks {
 public:
  QueryBlocks(const Problem& problem, const BackwardResult& result, int64_t hidden2)
      : problem(problem), result(result), hidden2(hidden2), width(round_up(problem.head_dim, LANES)),
        value_width(round_up(problem.value_dim, LANES)), per_head((problem.queries + BACKWARD_QUERIES - 1) / BACKWARD_QUERIES),
        numbers((problem.hidden1 + hidden2 + 3) * BACKWARD_QUERIES),
        prepared(numbers * problem.batch * problem.heads * per_head) {
#pragma omp parallel num_threads(problem.num_threads)
    {
      Scratch scratch(LANES * width + width * BACKWARD_QUERIES + 2 * value_width * BACKWARD_QUERIES + PairNetwork::size(problem.hidden1, hidden2) + 8 * LANES);
      Real *row = scratch.take(LANES * width), *columns = scratch.take(width * BACKWARD_QUERIES);
      Real *outputs = scratch.take(2 * value_width * BACKWARD_QUERIES), *room = scratch.take(PairNetwork::size(problem.hidden1, hidden2));
#pragma omp for schedule(static)
      for (int64_t task = 0; task < problem.batch * problem.heads * per_head; task++)
        prepare(task / per_head / problem.heads, task / per_head % problem.heads, task % per_head, row, columns, outputs, room);
    }
  }

  int64_t count(int64_t block) const { return std::min(BACKWARD_QUERIES, problem.queries - block * BACKWARD_QUERIES); }

  QueryBlock at(int64_t b, int64_t head, int64_t block) const {
    constexpr int64_t n = BACKWARD_QUERIES;
    Real* const minus_u = prepared.data + ((b * problem.heads + head) * per_head + block) * numbers;
    Real *const bias2 = minus_u + problem.hidden1 * n, *const rows = bias2 + hidden2 * n;
    return {minus_u, bias2, rows, rows + n, rows + 2 * n};
  }

 private:
  const Problem& problem;
  const BackwardResult& result;
  const int64_t hidden2, width, value_width;

 public:
  const int64_t per_head;

 private:
  const int64_t numbers;  // of one block
  Buffer prepared;

  void prepare(int64_t b, int64_t head, int64_t block, Real* row, Real* columns, Real* outputs, Real* room) const {
    constexpr int64_t n = BACKWARD_QUERIES;
    const int64_t first = block * n, rows = count(block), set = problem.weight_set(head), h1 = problem.hidden1;
    const QueryBlock q = at(b, head, block);
    const PairNetwork net(problem, set, hidden2, room);
    read_transposed(problem.query, problem.query.at(b, head, first), rows, problem.head_dim, columns, n, row);
    project(problem.query_weight + set * h1 * problem.head_dim, problem.query_bias + set * h1, h1, problem.head_dim, columns, n, rows, q.minus_u, n);
    prepare_queries(net, q.minus_u, n, rows, q.bias2);
    const Rows grad_output = read_rows(result.grad_output, result.grad_output.at(b, head, first), rows, problem.value_dim, outputs + n * value_width);
    const Rows output = read_rows(result.output, result.output.at(b, head, first), rows, problem.value_dim, outputs);
    const Real* softmax = result.softmax + ((b * problem.heads + head) * problem.queries + first) * 2;
    for (int64_t i = 0; i < rows; i++) {
      q.delta[i] = dot(grad_output.data + i * grad_output.stride, output.data + i * output.stride);
      q.pivot[i] = softmax[2 * i], q.inverse[i] = softmax[2 * i + 1];
    }
  }

  // In double: delta's error would be shared by all weights of the row, and add up in what they sum to
  Real dot(const Real* a, const Real* b) const {
    constexpr int64_t step = LANES < 8 ? LANES : 8;
    double sums[step] = {};
    for (int64_t d = 0; d < value_width; d += step)
      for (int64_t k = 0; k < step; k++) sums[k] += double(a[d + k]) * double(b[d + k]);
    for (int64_t half = step / 2; half > 0; half /= 2)
      for (int64_t k = 0; k < half; k++) sums[k] += sums[k + half];
    return Real(sums[0]);
  }
};
