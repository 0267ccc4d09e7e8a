// Computes the forward pass by blocks of queries against tiles of keys, with the softmax's normaliser kept as a running sum.
#pragma once

#include <algorithm>
#include <cmath>

#include "dropout.h"
#include "matmul.h"
#include "scores.h"

constexpr int64_t QUERY_BLOCK = 64;
constexpr int64_t ROW_GROUP = 8;

// Bound sums of weights that are taken as they are; outside, the row's pivot is moved (a sum of 2^64 is far from overflow, and
// one of 2^-64 far from where single weights would be lost)
constexpr Real LARGEST_SUM = Real(18446744073709551616.0), SMALLEST_SUM = 1 / LARGEST_SUM;

// Computes u of n queries, which is what they contribute to the first layer: out [h1, ld]. `columns` is room for [D, ld]
// numbers and `row` for LANES queries.
static void query_features(const Problem& problem, int64_t b, int64_t head, int64_t first, int64_t n, int64_t ld, Real* columns,
                           Real* row, Real* out) {
  const int64_t h1 = problem.hidden1, width = problem.head_dim, set = problem.weight_set(head);
  const char* const data = problem.query.at(b, head, first);
  if (problem.queries_projected) return read_transposed(problem.query, data, n, h1, out, ld, row);
  read_transposed(problem.query, data, n, width, columns, ld, row);
  project(problem.query_weight + set * h1 * width, problem.query_bias + set * h1, h1, width, columns, ld, n, out, ld);
}

// Computes w of n keys, which is what they contribute to the first layer: out [h1, ld]. `head` is one of w's. `columns` is
// room for [D, ld] numbers and `row` for LANES keys.
static void key_features(const Problem& problem, int64_t b, int64_t head, int64_t first, int64_t n, int64_t ld, Real* columns,
                         Real* row, Real* out) {
  const int64_t h1 = problem.hidden1, width = problem.key_width();
  if (problem.keys_projected) return read_transposed(problem.key, problem.key.at(b, head, first), n, width, out, ld, row);
  const bool own = problem.weight_sets > 1;
  const int64_t key_head = own ? head / (problem.heads / problem.kv_heads) : head, set = own ? head : 0;
  read_transposed(problem.key, problem.key.at(b, key_head, first), n, width, columns, ld, row);
  project(problem.key_weight + set * h1 * width, problem.key_bias + set * h1, h1, width, columns, ld, n, out, ld);
}

// Lay out w of all keys, tile by tile [B, Hw, tiles, h1, KEY_TILE], made once where several blocks of queries want it
INLINE int64_t key_tiles(const Problem& problem) { return (problem.keys + KEY_TILE - 1) / KEY_TILE; }
INLINE bool prepares_features(const Problem& problem) {
  return problem.queries > QUERY_BLOCK || problem.feature_heads() < problem.heads;
}
INLINE int64_t feature_place(const Problem& problem, int64_t b, int64_t head, int64_t tile) {
  return ((b * problem.feature_heads() + head) * key_tiles(problem) + tile) * problem.hidden1 * KEY_TILE;
}
static int64_t feature_numbers(const Problem& problem) {
  return prepares_features(problem) ? feature_place(problem, problem.batch, 0, 0) : 0;
}

static void prepare_features(const Problem& problem, Real* features) {
  if (!prepares_features(problem)) return;
  const int64_t tiles = key_tiles(problem), heads = problem.feature_heads();
#pragma omp parallel num_threads(problem.num_threads)
  {
    const int64_t padded = round_up(problem.key_width(), LANES);
    Scratch scratch(padded * LANES + padded * KEY_TILE);
    Real *row = scratch.take(padded * LANES), *columns = scratch.take(padded * KEY_TILE);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < problem.batch * heads * tiles; task++) {
      const int64_t tile = task % tiles, first = tile * KEY_TILE, head = task / tiles % heads, b = task / tiles / heads;
      key_features(problem, b, head, first, std::min(KEY_TILE, problem.keys - first), KEY_TILE, columns, row,
                   features + feature_place(problem, b, head, tile));
    }
  }
}

// Holds a head's values as rows of whole vectors: where they lie if they lie so, else copied tile by tile into a thread's
// memory, which keeps them for the next block of queries while they fit into its share of the cache.
class HeadValues {
 public:
  static constexpr int64_t CACHE_BYTES = 512 * 1024;

