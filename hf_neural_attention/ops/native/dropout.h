// Chooses which attention weights are dropped: Philox 4x32-10 (Salmon et al. 2011), keyed by the seed, at the counter
// (16 * (j / 128) + j % 16, i, b * H + h, 0). See ../README.md for the numbers' places in its words.
#pragma once

#include "masks.h"

constexpr int64_t DROPOUT_COLUMNS = 128;

// Holds two vectors of 64-bit lanes, for the even and the odd ones of 16 neighbouring columns. Only the lower halves count:
// that is all that a 32-bit product reads.
struct Lanes {
  typedef uint64_t Half __attribute__((vector_size(64)));
  Half even, odd;

  template <class F>
  static INLINE Lanes map(const Lanes& a, F f) {
    return {f(a.even), f(a.odd)};
  }
  INLINE Lanes operator^(const Lanes& other) const { return {even ^ other.even, odd ^ other.odd}; }
  INLINE Lanes operator^(uint32_t x) const { return {even ^ uint64_t(x), odd ^ uint64_t(x)}; }
  INLINE Lanes high() const { return {even >> 32, odd >> 32}; }
  INLINE Lanes times(uint32_t factor) const {
    return map(*this, [factor](Half x) -> Half {
#ifdef __AVX512F__
      return (Half)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#else
      return (x & uint64_t(0xffffffff)) * uint64_t(factor);
#endif
    });
  }
};

// Draws the random numbers of 128 columns for one query after the other. What does not depend on the query is computed once:
// nearly all of the first three rounds.
class DropoutColumns {
 public:
  DropoutColumns(const Problem& problem, int64_t example, int64_t head, int64_t first_key)
      : drop_below(problem.drop_below), k0(uint32_t(problem.seed)), k1(uint32_t(uint64_t(problem.seed) >> 32)) {
    const uint64_t product = uint64_t(M1) * uint32_t(example * problem.heads + head);
    head_high = uint32_t(product >> 32);
    const uint64_t column = uint64_t(first_key / DROPOUT_COLUMNS * 16);
    Lanes counter;
    for (int i = 0; i < 8; i++) counter.even[i] = column + 2 * i, counter.odd[i] = column + 2 * i + 1;
    const Lanes first = counter.times(M0), second = (first.high() ^ k1).times(M1);
    c3_first = first ^ key1(1);
    const Lanes third = (second.high() ^ (uint32_t(product) ^ key0(1))).times(M0);
    c1_second = second ^ key0(2);
    c2_third = third.high() ^ key1(2);
    c3_third = third;
  }

  // Marks as bits of kept[s] those of the columns s * 16 to s * 16 + 15 that are kept
  void keep(int64_t query, uint16_t (&kept)[8]) const {
    const uint64_t product = uint64_t(M0) * (head_high ^ uint32_t(query) ^ k0);
    const Lanes third = (c3_first ^ uint32_t(product >> 32)).times(M1);
    Lanes c0 = third.high() ^ c1_second, c1 = third, c2 = c2_third ^ uint32_t(product), c3 = c3_third;
    for (int round = 3; round < 10; round++) {
      const Lanes p0 = c0.times(M0), p1 = c2.times(M1);
      c0 = p1.high() ^ c1 ^ key0(round), c1 = p1;
      c2 = p0.high() ^ c3 ^ key1(round), c3 = p0;
    }
    const Lanes words[4] = {c0, c1, c2, c3};
    for (int word = 0; word < 4; word++) compare(words[word], kept[word], kept[word + 4]);
  }

 private:
  static constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85;
  const int64_t drop_below;
  const uint32_t k0, k1;
  uint32_t head_high;
  Lanes c3_first, c1_second, c2_third, c3_third;

  INLINE uint32_t key0(int round) const { return k0 + uint32_t(round) * W0; }
  INLINE uint32_t key1(int round) const { return k1 + uint32_t(round) * W1; }

  // Compares the lower and the upper 16 bits of each word with the threshold
  INLINE void compare(const Lanes& word, uint16_t& lower, uint16_t& upper) const {
    if (drop_below > 0xffff) {
      lower = upper = 0;
      return;
    }
#ifdef __AVX512F__
    const __m512i all = _mm512_mask_mov_epi32((__m512i)word.even, 0xaaaa, _mm512_slli_epi64((__m512i)word.odd, 32));
    const __m512i threshold = _mm512_set1_epi32(int32_t(uint32_t(drop_below) << 16));
    lower = _mm512_cmpge_epu32_mask(_mm512_slli_epi32(all, 16), threshold);
    upper = _mm512_cmpge_epu32_mask(all, threshold);
#else
    lower = upper = 0;
    for (int i = 0; i < 16; i++) {
      const uint32_t x = uint32_t((i % 2 ? word.odd : word.even)[i / 2]);
      lower |= uint16_t((x & 0xffff) >= drop_below) << i;
      upper |= uint16_t((x >> 16) >= drop_below) << i;
    }
#endif
  }
};

// Zeroes the dropped ones among p[0] to p[n - 1], the weights of `query` and the keys from `offset` of the 128 columns on
static INLINE void drop(const DropoutColumns& columns, int64_t query, int64_t offset, int64_t n, Real* p) {
  uint16_t kept[8];
  columns.keep(query, kept);
  for (int64_t j = 0; j < n; j += 16) {
    const uint16_t bits = kept[(offset + j) / 16];
#if defined(NEURAL_ATTENTION_AVX512) && !defined(NEURAL_ATTENTION_FLOAT64)
    store(p + j, (Vec)_mm512_maskz_mov_ps(bits, (__m512)load(p + j)));
#else
    for (int64_t lane = 0; lane < 16 && j + lane < n; lane++)
      if (!(bits >> lane & 1)) p[j + lane] = 0;
#endif
  }
}
