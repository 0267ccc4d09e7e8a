// Defines vectors of floating-point numbers: the compiler's vector extensions, with intrinsics only where it would not find
// the instruction. One file is compiled for one kind of number (Real) and one vector size.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline)) inline
#define INLINE_LAMBDA __attribute__((always_inline))

#ifdef NEURAL_ATTENTION_FLOAT64
using Real = double;
using Int = int64_t;
#else
using Real = float;
using Int = int32_t;
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define NEURAL_ATTENTION_AVX512 1
constexpr int VECTOR_BYTES = 64;
constexpr int NUM_REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
constexpr int NUM_REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16;
constexpr int NUM_REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16;
constexpr int NUM_REGISTERS = 16;
#endif

constexpr int LANES = VECTOR_BYTES / sizeof(Real);

typedef Real Vec __attribute__((vector_size(VECTOR_BYTES)));
typedef Real UnalignedVec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(Real)), may_alias));
typedef Int IntVec __attribute__((vector_size(VECTOR_BYTES)));

// Stands for the score of a pair that does not count: finite, so that no difference is NaN, and below FLOOR, which the
// smallest finite mask becomes (a row with nothing but those attends to all)
constexpr Real NEVER = sizeof(Real) == 8 ? Real(-1e308) : Real(-3e38);
constexpr Real FLOOR = sizeof(Real) == 8 ? Real(-1e300) : Real(-1e30);
constexpr double LOG2_E = 1.4426950408889634;

constexpr int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// Calls f(0), ..., f(N - 1) with constants, so that arrays indexed by them live in registers
template <class F, int... I>
INLINE void unroll_sequence(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
INLINE void unroll(F&& f) {
  unroll_sequence(f, std::make_integer_sequence<int, N>{});
}

// Takes x - 0 and not 0 + x, which is not x where x is -0, so that the compiler would add
INLINE Vec splat(Real x) { return x - Vec{}; }
INLINE Vec load(const Real* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
INLINE void store(Real* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }

// Keeps x in a register where the compiler would read it from memory again at each use
INLINE void keep(Vec& x) {
#if defined(__x86_64__) && defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// Returns the larger one; b if either is NaN
INLINE Vec larger(Vec a, Vec b) {
#if defined(NEURAL_ATTENTION_AVX512) && defined(NEURAL_ATTENTION_FLOAT64)
  return (Vec)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(NEURAL_ATTENTION_AVX512)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__) && defined(NEURAL_ATTENTION_FLOAT64)
  return (Vec)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__AVX__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

INLINE Vec relu(Vec x) { return larger(Vec{}, x); }

// Returns x where a > 0, else 0
INLINE Vec where_positive(Vec a, Vec x) {
#if defined(NEURAL_ATTENTION_AVX512) && defined(NEURAL_ATTENTION_FLOAT64)
  return (Vec)_mm512_maskz_mov_pd(_mm512_cmp_pd_mask((__m512d)a, _mm512_setzero_pd(), _CMP_GT_OQ), (__m512d)x);
#elif defined(NEURAL_ATTENTION_AVX512)
  return (Vec)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)a, _mm512_setzero_ps(), _CMP_GT_OQ), (__m512)x);
#else
  return a > Vec{} ? x : Vec{};
#endif
}

// Moves lanes down by STEP, around the end
template <int STEP, int... I>
INLINE Vec rotate(Vec x, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, x, ((I + STEP) % LANES)...);
#else
  return __builtin_shuffle(x, IntVec{((I + STEP) % LANES)...});
#endif
}

template <int STEP = LANES / 2>
INLINE Real sum_lanes(Vec x) {
  if constexpr (STEP == 0) return x[0];
  else return sum_lanes<STEP / 2>(x + rotate<STEP>(x, std::make_integer_sequence<int, LANES>{}));
}

INLINE Real max_lanes(Vec x) {
  Real best = x[0];
  for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
  return best;
}