  explicit HeadValues(const Problem& problem)
      : problem(problem), width(round_up(problem.value_dim, LANES)), in_place(lies_as_rows(problem.value, problem.value_dim)),
        keeps(!in_place && key_tiles(problem) <= 64 && key_tiles(problem) * KEY_TILE * width * int64_t(sizeof(Real)) <= CACHE_BYTES),
        scratch(in_place ? 0 : (keeps ? key_tiles(problem) : 1) * KEY_TILE * width), room(scratch.take(0)) {}

  Rows tile(int64_t b, int64_t kv_head, int64_t key) {
    const char* const data = problem.value.at(b, kv_head, key);
    const int64_t n = std::min(KEY_TILE, problem.keys - key);
    if (in_place || !keeps) return read_rows(problem.value, data, n, problem.value_dim, room);
    if (head != b * problem.kv_heads + kv_head) head = b * problem.kv_heads + kv_head, kept = 0;
    const uint64_t bit = uint64_t(1) << (key / KEY_TILE);
    if (!(kept & bit)) read_rows(problem.value, data, n, problem.value_dim, room + key * width);
    kept |= bit;
    return {room + key * width, width};
  }

 private:
  const Problem& problem;
  const int64_t width;
  const bool in_place, keeps;
  Scratch scratch;
  Real* const room;
  int64_t head = -1;
  uint64_t kept = 0;  // tiles
};

// Writes 2^(score - pivot) of one query and n keys into p, zeros up to the next multiple of LANES; returns their sum
template <int R2>
static Real exp_scores(const PairNetwork& net, const QueryRow& row, const Real* w, bool residual, const Real* bias,
                       const Tail& tail, int64_t n, Real pivot, Real* p) {
  Vec total = Vec{};
  int64_t j = 0;
  auto strip = [&](auto size, const Real* strip_bias) INLINE_LAMBDA {
    Vec score[size];
    score_strip<R2, size>(net, row, w + j, KEY_TILE, residual ? p + j : nullptr, strip_bias, pivot, score);
    unroll<size>([&](auto s) INLINE_LAMBDA {
      score[s] = exp2(score[s]);
      store(p + j + s * LANES, score[s]);
      total += score[s];
    });
    j += size * LANES;
  };
  constexpr int S = strip_vectors<R2>();
  while (j + S * LANES <= n) strip(std::integral_constant<int, S>{}, bias ? bias + j : nullptr);
  if constexpr (S > 2)
    while (j + 2 * LANES <= n) strip(std::integral_constant<int, 2>{}, bias ? bias + j : nullptr);
  while (j + LANES <= n) strip(std::integral_constant<int, 1>{}, bias ? bias + j : nullptr);
  if (j < n) strip(std::integral_constant<int, 1>{}, bias ? bias + j : tail.window(n - j));
  return sum_lanes(total);
}

// Does the same where weights would overflow or vanish: the pivot becomes the largest score. Returns the sum, and the pivot.
template <int R2>
static Real exp_scores_exactly(const PairNetwork& net, const QueryRow& row, const Real* w, bool residual, const Real* bias,
                               const Tail& tail, int64_t n, Real& pivot, bool may_fall, Real* p) {
  Vec largest = splat(NEVER);
  for (int64_t j = 0; j < n; j += LANES) {
    Vec score[1];
    const Real* strip_bias = bias ? bias + j : n - j < LANES ? tail.window(n - j) : nullptr;
    score_strip<R2, 1>(net, row, w + j, KEY_TILE, residual ? p + j : nullptr, strip_bias, 0, score);
    store(p + j, score[0]);
    largest = larger(largest, score[0]);
  }
  const Real top = max_lanes(largest);
  if (top > pivot || may_fall) pivot = top;
  Vec total = Vec{};
  for (int64_t j = 0; j < n; j += LANES) {
    const Vec weight = exp2(load(p + j) - pivot);
    store(p + j, weight);
    total += weight;
  }
  return sum_lanes(total);
}

// Turns q.k of a row, in residual mode, into what the scores have of it, in units of log2(e)
static void scale_products(const Problem& problem, Real* row, int64_t columns) {
  const Real scale = Real(problem.softcap > 0 ? problem.residual_scale / problem.softcap : problem.residual_scale * LOG2_E);
  const Real cap = Real(problem.softcap * LOG2_E);
  for (int64_t j = 0; j < columns; j += LANES) {
    const Vec x = load(row + j) * scale;
    store(row + j, cap > 0 ? tanh(x) * cap : x);
  }
}

