// Computes the backward pass by tiles of keys against blocks of queries. Everything is computed again from u, w and each row's
// pivot and sum: with those very numbers, the weights are the forward pass's to the last bit (where a row's pivot was moved,
// to those of the factors between pivots).
//
// Leaves weight3 out of the sums over pairs: with k_r = [a_r > 0] they are sum k_r ds h_c, sum k_r ds and
// sum ds relu(a_r), of which the first two, times w3_r, are the gradients of weight2 and bias2.
#pragma once

#include "first_layer.h"
#include "query_blocks.h"
#include "weight_gradients.h"

constexpr int64_t BACKWARD_KEYS = 64;
constexpr int64_t TOKENS_AT_ONCE = 64;  // of the queries, back through the first layer
constexpr int64_t PARTS_BYTES = 64 << 20;  // a thread, for more parts of the keys than give each thread one

template <int R2>
constexpr int backward_vectors() {
  return NUM_REGISTERS == 32 ? (R2 == 8 ? 2 : 4) : 1;
}

template <int R2>
class Backward {
 public:
  Backward(const Problem& problem, const BackwardResult& result)
      : problem(problem), result(result), width(round_up(problem.head_dim, LANES)),
        value_width(round_up(problem.value_dim, LANES)), hidden2(round_up(problem.hidden2, R2)),
        groups(problem.heads / problem.kv_heads), tiles((problem.keys + BACKWARD_KEYS - 1) / BACKWARD_KEYS),
        u_numbers(problem.batch * problem.heads * problem.queries * problem.hidden1),
        query_numbers(problem.residual ? problem.batch * problem.heads * problem.queries * width : 0),
        parts(parts_of(problem.batch * problem.kv_heads, tiles, (u_numbers + query_numbers) * int64_t(sizeof(Real)))),
        query_parts(parts_of(problem.batch * problem.heads, (problem.queries + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE, 0)),
        weight_sums(problem, width, hidden2, parts, query_parts), query_blocks(problem, result, hidden2),
        partial_u(u_numbers * parts), partial_query(query_numbers * parts) {}

  void run() {
#pragma omp parallel num_threads(problem.num_threads)
    {
      Memory memory(*this);
      // starts with the first keys, which have the most queries under a causal mask
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < problem.batch * problem.kv_heads * parts; task++) {
        const int64_t head = task % (problem.batch * problem.kv_heads);
        keys_of_one_head(memory, head / problem.kv_heads, head % problem.kv_heads, task / (problem.batch * problem.kv_heads));
      }
#pragma omp for schedule(static)
      for (int64_t task = 0; task < problem.batch * problem.heads * query_parts; task++) {
        const int64_t head = task / query_parts;
        queries_of_one_head(memory, head / problem.heads, head % problem.heads, task % query_parts);
      }
    }
    weight_sums.store(result);
  }

 private:
  const Problem& problem;
  const BackwardResult& result;
  const int64_t width, value_width, hidden2, groups, tiles;
  const int64_t u_numbers, query_numbers;  // of what each part of the keys has for itself
  const int64_t parts, query_parts;  // of the keys and of the queries of a head, to be worked on side by side
  const WeightSums weight_sums;
  const QueryBlocks query_blocks;
  // Hold gradients of u, [B, H, Tq, h1], and in residual mode of the scaled queries, [B, H, Tq, D], of each part of the keys
  Buffer partial_u, partial_query;

  // Returns parts enough for the threads to find work: four tasks each, or one where more would take too much memory
  int64_t parts_of(int64_t heads, int64_t most, int64_t bytes) const {
    const auto with = [&](int64_t tasks) { return std::max<int64_t>(1, std::min<int64_t>(most, (tasks + heads - 1) / heads)); };
    const int64_t few = with(problem.num_threads), affordable = bytes ? PARTS_BYTES * problem.num_threads / bytes : most;
    return std::max(few, std::min(with(4 * problem.num_threads), affordable));
  }