template <int K>
constexpr double exp2_coefficient() {
  if constexpr (sizeof(Real) == 4) {
    // has a relative error below 1e-7 on [-1/2, 1/2] with exp2(0) = 1
    constexpr double table[] = {1.0, 0.6931469776, 0.2402224209, 0.05550733743, 0.00967151264, 0.00132647272};
    return table[K];
  } else {
    // takes Taylor's coefficients, ln(2)^K / K!
    double term = 1.0;
    for (int i = 1; i <= K; i++) term *= 0.6931471805599453094 / i;
    return term;
  }
}

// Returns 2 to the power of x; 0 from NEVER, infinity or a huge number far above the largest exponent
INLINE Vec exp2(Vec x) {
  // rounds to an integer by adding 1.5 * 2^(bits of the significand), after which it stands in the lowest bits
  constexpr bool wide = sizeof(Real) == 8;
  constexpr Real shifter = wide ? Real(6755399441055744.0) : Real(12582912.0);
  constexpr int degree = wide ? 12 : 5;
#ifndef NEURAL_ATTENTION_AVX512
  constexpr Real lowest = wide ? -1022 : -126, highest = wide ? 1023 : 127;
  const Vec asked = x;
  x = larger(splat(lowest), x);
  x = x > splat(highest) ? splat(highest) : x;
#endif
  const Vec shifted = x + shifter;
  const Vec whole = shifted - shifter;
  const Vec rest = x - whole;
  Vec p = splat(Real(exp2_coefficient<degree>()));
  unroll<degree>([&](auto k) INLINE_LAMBDA { p = p * rest + Real(exp2_coefficient<degree - 1 - k>()); });
#if defined(NEURAL_ATTENTION_AVX512) && defined(NEURAL_ATTENTION_FLOAT64)
  return (Vec)_mm512_scalef_pd((__m512d)p, (__m512d)whole);
#elif defined(NEURAL_ATTENTION_AVX512)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  const Vec scaled = (Vec)((IntVec)p + ((IntVec)shifted << (wide ? 52 : 23)));
  return asked < splat(lowest) ? Vec{} : scaled;
#endif
}

// Returns tanh(x); in float32 by its series near zero, where the quotient of exponentials would lose the small number
INLINE Vec tanh(Vec x) {
  const Vec size = larger(x, -x), e = exp2(size * Real(-2 * LOG2_E));
  const Vec positive = (Real(1) - e) / (Real(1) + e), far = x < Vec{} ? -positive : positive;
  if constexpr (sizeof(Real) == 8) return far;
  // weighs x^3, x^5 ... x^11 (Abramowitz and Stegun, 4.5.64): relative error below 1e-7 up to 0.4
  constexpr double series[] = {-1.0 / 3, 2.0 / 15, -17.0 / 315, 62.0 / 2835, -1382.0 / 155925};
  const Vec square = x * x;
  Vec p = splat(Real(series[4]));
  unroll<4>([&](auto k) INLINE_LAMBDA { p = p * square + Real(series[3 - k]); });
  return size < splat(Real(0.4)) ? x + x * square * p : far;
}

// Swap rows[r][l] <-> rows[l][r], by log2(LANES) rounds of exchanging blocks
template <int STEP, int SIDE, int... I>
INLINE Vec exchange(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return SIDE == 0 ? __builtin_shufflevector(a, b, ((I & STEP) ? LANES + I - STEP : I)...)
                   : __builtin_shufflevector(a, b, ((I & STEP) ? LANES + I : I + STEP)...);
#else
  return SIDE == 0 ? __builtin_shuffle(a, b, IntVec{((I & STEP) ? LANES + I - STEP : I)...})
                   : __builtin_shuffle(a, b, IntVec{((I & STEP) ? LANES + I : I + STEP)...});
#endif
}

template <int STEP>
INLINE void transpose_rounds(Vec (&rows)[LANES]) {
  if constexpr (STEP < LANES) {
    unroll<LANES>([&](auto r) INLINE_LAMBDA {
      if constexpr ((r & STEP) == 0) {
        constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
        const Vec first = exchange<STEP, 0>(rows[r], rows[r + STEP], lanes);
        rows[r + STEP] = exchange<STEP, 1>(rows[r], rows[r + STEP], lanes);
        rows[r] = first;
      }
    });
    transpose_rounds<STEP * 2>(rows);
  }
}
INLINE void transpose(Vec (&rows)[LANES]) { transpose_rounds<1>(rows); }
