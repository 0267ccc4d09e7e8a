// Backward: tiles of keys against blocks of queries. Everything is computed again from u, w and each row's pivot and
// sum: with those very numbers, the weights are the forward pass's to the last bit.
//
// The sums over pairs leave weight3 out: with k_r = [a_r > 0] they are sum k_r ds h_c, sum k_r ds and sum ds relu(a_r), of
// which the first two, times w3_r, are the gradients of weight2 and bias2.
#pragma once

#include "forward.h"

constexpr int64_t BACKWARD_KEYS = 64, BACKWARD_QUERIES = 32;

template <int R2>
constexpr int backward_vectors() {
  return NUM_REGISTERS == 32 ? (R2 == 8 ? 2 : 4) : 1;
}

struct BackwardResult {
  Tensor output, grad_output;  // [B, H, Tq, Dv]
  const Real* softmax;         // [B, H, Tq, 2], as ForwardResult has it
  Real* grad_value;            // [B, Hkv, Tk, Dv], contiguous, as all that follows
  Real* grad_u;                // [B, H, Tq, h1]
  Real* grad_w;                // [B, Hw, Tk, h1]
  Real* grad_weight2;          // [weight_sets, h2, h1]
  Real* grad_bias2;            // [weight_sets, h2]
  Real* grad_weight3;          // [weight_sets, h2]
  Real* grad_query;            // residual mode: [B, H, Tq, D], of the dot product alone
  Real* grad_key;              // residual mode: [B, Hkv, Tk, D], of the dot product alone
  Real* grad_mask;             // [B, H, Tq, Tk], zeros, or null
};

template <int R2>
class Backward {
 public:
  Backward(const Problem& problem, const BackwardResult& result)
      : problem(problem), result(result), width(round_up(problem.head_dim, LANES)),
        value_width(round_up(problem.value_dim, LANES)), hidden2(round_up(problem.hidden2, R2)),
        groups(problem.heads / problem.kv_heads), tiles((problem.keys + BACKWARD_KEYS - 1) / BACKWARD_KEYS),
        blocks((problem.queries + BACKWARD_QUERIES - 1) / BACKWARD_QUERIES),
        parts(std::max<int64_t>(1, std::min<int64_t>(tiles, (4 * problem.num_threads + problem.batch * problem.kv_heads - 1) /
                                                                (problem.batch * problem.kv_heads)))),
        tasks(problem.batch * problem.kv_heads * parts),
        sums(round_up((problem.hidden1 + 2) * hidden2, LANES)),
        prepared(block_numbers() * problem.batch * problem.heads * blocks),
        partial_u(problem.batch * problem.heads * problem.queries * problem.hidden1 * (parts > 1 ? parts : 0)),
        partial_query(problem.residual && parts > 1 ? problem.batch * problem.heads * problem.queries * problem.head_dim * parts : 0),
        partial_sums(tasks * groups * sums) {}

