// Holds the native CPU kernel's doors. See ../README.md for the mathematics and the tiling.
#include <algorithm>
#include <new>
#include <type_traits>

#include "backward.h"

// Calls f with the block of second-layer units, a constant, that suits a scorer
template <class F>
static void for_block_of_units(const Problem& problem, F&& f) {
  if (problem.hidden2 == 1) f(std::integral_constant<int, 1>{});
  else if (problem.hidden2 == 2) f(std::integral_constant<int, 2>{});
  else if (problem.hidden2 <= 4) f(std::integral_constant<int, 4>{});
  else f(std::integral_constant<int, 8>{});
}

// Returns 0, or 1 if there was not memory enough for what threads share, which is what can be large: an exception must not leave
// for a caller that knows none
template <class F>
static int64_t within_memory(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

extern "C" {

const char* describe_interface() {
  static const InterfaceDescription description;
  return description.text;
}

// Says whether the pragmas for threads were understood
int64_t has_threads() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

// Returns how many numbers (of Real) the forward pass wants as working memory
int64_t working_memory(const Problem* problem) { return feature_numbers(*problem); }

void forward(const Problem* problem, Real* features, const ForwardResult* result) {
  prepare_features(*problem, features);
  for_block_of_units(*problem, [&](auto units) { Forward<units>(*problem, features, *result).run(); });
}

int64_t backward(const Problem* problem, const BackwardResult* result) {
  return within_memory([&] { for_block_of_units(*problem, [&](auto units) { Backward<units>(*problem, *result).run(); }); });
}
}