  struct Memory {
    Scratch scratch;
    Real *row, *columns, *net, *back_weights, *w, *grad_w, *values, *grad_values, *weights, *grad_scores, *mask, *sums, *sum_u;
    Real *grad_outputs, *queries, *keys, *key_columns, *grad_keys, *dot_keys, *slopes;
    FirstLayer layer;
    Tail tail;
    explicit Memory(const Backward& f)
        : scratch(f.scratch_size()), layer(f.problem.hidden1, f.problem.head_dim, f.width, scratch.take(f.problem.hidden1 * f.width)) {
      const int64_t h1 = f.problem.hidden1;
      row = scratch.take(LANES * f.widest());
      columns = scratch.take(f.width * BACKWARD_KEYS);
      net = scratch.take(PairNetwork::size(h1, f.hidden2));
      back_weights = scratch.take(h1 * f.hidden2);
      w = scratch.take(h1 * BACKWARD_KEYS);
      grad_w = scratch.take(h1 * std::max(BACKWARD_KEYS, TOKENS_AT_ONCE));
      values = scratch.take(f.value_width * BACKWARD_KEYS);
      grad_values = scratch.take(f.value_width * BACKWARD_KEYS);
      weights = scratch.take(BACKWARD_QUERIES * BACKWARD_KEYS);
      grad_scores = scratch.take(BACKWARD_QUERIES * BACKWARD_KEYS);
      mask = scratch.take(2 * BACKWARD_KEYS);
      sums = scratch.take((h1 + 2) * f.hidden2 * LANES);
      sum_u = scratch.take(h1 * LANES);
      keys = scratch.take(f.width * std::max(BACKWARD_KEYS, TOKENS_AT_ONCE));
      grad_keys = scratch.take(f.width * std::max(BACKWARD_KEYS, TOKENS_AT_ONCE));
      grad_outputs = scratch.take(f.value_width * BACKWARD_QUERIES);
      queries = scratch.take(f.problem.residual ? f.width * BACKWARD_QUERIES : 0);
      key_columns = scratch.take(f.problem.residual ? f.width * BACKWARD_KEYS : 0);
      dot_keys = scratch.take(f.problem.residual ? f.width * BACKWARD_KEYS : 0);
      slopes = scratch.take(f.problem.softcap > 0 ? BACKWARD_QUERIES * BACKWARD_KEYS : 0);
    }
  };
  int64_t widest() const { return std::max({width, value_width, round_up(problem.hidden1, LANES)}); }
  int64_t scratch_size() const {
    const int64_t h1 = problem.hidden1;
    return LANES * widest() + PairNetwork::size(h1, hidden2) + h1 * (hidden2 + width + LANES) + (h1 + 2) * hidden2 * LANES +
           BACKWARD_QUERIES * (width + value_width) + BACKWARD_KEYS * (h1 + 2 * value_width + 3 * width + 2 + 3 * BACKWARD_QUERIES) +
           std::max(BACKWARD_KEYS, TOKENS_AT_ONCE) * (h1 + 2 * width) + 32 * LANES;
  }

  // Find where the numbers of a head and a part of its keys begin
  int64_t place(int64_t b, int64_t head, int64_t part) const { return (part * problem.batch + b) * problem.heads + head; }
  Real* u_of(int64_t b, int64_t head, int64_t part) const { return partial_u.data + place(b, head, part) * problem.queries * problem.hidden1; }
  Real* query_of(int64_t b, int64_t head, int64_t part) const { return partial_query.data + place(b, head, part) * problem.queries * width; }