  void run() {
    prepare();
#pragma omp parallel num_threads(problem.num_threads)
    {
      Memory memory(*this);
      // under a causal mask the first keys have the most queries: they go first
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; task++) {
        const int64_t pairs = problem.batch * problem.kv_heads, part = task / pairs, kv_head = task % pairs % problem.kv_heads;
        keys_of_one_head(memory, task % pairs / problem.kv_heads, kv_head, part);
      }
    }
    collect();
  }

 private:
  const Problem& problem;
  const BackwardResult& result;
  const int64_t width, value_width, hidden2, groups, tiles, blocks;
  const int64_t parts;  // of the keys of a head, to be worked on side by side
  const int64_t tasks, sums;
  // Per block of queries: minus_u [h1, n], the second layer's bias [h2, n], the softmax's pivot [n] and 1 / sum [n],
  // grad_output . output [n],
  // grad_output [n, Dv] and, in residual mode, the queries [n, D]
  Buffer prepared;
  Buffer partial_u, partial_query, partial_sums;

  int64_t block_numbers() const {
    return (problem.hidden1 + hidden2 + 3 + value_width + (problem.residual ? width : 0)) * BACKWARD_QUERIES;
  }
  struct QueryBlock {
    Real *minus_u, *bias2, *pivot, *inverse, *delta, *grad_output, *query;
  };
  QueryBlock query_block(int64_t b, int64_t head, int64_t block) const {
    constexpr int64_t n = BACKWARD_QUERIES;
    Real* p = prepared.data + ((b * problem.heads + head) * blocks + block) * block_numbers();
    Real *const bias2 = p + problem.hidden1 * n, *const rows = bias2 + hidden2 * n;
    return {p, bias2, rows, rows + n, rows + 2 * n, rows + 3 * n, rows + (3 + value_width) * n};
  }

  struct Memory {
    Scratch scratch;
    Real *row, *columns, *net, *back_weights, *w, *grad_w, *values, *grad_values, *weights, *grad_scores, *mask, *sums, *sum_u;
    Real *keys, *key_columns, *grad_keys, *queries;
    Tail tail;
    explicit Memory(const Backward& f) : scratch(f.scratch_size()) {
      const int64_t h1 = f.problem.hidden1;
      row = scratch.take(LANES * std::max(f.width, f.value_width));
      columns = scratch.take(f.width * BACKWARD_KEYS);
      net = scratch.take(PairNetwork::size(h1, f.hidden2));
      back_weights = scratch.take(h1 * f.hidden2);
      w = scratch.take(h1 * BACKWARD_KEYS);
      grad_w = scratch.take(h1 * BACKWARD_KEYS);
      values = scratch.take(f.value_width * BACKWARD_KEYS);
      grad_values = scratch.take(f.value_width * BACKWARD_KEYS);
      weights = scratch.take(BACKWARD_QUERIES * BACKWARD_KEYS);
      grad_scores = scratch.take(BACKWARD_QUERIES * BACKWARD_KEYS);
      mask = scratch.take(2 * BACKWARD_KEYS);
      sums = scratch.take((h1 + 2) * f.hidden2 * LANES);
      sum_u = scratch.take(h1 * LANES);
      const int64_t whole = f.problem.residual ? f.width * BACKWARD_KEYS : 0;
      keys = scratch.take(whole), key_columns = scratch.take(whole), grad_keys = scratch.take(whole);
    }
  };
  int64_t scratch_size() const {
    const int64_t h1 = problem.hidden1;
    return LANES * std::max(width, value_width) + PairNetwork::size(h1, hidden2) + h1 * hidden2 + (h1 + 2) * hidden2 * LANES + h1 * LANES +
           BACKWARD_KEYS * (2 * h1 + 2 * value_width + 4 * width + 2 + 2 * BACKWARD_QUERIES) + 32 * LANES;
  }

  void prepare() const {
    constexpr int64_t n = BACKWARD_QUERIES;
#pragma omp parallel num_threads(problem.num_threads)
    {
      Scratch scratch(LANES * std::max(width, value_width) + width * n + value_width + PairNetwork::size(problem.hidden1, hidden2) + 8 * LANES);
      Real *row = scratch.take(LANES * std::max(width, value_width)), *columns = scratch.take(width * n);
      Real *output = scratch.take(value_width), *room = scratch.take(PairNetwork::size(problem.hidden1, hidden2));
#pragma omp for schedule(static)
      for (int64_t task = 0; task < problem.batch * problem.heads * blocks; task++) {
        const int64_t block = task % blocks, head = task / blocks % problem.heads, b = task / blocks / problem.heads;
        const int64_t first = block * n, count = std::min(n, problem.queries - first), set = problem.weight_set(head);
        const QueryBlock q = query_block(b, head, block);
        const PairNetwork net(problem, set, hidden2, room);
        read_transposed(problem.query, problem.query.at(b, head, first), count, problem.head_dim, columns, n, row);
        project(problem.query_weight + set * problem.hidden1 * problem.head_dim, problem.query_bias + set * problem.hidden1,
                problem.hidden1, problem.head_dim, columns, n, count, q.minus_u, n);
        prepare_queries(net, q.minus_u, n, count, q.bias2);
        for (int64_t i = 0; i < count; i++) {
          Real* grad = q.grad_output + i * value_width;
          read_row(result.grad_output, result.grad_output.at(b, head, first + i), problem.value_dim, grad);
          read_row(result.output, result.output.at(b, head, first + i), problem.value_dim, output);
          for (int64_t d = problem.value_dim; d < value_width; d++) grad[d] = output[d] = 0;
          // in double: its error would be shared by all weights of the row, and add up in what they sum to
          double delta[8] = {};
          for (int64_t d = 0; d < problem.value_dim; d++) delta[d % 8] += double(grad[d]) * output[d];
          q.delta[i] = Real((delta[0] + delta[1]) + (delta[2] + delta[3]) + ((delta[4] + delta[5]) + (delta[6] + delta[7])));
          const Real* const softmax = result.softmax + ((b * problem.heads + head) * problem.queries + first + i) * 2;
          q.pivot[i] = softmax[0], q.inverse[i] = softmax[1];
          if (problem.residual) {
            Real* query = q.query + i * width;
            read_row(problem.query, problem.query.at(b, head, first + i), problem.head_dim, query);
            for (int64_t d = 0; d < width; d++) query[d] = d < problem.head_dim ? query[d] : 0;
          }
        }
      }
    }
  }

  Real* u_of(int64_t part, int64_t b, int64_t head) const {
    const int64_t size = problem.queries * problem.hidden1;
    Real* base = parts > 1 ? partial_u.data + part * problem.batch * problem.heads * size : result.grad_u;
    return base + (b * problem.heads + head) * size;
  }
  Real* query_of(int64_t part, int64_t b, int64_t head) const {
    const int64_t size = problem.queries * problem.head_dim;
    Real* base = parts > 1 ? partial_query.data + part * problem.batch * problem.heads * size : result.grad_query;
    return base + (b * problem.heads + head) * size;
  }

  void keys_of_one_head(Memory& memory, int64_t b, int64_t kv_head, int64_t part) const {
    const int64_t h1 = problem.hidden1;
    for (int64_t g = 0; g < groups; g++) {
      std::memset(u_of(part, b, kv_head * groups + g), 0, sizeof(Real) * problem.queries * h1);
      if (problem.residual) std::memset(query_of(part, b, kv_head * groups + g), 0, sizeof(Real) * problem.queries * problem.head_dim);
    }
    Real* const task_sums = partial_sums.data + ((b * problem.kv_heads + kv_head) * parts + part) * groups * sums;
    std::memset(task_sums, 0, sizeof(Real) * groups * sums);
    const int64_t first_tile = tiles * part / parts, last_tile = tiles * (part + 1) / parts;
    for (int64_t tile = first_tile; tile < last_tile; tile++) {
      const int64_t key = tile * BACKWARD_KEYS, n = std::min(BACKWARD_KEYS, problem.keys - key);
      read_transposed(problem.value, problem.value.at(b, kv_head, key), n, problem.value_dim, memory.values, BACKWARD_KEYS, memory.row);
      std::memset(memory.grad_values, 0, sizeof(Real) * BACKWARD_KEYS * value_width);
      if (problem.residual) {
        read_transposed(problem.key, problem.key.at(b, kv_head, key), n, problem.head_dim, memory.key_columns, BACKWARD_KEYS, memory.row);
        for (int64_t j = 0; j < n; j++) {
          read_row(problem.key, problem.key.at(b, kv_head, key + j), problem.head_dim, memory.keys + j * width);
          for (int64_t d = problem.head_dim; d < width; d++) memory.keys[j * width + d] = 0;
        }
        std::memset(memory.grad_keys, 0, sizeof(Real) * BACKWARD_KEYS * width);
      }
      for (int64_t g = 0; g < groups; g++) {
        const int64_t head = kv_head * groups + g, set = problem.weight_set(head), w_head = problem.feature_head(head);
        const PairNetwork net(problem, set, hidden2, memory.net);
        for (int64_t r = 0; r < hidden2; r++)
          for (int64_t c = 0; c < h1; c++) memory.back_weights[c * hidden2 + r] = net.weight2[c * hidden2 + r] * (net.weight3[r] / Real(LOG2_E));
        if (g == 0 || problem.weight_sets > 1) {
          features(memory, b, head, key, n);
          std::memset(memory.grad_w, 0, sizeof(Real) * h1 * BACKWARD_KEYS);
        }
        std::memset(memory.sums, 0, sizeof(Real) * (h1 + 2) * hidden2 * LANES);
        for (int64_t block = problem.is_causal ? key / BACKWARD_QUERIES : 0; block < blocks; block++)
          queries_of_one_block(memory, net, b, head, part, block, key, n);
        for (int64_t k = 0; k < (h1 + 2) * hidden2; k++) task_sums[g * sums + k] += sum_lanes(load(memory.sums + k * LANES));
        if (g == groups - 1 || problem.weight_sets > 1) {
          Real* out = result.grad_w + ((b * problem.feature_heads() + w_head) * problem.keys + key) * h1;
          for (int64_t j = 0; j < n; j++)
            for (int64_t c = 0; c < h1; c++) out[j * h1 + c] = memory.grad_w[c * BACKWARD_KEYS + j];
        }
      }
      for (int64_t j = 0; j < n; j++) {
        const int64_t place = (b * problem.kv_heads + kv_head) * problem.keys + key + j;
        std::memcpy(result.grad_value + place * problem.value_dim, memory.grad_values + j * value_width, sizeof(Real) * problem.value_dim);
        if (problem.residual)
          for (int64_t d = 0; d < problem.head_dim; d++)
            result.grad_key[place * problem.head_dim + d] = memory.grad_keys[j * width + d] * Real(problem.residual_scale);
      }
    }
  }

  // w of a tile, as project_keys does it for the forward pass
  void features(Memory& memory, int64_t b, int64_t head, int64_t key, int64_t n) const {
    const int64_t h1 = problem.hidden1, set = problem.weight_set(head);
    if (problem.keys_projected) {
      read_transposed(problem.key, problem.key.at(b, problem.feature_head(head), key), n, h1, memory.w, BACKWARD_KEYS, memory.row);
      return;
    }
    const Real* columns = memory.key_columns;
    if (!problem.residual) {
      read_transposed(problem.key, problem.key.at(b, head / groups, key), n, problem.head_dim, memory.columns, BACKWARD_KEYS, memory.row);
      columns = memory.columns;
    }
    project(problem.key_weight + set * h1 * problem.head_dim, problem.key_bias + set * h1, h1, problem.head_dim, columns, BACKWARD_KEYS, n,
            memory.w, BACKWARD_KEYS);
  }

  void queries_of_one_block(Memory& memory, const PairNetwork& net, int64_t b, int64_t head, int64_t part, int64_t block, int64_t key,
                            int64_t n) const {
    const int64_t first = block * BACKWARD_QUERIES, count = std::min(BACKWARD_QUERIES, problem.queries - first);
    const int64_t seen = problem.is_causal ? std::min(n, first + count - key) : n, columns = round_up(seen, LANES);
    if (seen <= 0) return;
    const bool one_mask = problem.mask.data && problem.mask.strides[2] == 0;
    Coverage coverage = EVERYTHING;
    if (one_mask) coverage = read_mask(problem.mask, problem.mask.at(b, head, 0), key, n, memory.mask);
    if (coverage == NOTHING) return;
    const QueryBlock q = query_block(b, head, block);
    const int64_t h1 = problem.hidden1;

    for (int64_t i = 0; i < count; i++) std::memset(memory.grad_scores + i * BACKWARD_KEYS, 0, sizeof(Real) * columns);
    multiply(q.grad_output, value_width, 1, count, problem.value_dim, memory.values, BACKWARD_KEYS, memory.grad_scores, BACKWARD_KEYS, columns);
    if (problem.residual) {
      for (int64_t i = 0; i < count; i++) std::memset(memory.weights + i * BACKWARD_KEYS, 0, sizeof(Real) * columns);
      multiply(q.query, width, 1, count, problem.head_dim, memory.key_columns, BACKWARD_KEYS, memory.weights, BACKWARD_KEYS, columns);
      const Real scale = Real(problem.residual_scale * LOG2_E);
      for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < columns; j += LANES) {
          Real* p = memory.weights + i * BACKWARD_KEYS + j;
          store(p, load(p) * scale);
        }
    }
    Real* const grad_u = u_of(part, b, head);
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
    multiply(memory.weights, 1, BACKWARD_KEYS, seen, count, q.grad_output, value_width, memory.grad_values, value_width, value_width);
    if (problem.residual) {
      multiply(memory.grad_scores, 1, BACKWARD_KEYS, seen, count, q.query, width, memory.grad_keys, width, width);
      Real* out = query_of(part, b, head) + first * problem.head_dim;
      grad_queries(memory, count, seen, out);
    }
  }

  // Residual mode: out [count, D] += scale * ds k
  void grad_queries(Memory& memory, int64_t count, int64_t seen, Real* out) const {
    for (int64_t i = 0; i < count; i++) {
      Real* row = memory.row;
      std::memset(row, 0, sizeof(Real) * width);
      multiply(memory.grad_scores + i * BACKWARD_KEYS, BACKWARD_KEYS, 1, 1, seen, memory.keys, width, row, width, width);
      for (int64_t d = 0; d < problem.head_dim; d++) out[i * problem.head_dim + d] += row[d] * Real(problem.residual_scale);
    }
  }

  // Weights p and gradients of the scores ds (in: of the weights) of one query, and what they give to w, u and the network
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
        unroll<N>([&](auto s) INLINE_LAMBDA { weight[s] = splat(-pivot); });
        unroll<R2>([&](auto r) INLINE_LAMBDA {
          const Vec w3 = splat(net.weight3[r]);
          unroll<N>([&](auto s) INLINE_LAMBDA { weight[s] += w3 * relu(a[r][s]); });
        });
        if (problem.residual) unroll<N>([&](auto s) INLINE_LAMBDA { weight[s] += load(p + j + s * LANES); });
        if (strip_bias) unroll<N>([&](auto s) INLINE_LAMBDA { weight[s] += load(strip_bias + s * LANES); });
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

  // Back through both layers, units r0 to r0 + R2 of the second: a comes in as their sums before the ReLU
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

  // Adds up what the tasks left, always in the same order
  void collect() const {
    if (parts > 1) {
      add_parts(partial_u.data, problem.batch * problem.heads * problem.queries * problem.hidden1, result.grad_u);
      if (problem.residual) add_parts(partial_query.data, problem.batch * problem.heads * problem.queries * problem.head_dim, result.grad_query);
    }
    const int64_t h1 = problem.hidden1, h2 = problem.hidden2;
    for (int64_t set = 0; set < problem.weight_sets; set++)
      for (int64_t r = 0; r < h2; r++) {
        const int64_t place = set * h2 + r;
        const Real w3 = problem.weight3[place];
        for (int64_t c = 0; c < h1; c++) result.grad_weight2[place * h1 + c] = total(set, c * hidden2 + r) * w3;
        result.grad_bias2[place] = total(set, h1 * hidden2 + r) * w3;
        result.grad_weight3[place] = total(set, (h1 + 1) * hidden2 + r);
      }
  }

  // One of the network's sums over everything that shares a set of weights
  Real total(int64_t set, int64_t index) const {
    double sum = 0;
    for (int64_t task = 0; task < tasks; task++)
      for (int64_t g = 0; g < groups; g++)
        if (problem.weight_set(task / parts % problem.kv_heads * groups + g) == set) sum += partial_sums.data[(task * groups + g) * sums + index];
    return Real(sum);
  }

  void add_parts(const Real* from, int64_t size, Real* to) const {
#pragma omp parallel for num_threads(problem.num_threads) schedule(static)
    for (int64_t k = 0; k < size; k++) {
      Real sum = from[k];
      for (int64_t part = 1; part < parts; part++) sum += from[part * size + k];
      to[k] = sum;
    }
  }
};
