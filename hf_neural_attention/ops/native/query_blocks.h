// Prepares what backward needs of the queries and their outputs, block by block, once for all tiles of keys.
#pragma once

#include "forward.h"

constexpr int64_t BACKWARD_QUERIES = 32;

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
      const int64_t row_width = std::max({width, value_width, round_up(problem.hidden1, LANES)});
      Scratch scratch(LANES * row_width + width * BACKWARD_QUERIES + 2 * value_width * BACKWARD_QUERIES + PairNetwork::size(problem.hidden1, hidden2) + 8 * LANES);
      Real *row = scratch.take(LANES * row_width), *columns = scratch.take(width * BACKWARD_QUERIES);
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
    const int64_t first = block * n, rows = count(block);
    const QueryBlock q = at(b, head, block);
    const PairNetwork net(problem, problem.weight_set(head), hidden2, room);
    query_features(problem, b, head, first, rows, n, columns, row, q.minus_u);
    prepare_queries(net, q.minus_u, n, rows, q.bias2);
    Real* const grad_outputs = outputs + value_width * n;
    read_transposed(result.output, result.output.at(b, head, first), rows, problem.value_dim, outputs, n, row);
    read_transposed(result.grad_output, result.grad_output.at(b, head, first), rows, problem.value_dim, grad_outputs, n, row);
    dot_columns(outputs, grad_outputs, rows, q.delta);
    const Real* softmax = result.softmax + ((b * problem.heads + head) * problem.queries + first) * 2;
    for (int64_t i = 0; i < rows; i++) q.pivot[i] = softmax[2 * i], q.inverse[i] = softmax[2 * i + 1];
  }

  // Adds in the very order in which grad_output is multiplied with the values: where one weight is nearly all of its row, the
  // roundings of both sides cancel
  void dot_columns(const Real* a, const Real* b, int64_t rows, Real* sums) const {
    for (int64_t i = 0; i < rows; i += LANES) {
      Vec total{};
      for (int64_t first = 0; first < problem.value_dim; first += PRODUCTS_IN_A_SUM) {
        Vec sum{};
        for (int64_t d = first; d < std::min(first + PRODUCTS_IN_A_SUM, problem.value_dim); d++)
          sum += load(b + d * BACKWARD_QUERIES + i) * load(a + d * BACKWARD_QUERIES + i);
        total += sum;
      }
      store(sums + i, total);
    }
  }
};
