// Reads the attention mask as numbers to add to scores.
#pragma once

#include <cmath>
#include <limits>

#include "tensors.h"

// Cuts keys into tiles of this many: a multiple of the 128 columns that dropout draws together
constexpr int64_t KEY_TILE = 128;

// Holds what is added to a vector of scores of which only the first `count` are real: window(count)
struct Tail {
  Real values[2 * LANES];
  Tail() {
    for (int i = 0; i < 2 * LANES; i++) values[i] = i < LANES ? Real(0) : NEVER;
  }
  INLINE const Real* window(int64_t count) const { return values + LANES - count; }
};

enum Coverage { NOTHING, SOME, EVERYTHING };

// Reads the mask of one query against n keys, ready to be added to scores in units of log2(e): out [round_up(n, LANES)],
// NEVER where a pair does not count
static Coverage read_mask(const Tensor& mask, const char* row, int64_t first_key, int64_t n, Real* out) {
  read_row(mask, row + first_key * mask.strides[3] * mask.element_size(), n, out);
  const int64_t padded = round_up(n, LANES);
  for (int64_t j = n; j < padded; j++) out[j] = -std::numeric_limits<Real>::infinity();
  Vec most = splat(NEVER), size = Vec{}, poison = Vec{};
  for (int64_t j = 0; j < padded; j += LANES) {
    Vec bias = load(out + j);
    bias = bias < splat(-std::numeric_limits<Real>::max()) ? splat(NEVER) : larger(splat(FLOOR), bias * Real(LOG2_E));
    store(out + j, bias);
    most = larger(most, bias);
    size = larger(size, bias * bias);
    poison += bias * Real(0);
  }
  if (std::isnan(sum_lanes(poison))) return SOME;  // has a NaN, which the comparisons above pass over
  if (max_lanes(most) <= NEVER / 2) return NOTHING;
  return padded == n && max_lanes(size) == 0 ? EVERYTHING : SOME;
}

