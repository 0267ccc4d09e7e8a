// Which pairs count: the attention mask as numbers to add to scores, and the counter-based dropout.
#pragma once

#include <limits>

#include "problem.h"

// Keys are taken in tiles of this many: a multiple of the 128 columns that dropout draws together
constexpr int64_t KEY_TILE = 128;

// Added to a vector of scores of which only the first `count` are real: window(count)
struct Tail {
  Real values[2 * LANES];
  Tail() {
    for (int i = 0; i < 2 * LANES; i++) values[i] = i < LANES ? Real(0) : NEVER;
  }
  INLINE const Real* window(int64_t count) const { return values + LANES - count; }
};

enum Coverage { NOTHING, SOME, EVERYTHING };

// The mask of one query against n keys, ready to be added to scores in units of log2(e): out [round_up(n, LANES)], NEVER
// where a pair does not count
static Coverage read_mask(const Tensor& mask, const char* row, int64_t first_key, int64_t n, Real* out) {
  read_row(mask, row + first_key * mask.strides[3] * mask.element_size(), n, out);
  const int64_t padded = round_up(n, LANES);
  for (int64_t j = n; j < padded; j++) out[j] = -std::numeric_limits<Real>::infinity();
  Vec most = splat(NEVER), size = Vec{};
  for (int64_t j = 0; j < padded; j += LANES) {
    Vec bias = load(out + j);
    bias = bias < splat(-std::numeric_limits<Real>::max()) ? splat(NEVER) : larger(splat(FLOOR), bias * Real(LOG2_E));
    store(out + j, bias);
    most = larger(most, bias);
    size = larger(size, bias * bias);
  }
  if (max_lanes(most) <= NEVER / 2) return NOTHING;
  return padded == n && max_lanes(size) == 0 ? EVERYTHING : SOME;
}

// Philox 4x32-10 (Salmon et al. 2011) for the columns of a tile. The counter of a pair is (column, query, head, 0), so the
// first three rounds are mostly the same for a whole tile or a whole row.
struct Philox {
  static constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85;

  // Words 0 to 3 of one counter
  static void block(uint32_t column, uint32_t query, uint32_t head, uint32_t k0, uint32_t k1, uint32_t (&words)[4]) {
    uint32_t c0 = column, c1 = query, c2 = head, c3 = 0;
    for (int round = 0; round < 10; round++) {
      const uint64_t p0 = uint64_t(M0) * c0, p1 = uint64_t(M1) * c2;
      c0 = uint32_t(p1 >> 32) ^ c1 ^ k0, c1 = uint32_t(p1);
      c2 = uint32_t(p0 >> 32) ^ c3 ^ k1, c3 = uint32_t(p0);
      k0 += W0, k1 += W1;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
  }
};

// Zeroes the dropped ones among n weights p of one query, from `first_key` (a multiple of KEY_TILE) on
static void drop(const Problem& problem, int64_t example, int64_t head, int64_t query, int64_t first_key, int64_t n, Real* p) {
  const uint32_t k0 = uint32_t(problem.seed), k1 = uint32_t(uint64_t(problem.seed) >> 32);
  const uint32_t counter2 = uint32_t(example * problem.heads + head);
  for (int lane = 0; lane < 16; lane++) {
    uint32_t words[4];
    Philox::block(uint32_t(first_key / 8 + lane), uint32_t(query), counter2, k0, k1, words);
    for (int s = 0; s < 8; s++) {
      const int64_t j = 16 * s + lane;
      const uint32_t number = s < 4 ? words[s] & 0xffff : words[s - 4] >> 16;
      if (j < n && number < uint64_t(problem.drop_below)) p[j] = 0;
    }
  }
}
