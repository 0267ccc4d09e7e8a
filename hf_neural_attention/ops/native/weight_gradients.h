// Holds gradients of the weights of both layers: sums over tokens or pairs that each task keeps apart, and their total.
#pragma once

#include <memory>

#include "first_layer.h"
#include "interface.h"

class WeightSums {
 public:
  // Takes `key_parts` and `query_parts` of each head, which are worked on side by side
  WeightSums(const Problem& problem, int64_t width, int64_t hidden2, int64_t key_parts, int64_t query_parts)
      : problem(problem), width(width), hidden2(hidden2), key_parts(key_parts), query_parts(query_parts),
        layer_size(FirstLayer::sum_size(problem.hidden1, width)), pair_size(round_up((problem.hidden1 + 2) * hidden2, LANES)),
        query_layer(problem.queries_projected ? 0 : problem.batch * problem.heads * query_parts * layer_size),
        key_layer(problem.keys_projected ? 0 : problem.batch * problem.heads * key_parts * layer_size),
        network(problem.batch * problem.heads * key_parts * pair_size) {}

  const Problem& problem;
  const int64_t width, hidden2, key_parts, query_parts;
  const int64_t layer_size, pair_size;  // of one task's sums

  // Return a task's sums for the first layer of its queries or keys, and for the layers that see pairs
  Real* of_queries(int64_t b, int64_t head, int64_t part) const { return query_layer.data + ((b * problem.heads + head) * query_parts + part) * layer_size; }
  Real* of_keys(int64_t b, int64_t head, int64_t part) const { return key_layer.data + place(b, head, part) * layer_size; }
  Real* of_pairs(int64_t b, int64_t head, int64_t part) const { return network.data + place(b, head, part) * pair_size; }

  // Adds up what the tasks left, always in the same order
  void store(const BackwardResult& result) const {
    const int64_t h1 = problem.hidden1, h2 = problem.hidden2, by_head = problem.batch * key_parts;
    const std::unique_ptr<double[]> totals(new double[std::max(layer_size, pair_size)]);
    for (int64_t set = 0; set < problem.weight_sets; set++) {
      const int64_t layer = set * h1 * problem.head_dim;
      if (!problem.queries_projected) {
        add_up(query_layer.data, layer_size, set, problem.batch, query_parts, totals.get());
        FirstLayer(h1, problem.head_dim, width, nullptr).store_sums(totals.get(), result.grad_query_weight + layer, result.grad_query_bias + set * h1);
      }
      if (!problem.keys_projected) {
        add_up(key_layer.data, layer_size, set, by_head, 1, totals.get());
        FirstLayer(h1, problem.head_dim, width, nullptr).store_sums(totals.get(), result.grad_key_weight + layer, result.grad_key_bias + set * h1);
      }
      add_up(network.data, pair_size, set, by_head, 1, totals.get());
      for (int64_t r = 0; r < h2; r++) {
        const int64_t unit = set * h2 + r;
        const double w3 = problem.weight3[unit];
        for (int64_t c = 0; c < h1; c++) result.grad_weight2[unit * h1 + c] = Real(totals[c * hidden2 + r] * w3);
        result.grad_bias2[unit] = Real(totals[h1 * hidden2 + r] * w3);
        result.grad_weight3[unit] = Real(totals[(h1 + 1) * hidden2 + r]);
      }
    }
  }

 private:
  Buffer query_layer, key_layer, network;

  int64_t place(int64_t b, int64_t head, int64_t part) const { return (part * problem.batch + b) * problem.heads + head; }

  // Adds up sums [outer, H, inner, size] of the heads that share a set of weights, in double
  void add_up(const Real* sums, int64_t size, int64_t set, int64_t outer, int64_t inner, double* totals) const {
    std::fill(totals, totals + size, 0.0);
    for (int64_t entry = 0; entry < outer * problem.heads * inner; entry++)
      if (problem.weight_set(entry / inner % problem.heads) == set)
        for (int64_t k = 0; k < size; k++) totals[k] += sums[entry * size + k];
  }
};