  void keys_of_one_head(Memory& memory, int64_t b, int64_t kv_head, int64_t part) const {
    for (int64_t head = kv_head * groups; head < (kv_head + 1) * groups; head++) {
      std::memset(u_of(b, head, part), 0, sizeof(Real) * problem.queries * problem.hidden1);
      if (problem.residual) std::memset(query_of(b, head, part), 0, sizeof(Real) * problem.queries * width);
      if (!problem.keys_projected) std::memset(weight_sums.of_keys(b, head, part), 0, sizeof(Real) * weight_sums.layer_size);
      std::memset(weight_sums.of_pairs(b, head, part), 0, sizeof(Real) * weight_sums.pair_size);
    }
    for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; tile++) one_tile(memory, b, kv_head, part, tile * BACKWARD_KEYS);
  }

  void one_tile(Memory& memory, int64_t b, int64_t kv_head, int64_t part, int64_t key) const {
    const int64_t n = std::min(BACKWARD_KEYS, problem.keys - key), h1 = problem.hidden1;
    read_transposed(problem.value, problem.value.at(b, kv_head, key), n, problem.value_dim, memory.values, BACKWARD_KEYS, memory.row);
    std::memset(memory.grad_values, 0, sizeof(Real) * BACKWARD_KEYS * value_width);
    Rows keys{nullptr, 0};
    if (!problem.keys_projected) {
      keys = read_rows(problem.key, problem.key.at(b, kv_head, key), n, problem.head_dim, memory.keys);
      std::memset(memory.grad_keys, 0, sizeof(Real) * BACKWARD_KEYS * width);
    }
    if (problem.residual) {
      read_transposed(problem.key, problem.key.at(b, kv_head, key), n, problem.head_dim, memory.key_columns, BACKWARD_KEYS, memory.row);
      std::memset(memory.dot_keys, 0, sizeof(Real) * BACKWARD_KEYS * width);
    }
    for (int64_t g = 0; g < groups; g++) {
      const int64_t head = kv_head * groups + g, set = problem.weight_set(head);
      const bool own_features = problem.weight_sets > 1;
      const PairNetwork net(problem, set, hidden2, memory.net);
      for (int64_t r = 0; r < hidden2; r++)
        for (int64_t c = 0; c < h1; c++) memory.back_weights[c * hidden2 + r] = net.weight2[c * hidden2 + r] * (net.weight3[r] / Real(LOG2_E));
      if (g == 0 || own_features) {
        key_features(problem, b, problem.feature_head(head), key, n, BACKWARD_KEYS, memory.columns, memory.row, memory.w);
        std::memset(memory.grad_w, 0, sizeof(Real) * h1 * BACKWARD_KEYS);
      }
      Real* const sums = weight_sums.of_pairs(b, head, part);
      for (int64_t block = problem.is_causal ? key / BACKWARD_QUERIES : 0; block < query_blocks.per_head; block++) {
        std::memset(memory.sums, 0, sizeof(Real) * (h1 + 2) * hidden2 * LANES);
        queries_of_one_block(memory, net, b, head, part, block, key, n, keys);
        // adds block by block: the error of a sum grows with the number of its summands
        for (int64_t k = 0; k < (h1 + 2) * hidden2; k++) sums[k] += sum_lanes(load(memory.sums + k * LANES));
      }
      if (g == groups - 1 || own_features) {
        if (problem.keys_projected) {
          write_grad_w(memory, b, problem.feature_head(head), key, n);
        } else {
          memory.layer.use(problem.key_weight + set * h1 * problem.head_dim);
          memory.layer.template back<ADD>(memory.grad_w, 1, BACKWARD_KEYS, n, keys, memory.grad_keys, weight_sums.of_keys(b, head, part));
        }
      }
    }
    for (int64_t j = 0; j < n; j++) {
      write_row(result.grad_value, result.grad_value.at(b, kv_head, key + j), problem.value_dim, memory.grad_values + j * value_width);
      if (problem.keys_projected) continue;
      Real* const row = memory.grad_keys + j * width;
      if (problem.residual) add_scaled(memory.dot_keys + j * width, row);
      write_row(result.grad_key, result.grad_key.at(b, kv_head, key + j), problem.head_dim, row);
    }
  }

  // Adds the dot product's share of a gradient [D] to the network's
  INLINE void add_scaled(const Real* share, Real* row) const {
    for (int64_t d = 0; d < width; d++) row[d] += share[d] * Real(problem.residual_scale);
  }

  void write_grad_w(Memory& memory, int64_t b, int64_t w_head, int64_t key, int64_t n) const {
    for (int64_t j = 0; j < n; j++) {
      for (int64_t c = 0; c < problem.hidden1; c++) memory.sum_u[c] = memory.grad_w[c * BACKWARD_KEYS + j];
      write_row(result.grad_key, result.grad_key.at(b, w_head, key + j), problem.hidden1, memory.sum_u);
    }
  }

  void queries_of_one_block(Memory& memory, const PairNetwork& net, int64_t b, int64_t head, int64_t part, int64_t block, int64_t key,
                            int64_t n, Rows keys) const {
    const int64_t first = block * BACKWARD_QUERIES, count = query_blocks.count(block);
    const int64_t seen = problem.is_causal ? std::min(n, first + count - key) : n, columns = round_up(seen, LANES);
    if (seen <= 0) return;
    const bool one_mask = problem.mask.data && (problem.mask.strides[2] == 0 || problem.queries == 1);
    Coverage coverage = EVERYTHING;
    if (one_mask) coverage = read_mask(problem.mask, problem.mask.at(b, head, 0), key, n, memory.mask);
    if (coverage == NOTHING) return;
    const QueryBlock q = query_blocks.at(b, head, block);
    const int64_t h1 = problem.hidden1;

    const Rows grad_output = read_rows(result.grad_output, result.grad_output.at(b, head, first), count, problem.value_dim, memory.grad_outputs);
    Rows queries{nullptr, 0};
    multiply_accurately(grad_output.data, grad_output.stride, count, problem.value_dim, memory.values, BACKWARD_KEYS, memory.grad_scores, BACKWARD_KEYS, columns);
    if (problem.residual) {
      queries = read_rows(problem.query, problem.query.at(b, head, first), count, problem.head_dim, memory.queries);
      multiply<REPLACE>(queries.data, queries.stride, 1, count, problem.head_dim, memory.key_columns, BACKWARD_KEYS, memory.weights, BACKWARD_KEYS, columns);
      for (int64_t i = 0; i < count; i++) scale_products(problem, memory.weights + i * BACKWARD_KEYS, columns);
      if (problem.softcap > 0) note_slopes(memory, count, columns);
    }
    Real* const grad_u = u_of(b, head, part);
    const DropoutColumns dropout(problem, b, head, key);
    for (int64_t i = 0; i < count; i++) {
      const int64_t query = first + i, row_keys = problem.is_causal ? std::min(n, query + 1 - key) : n;
      Real *p = memory.weights + i * BACKWARD_KEYS, *ds = memory.grad_scores + i * BACKWARD_KEYS;
      Coverage row_coverage = row_keys <= 0 ? NOTHING : coverage;
      Real* mask = memory.mask;
      if (row_coverage != NOTHING && problem.mask.data && (!one_mask || (coverage == SOME && row_keys < n))) {
        mask += BACKWARD_KEYS;  // the row's own, cut at its last key
        row_coverage = read_mask(problem.mask, problem.mask.at(b, head, query), key, row_keys, mask);
      }
      int64_t done = 0;
      if (row_coverage != NOTHING) {
        std::memset(memory.sum_u, 0, sizeof(Real) * h1 * LANES);
        pairs_of_one_query(memory, net, q, dropout, query, i, key, row_keys, row_coverage == SOME ? mask : nullptr, p, ds);
        for (int64_t c = 0; c < h1; c++) grad_u[query * h1 + c] += sum_lanes(load(memory.sum_u + c * LANES));
        done = round_up(row_keys, LANES);
        if (result.grad_mask) std::memcpy(result.grad_mask + ((b * problem.heads + head) * problem.queries + query) * problem.keys + key, ds, sizeof(Real) * row_keys);
      }
      for (int64_t j = done; j < columns; j++) p[j] = ds[j] = 0;
    }
    multiply<ADD>(memory.weights, 1, BACKWARD_KEYS, seen, count, grad_output.data, grad_output.stride, memory.grad_values, value_width, value_width);
    if (problem.residual) {
      if (problem.softcap > 0)
        for (int64_t i = 0; i < count; i++)
          for (int64_t j = i * BACKWARD_KEYS; j < i * BACKWARD_KEYS + columns; j += LANES)
            store(memory.grad_scores + j, load(memory.grad_scores + j) * load(memory.slopes + j));
      multiply<ADD>(memory.grad_scores, 1, BACKWARD_KEYS, seen, count, queries.data, queries.stride, memory.dot_keys, width, width);
      multiply<ADD>(memory.grad_scores, BACKWARD_KEYS, 1, count, seen, keys.data, keys.stride, query_of(b, head, part) + first * width, width, width);
    }
  }

  // Notes the slopes of the cap on dot products: 1 - tanh^2, of the products as they come out of it
  void note_slopes(Memory& memory, int64_t count, int64_t columns) const {
    const Real inverse = Real(1 / (problem.softcap * LOG2_E));
    for (int64_t i = 0; i < count; i++)
      for (int64_t j = i * BACKWARD_KEYS; j < i * BACKWARD_KEYS + columns; j += LANES) {
        const Vec t = load(memory.weights + j) * inverse;
        store(memory.slopes + j, (Real(1) - t) * (Real(1) + t));
      }
  }

  // Makes a query's weights p and gradients of the scores ds (in: of the weights), and what they give to w, u and the network
  void pairs_of_one_query(Memory& memory, const PairNetwork& net, const QueryBlock& q, const DropoutColumns& dropout, int64_t query, int64_t i,
                          int64_t key, int64_t n, const Real* bias, Real* p, Real* ds) const {
    const QueryRow row{q.minus_u + i, q.bias2 + i, BACKWARD_QUERIES};
    const Real pivot = q.pivot[i], inverse = q.inverse[i], delta = q.delta[i];
    Real keep[BACKWARD_KEYS];
    if (problem.has_dropout) {
      const Real kept = problem.drop_below < 65536 ? Real(65536.0 / (65536 - problem.drop_below)) : 0;
      for (int64_t j = 0; j < BACKWARD_KEYS; j++) keep[j] = kept;
      drop(dropout, query, key % DROPOUT_COLUMNS, n, keep);
    }
    constexpr int S = backward_vectors<R2>();
    int64_t j = 0;
    auto strip = [&](auto size, const Real* strip_bias) INLINE_LAMBDA {
      constexpr int N = size;
      Vec a[R2][N], weight[N], grad[N];
      const bool single = net.hidden2 == R2;
      if (single) {
        second_layer<R2, N>(net, row, 0, memory.w + j, BACKWARD_KEYS, a);
        unroll<N>([&](auto s) INLINE_LAMBDA { weight[s] = Vec{}; });
        unroll<R2>([&](auto r) INLINE_LAMBDA {
          const Vec w3 = splat(net.weight3[r]);
          unroll<N>([&](auto s) INLINE_LAMBDA { weight[s] += w3 * relu(a[r][s]); });
        });
        if (problem.residual) unroll<N>([&](auto s) INLINE_LAMBDA { weight[s] += load(p + j + s * LANES); });
        if (strip_bias) unroll<N>([&](auto s) INLINE_LAMBDA { weight[s] = masked(weight[s], load(strip_bias + s * LANES)); });
        subtract_pivot<N>(pivot, weight);
      } else {
        score_strip<R2, N>(net, row, memory.w + j, BACKWARD_KEYS, problem.residual ? p + j : nullptr, strip_bias, pivot, weight);
      }
      unroll<N>([&](auto s) INLINE_LAMBDA {
        weight[s] = exp2(weight[s]) * inverse;
        grad[s] = load(ds + j + s * LANES);
        Vec dropped = weight[s];
        if (problem.has_dropout) {
          const Vec factor = load(keep + j + s * LANES);
          grad[s] *= factor;
          dropped *= factor;
        }
        store(p + j + s * LANES, dropped);
        grad[s] = weight[s] * (grad[s] - delta);
        store(ds + j + s * LANES, grad[s]);
      });
      for (int64_t r0 = 0; r0 < net.hidden2; r0 += R2) {
        if (!single) second_layer<R2, N>(net, row, r0, memory.w + j, BACKWARD_KEYS, a);
        network<N>(memory, net, row, r0, j, grad, a);
      }
      j += N * LANES;
    };
    while (j + S * LANES <= n) strip(std::integral_constant<int, S>{}, bias ? bias + j : nullptr);
    if constexpr (S > 1)
      while (j + LANES <= n) strip(std::integral_constant<int, 1>{}, bias ? bias + j : nullptr);
    if (j < n) strip(std::integral_constant<int, 1>{}, bias ? bias + j : memory.tail.window(n - j));
  }

  // Goes back through both layers, units r0 to r0 + R2 of the second: a comes in as their sums before the ReLU
  template <int N>
  INLINE void network(Memory& memory, const PairNetwork& net, const QueryRow& row, int64_t r0, int64_t j, const Vec (&grad)[N],
                      Vec (&a)[R2][N]) const {
    Real* const bias_sums = memory.sums + (net.hidden1 * net.hidden2 + r0) * LANES;
    Real* const output_sums = bias_sums + net.hidden2 * LANES;
    unroll<R2>([&](auto r) INLINE_LAMBDA {
      Vec bias_sum = load(bias_sums + r * LANES), output_sum = load(output_sums + r * LANES);
      unroll<N>([&](auto s) INLINE_LAMBDA {
        output_sum += grad[s] * relu(a[r][s]);
        a[r][s] = where_positive(a[r][s], grad[s]);
        bias_sum += a[r][s];
      });
      store(bias_sums + r * LANES, bias_sum);
      store(output_sums + r * LANES, output_sum);
    });
    for (int64_t c = 0; c < net.hidden1; c++) {
      const Vec minus_u = splat(row.minus_u[c * row.ld]);
      Real* const w = memory.w + c * BACKWARD_KEYS + j;
      Real* const grad_w = memory.grad_w + c * BACKWARD_KEYS + j;
      const Real* const weight = memory.back_weights + c * net.hidden2 + r0;
      Real* const weight_sums = memory.sums + (c * net.hidden2 + r0) * LANES;
      Vec hidden[N], back[N];
      unroll<N>([&](auto s) INLINE_LAMBDA {
        hidden[s] = relu(load(w + s * LANES) - minus_u);
        back[s] = Vec{};
      });
      unroll<R2>([&](auto r) INLINE_LAMBDA {
        const Vec x = splat(weight[r]);
        Vec sum = load(weight_sums + r * LANES);
        unroll<N>([&](auto s) INLINE_LAMBDA {
          back[s] += x * a[r][s];
          sum += a[r][s] * hidden[s];
        });
        store(weight_sums + r * LANES, sum);
      });
      Vec sum_u = load(memory.sum_u + c * LANES);
      unroll<N>([&](auto s) INLINE_LAMBDA {
        back[s] = where_positive(hidden[s], back[s]);
        sum_u += back[s];
        store(grad_w + s * LANES, load(grad_w + s * LANES) + back[s]);
      });
      store(memory.sum_u + c * LANES, sum_u);
    }
  }

  // Goes from the gradient of u to those of the queries and of their first layer
  void queries_of_one_head(Memory& memory, int64_t b, int64_t head, int64_t query_part) const {
    const int64_t h1 = problem.hidden1, blocks = (problem.queries + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
    Real* const sums = weight_sums.of_queries(b, head, query_part);
    if (!problem.queries_projected) {
      std::memset(sums, 0, sizeof(Real) * weight_sums.layer_size);
      memory.layer.use(problem.query_weight + problem.weight_set(head) * h1 * problem.head_dim);
    }
    for (int64_t block = blocks * query_part / query_parts; block < blocks * (query_part + 1) / query_parts; block++) {
      const int64_t first = block * TOKENS_AT_ONCE, n = std::min(TOKENS_AT_ONCE, problem.queries - first);
      Real* const grad_u = memory.grad_w;
      std::memcpy(grad_u, u_of(b, head, 0) + first * h1, sizeof(Real) * n * h1);
      for (int64_t part = 1; part < parts; part++) {
        const Real* const more = u_of(b, head, part) + first * h1;
        for (int64_t k = 0; k < n * h1; k++) grad_u[k] += more[k];
      }
      if (problem.queries_projected) {
        for (int64_t i = 0; i < n; i++) write_row(result.grad_query, result.grad_query.at(b, head, first + i), h1, grad_u + i * h1);
        continue;
      }
      const Rows queries = read_rows(problem.query, problem.query.at(b, head, first), n, problem.head_dim, memory.keys);
      memory.layer.template back<REPLACE>(grad_u, h1, 1, n, queries, memory.grad_keys, sums);
      for (int64_t i = 0; i < n; i++) {
        Real* const row = memory.grad_keys + i * width;
        if (problem.residual)
          for (int64_t part = 0; part < parts; part++) add_scaled(query_of(b, head, part) + (first + i) * width, row);
        write_row(result.grad_query, result.grad_query.at(b, head, first + i), problem.head_dim, row);
      }
    }
  }
};