template <int R2>
class Forward {
 public:
  Forward(const Problem& problem, const Real* features, const ForwardResult& result)
      : problem(problem), features(features), result(result), width(round_up(problem.head_dim, LANES)),
        value_width(round_up(problem.value_dim, LANES)), hidden2(round_up(problem.hidden2, R2)) {}

  void run() const {
    const int64_t blocks = (problem.queries + QUERY_BLOCK - 1) / QUERY_BLOCK;
#pragma omp parallel num_threads(problem.num_threads)
    {
      Memory memory(*this);
      // starts with the last blocks, which are the longest under a causal mask
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < problem.batch * problem.heads * blocks; task++) {
        const int64_t head = task / blocks % problem.heads;
        block(memory, task / blocks / problem.heads, head, (blocks - 1 - task % blocks) * QUERY_BLOCK);
      }
    }
  }

 private:
  const Problem& problem;
  const Real* const features;
  const ForwardResult& result;
  const int64_t width, value_width, hidden2;

  struct Memory {
    Scratch scratch;
    Real *row, *query, *u, *bias2, *weights, *mask, *keys, *w, *output, *net;
    Real pivot[QUERY_BLOCK], sum[QUERY_BLOCK];
    HeadValues values;
    Tail tail;
    explicit Memory(const Forward& f) : scratch(f.scratch_size()), values(f.problem) {
      row = scratch.take(LANES * f.widest());
      query = scratch.take(f.width * QUERY_BLOCK);
      u = scratch.take(f.problem.hidden1 * QUERY_BLOCK);
      bias2 = scratch.take(f.hidden2 * QUERY_BLOCK);
      weights = scratch.take(ROW_GROUP * KEY_TILE);
      mask = scratch.take(2 * KEY_TILE);
      keys = scratch.take(f.width * KEY_TILE);
      w = scratch.take(f.problem.hidden1 * KEY_TILE);
      output = scratch.take(QUERY_BLOCK * f.value_width);
      net = scratch.take(PairNetwork::size(f.problem.hidden1, f.hidden2));
    }
  };

  int64_t widest() const { return std::max(width, round_up(problem.hidden1, LANES)); }
  int64_t scratch_size() const {
    return LANES * widest() + (width + problem.hidden1 + hidden2) * QUERY_BLOCK + (ROW_GROUP + 2) * KEY_TILE +
           KEY_TILE * (width + problem.hidden1) + QUERY_BLOCK * value_width + PairNetwork::size(problem.hidden1, hidden2) + 16 * LANES;
  }

  void block(Memory& memory, int64_t b, int64_t head, int64_t first) const {
    const int64_t set = problem.weight_set(head), count = std::min(QUERY_BLOCK, problem.queries - first);
    const PairNetwork net(problem, set, hidden2, memory.net);
    query_features(problem, b, head, first, count, QUERY_BLOCK, memory.query, memory.row, memory.u);
    prepare_queries(net, memory.u, QUERY_BLOCK, count, memory.bias2);
    std::memset(memory.output, 0, sizeof(Real) * QUERY_BLOCK * value_width);
    std::memset(memory.pivot, 0, sizeof(memory.pivot));
    std::memset(memory.sum, 0, sizeof(memory.sum));

    const int64_t visible = problem.is_causal ? std::min(problem.keys, first + count) : problem.keys;
    for (int64_t key = 0; key < visible; key += KEY_TILE) tile(memory, net, b, head, first, count, key, std::min(KEY_TILE, visible - key));
    finish(memory, b, head, first, count);
  }

  void tile(Memory& memory, const PairNetwork& net, int64_t b, int64_t head, int64_t first, int64_t count, int64_t key, int64_t n) const {
    const int64_t kv_head = head / (problem.heads / problem.kv_heads);
    const bool one_mask = problem.mask.data && (problem.mask.strides[2] == 0 || problem.queries == 1);
    Coverage coverage = EVERYTHING;
    if (one_mask) coverage = read_mask(problem.mask, problem.mask.at(b, head, 0), key, n, memory.mask);
    if (coverage == NOTHING) return;
    const Real* w = memory.w;
    if (prepares_features(problem)) w = features + feature_place(problem, b, problem.feature_head(head), key / KEY_TILE);
    else key_features(problem, b, problem.feature_head(head), key, n, KEY_TILE, memory.keys, memory.row, memory.w);
    Rows values{nullptr, 0};
    if (problem.residual) read_transposed(problem.key, problem.key.at(b, kv_head, key), n, problem.head_dim, memory.keys, KEY_TILE, memory.row);

    const DropoutColumns dropout(problem, b, head, key);
    for (int64_t group = 0; group < count; group += ROW_GROUP) {
      const int64_t rows = std::min(ROW_GROUP, count - group);
      const int64_t seen = problem.is_causal ? std::min(n, first + group + rows - key) : n;
      if (seen <= 0) continue;
      if (problem.residual) dot_products(memory, group, rows, seen);
      bool any = false;
      for (int64_t r = 0; r < rows; r++) {
        const int64_t query = first + group + r;
        const int64_t row_keys = problem.is_causal ? std::min(n, query + 1 - key) : n;
        Real* p = memory.weights + r * KEY_TILE;
        Coverage row_coverage = row_keys <= 0 ? NOTHING : coverage;
        Real* mask = memory.mask;
        if (row_coverage != NOTHING && problem.mask.data && (!one_mask || (coverage == SOME && row_keys < n))) {
          mask += KEY_TILE;  // the row's own, cut at its last key
          row_coverage = read_mask(problem.mask, problem.mask.at(b, head, query), key, row_keys, mask);
        }
        if (row_coverage != NOTHING) {
          weigh(memory, net, group + r, w, row_coverage == SOME ? mask : nullptr, row_keys, p);
          if (problem.has_dropout) drop(dropout, query, 0, row_keys, p);
          any = true;
        }
        for (int64_t j = row_coverage == NOTHING ? 0 : round_up(row_keys, LANES); j < seen; j++) p[j] = 0;
      }
      if (!any) continue;
      if (!values.data) values = memory.values.tile(b, kv_head, key);
      multiply<ADD>(memory.weights, KEY_TILE, 1, rows, seen, values.data, values.stride, memory.output + group * value_width, value_width, value_width);
    }
  }

  // Computes unnormalised weights of one query, in terms of its pivot, and their sum
  INLINE void weigh(Memory& memory, const PairNetwork& net, int64_t i, const Real* w, const Real* bias, int64_t n, Real* p) const {
    const QueryRow row{memory.u + i, memory.bias2 + i, QUERY_BLOCK};
    Real sum = exp_scores<R2>(net, row, w, problem.residual, bias, memory.tail, n, memory.pivot[i], p);
    const bool begun = memory.sum[i] > 0;
    if (!(sum <= LARGEST_SUM && (begun || sum >= SMALLEST_SUM))) {
      if (problem.residual) dot_products(memory, i, 1, n, p);
      const Real before = memory.pivot[i];
      sum = exp_scores_exactly<R2>(net, row, w, problem.residual, bias, memory.tail, n, memory.pivot[i], !begun, p);
      if (begun) rescale(memory, i, std::exp2(before - memory.pivot[i]));
    }
    memory.sum[i] += sum;
  }

  void rescale(Memory& memory, int64_t i, Real factor) const {
    memory.sum[i] *= factor;
    for (int64_t d = 0; d < value_width; d++) memory.output[i * value_width + d] *= factor;
  }

  // Writes scale * q.k of some rows of a group into its weights, in residual mode
  void dot_products(Memory& memory, int64_t i, int64_t rows, int64_t n, Real* out = nullptr) const {
    out = out ? out : memory.weights;
    const int64_t columns = round_up(n, LANES);
    multiply<REPLACE>(memory.query + i, 1, QUERY_BLOCK, rows, problem.head_dim, memory.keys, KEY_TILE, out, KEY_TILE, columns);
    for (int64_t r = 0; r < rows; r++) scale_products(problem, out + r * KEY_TILE, columns);
  }

  void finish(Memory& memory, int64_t b, int64_t head, int64_t first, int64_t count) const {
    const Real kept = problem.drop_below < 65536 ? Real(65536.0 / (65536 - problem.drop_below)) : 0;
    for (int64_t i = 0; i < count; i++) {
      // lets a sink far above the scores make the sum infinite, and all weights zero
      const Real sum = memory.sum[i] + (problem.sinks ? std::exp2(problem.sinks[head] * Real(LOG2_E) - memory.pivot[i]) : 0);
      const Real inverse = sum == 0 ? 0 : 1 / sum, factor = problem.has_dropout ? inverse * kept : inverse;
      Real* const out = memory.output + i * value_width;
      for (int64_t d = 0; d < value_width; d++) out[d] *= factor;
      write_row(result.output, result.output.at(b, head, first + i), problem.value_dim, out);
      Real* const softmax = result.softmax + ((b * problem.heads + head) * problem.queries + first + i) * 2;
      softmax[0] = memory.pivot[i], softmax[1] = inverse;
    }
  }
};
