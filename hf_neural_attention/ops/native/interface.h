// Declares what Python and the kernels hand each other. native_interface.py mirrors it with ctypes, and compares
// `describe_interface` with its own description when a library is loaded.
#pragma once

#include <cstddef>
#include <cstdio>

#include "simd.h"

// Goes up where the meaning of a field, or the arguments of a function, change while all fields stay as they are
constexpr int INTERFACE_VERSION = 2;

enum ElementType : int64_t { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2, FLOAT16 = 3, BOOL = 4 };

// Describes a 4-dimensional tensor; strides count elements. `data` is null where there is none.
struct Tensor {
  const char* data;
  int64_t strides[4];
  int64_t type;

  INLINE int64_t element_size() const { return type == FLOAT64 ? 8 : type == FLOAT32 ? 4 : type == BOOL ? 1 : 2; }
  INLINE const char* at(int64_t i, int64_t j, int64_t k) const {
    return data + (i * strides[0] + j * strides[1] + k * strides[2]) * element_size();
  }
  // Returns whether there is no conversion, and no gaps within a row
  INLINE bool is_plain() const { return type == (sizeof(Real) == 8 ? FLOAT64 : FLOAT32) && strides[3] == 1; }
};

struct Problem {
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim, hidden1, hidden2;
  int64_t weight_sets;      // 1, or `heads` where the weights are per head
  int64_t queries_projected;  // `query` holds u, [B, H, Tq, h1]
  int64_t keys_projected;   // `key` holds w, [B, Hw, Tk, h1]
  int64_t is_causal;
  int64_t residual;         // scores have scale * q.k added
  int64_t num_threads;
  int64_t drop_below;       // of the 65,536 values of a pair's random number
  int64_t has_dropout;
  int64_t seed;
  double residual_scale;
  double softcap;           // of the dot products in residual mode: softcap * tanh(scale * q.k / softcap); 0: none
  Tensor query, key, value, mask;
  // Hold the first layer of the scorer by itself, u = A q + a and w = C k + c, and the layers that act on pairs. Contiguous.
  const Real* query_weight;  // A [weight_sets, h1, D]; null where queries come projected
  const Real* query_bias;    // a [weight_sets, h1]
  const Real* key_weight;    // C; null where keys come projected
  const Real* key_bias;      // c
  const Real* weight2;       // [weight_sets, h2, h1]
  const Real* bias2;         // [weight_sets, h2]
  const Real* weight3;       // [weight_sets, h2]
  const Real* sinks;         // [heads]: logits of a key without value; null: none

  INLINE int64_t key_width() const { return keys_projected ? hidden1 : head_dim; }
  // Counts the heads that w has: every query head its own where the weights are per head
  INLINE int64_t feature_heads() const { return weight_sets == 1 ? kv_heads : heads; }
  INLINE int64_t feature_head(int64_t head) const { return weight_sets == 1 ? head / (heads / kv_heads) : head; }
  INLINE int64_t weight_set(int64_t head) const { return weight_sets == 1 ? 0 : head; }
};

struct ForwardResult {
  Tensor output;  // [B, H, Tq, Dv]
  Real* softmax;  // [B, H, Tq, 2]: pivot and 1 / sum of 2^(score - pivot), 0 for empty rows
};

struct BackwardResult {
  Tensor output, grad_output;   // [B, H, Tq, Dv]
  const Real* softmax;          // [B, H, Tq, 2], as ForwardResult has it
  Tensor grad_query;            // [B, H, Tq, D], or [B, H, Tq, h1] where queries come projected
  Tensor grad_key;              // [B, Hkv, Tk, D], or [B, Hw, Tk, h1] where keys come projected
  Tensor grad_value;            // [B, Hkv, Tk, Dv]
  Real* grad_query_weight;      // [weight_sets, h1, D], contiguous, as all that follows, or null where queries come projected
  Real* grad_query_bias;        // [weight_sets, h1], or null
  Real* grad_key_weight;        // [weight_sets, h1, D], or null where keys come projected
  Real* grad_key_bias;          // [weight_sets, h1], or null
  Real* grad_weight2;           // [weight_sets, h2, h1]
  Real* grad_bias2;             // [weight_sets, h2]
  Real* grad_weight3;           // [weight_sets, h2]
  Real* grad_mask;              // [B, H, Tq, Tk], zeros, or null
};

template <class T>
constexpr const char* TYPE_NAME = nullptr;
template <class T>
constexpr const char* TYPE_NAME<T*> = "pointer";
template <>
constexpr const char* TYPE_NAME<int64_t> = "int64";
template <>
constexpr const char* TYPE_NAME<int64_t[4]> = "int64[4]";
template <>
constexpr const char* TYPE_NAME<double> = "float64";
template <>
constexpr const char* TYPE_NAME<Tensor> = "Tensor";

struct Field {
  const char *name, *type;
  size_t offset, size;
};

#define FIELD(structure, field) \
  { #structure "." #field, TYPE_NAME<decltype(structure::field)>, offsetof(structure, field), sizeof(structure::field) }

constexpr Field FIELDS[] = {
    FIELD(Tensor, data), FIELD(Tensor, strides), FIELD(Tensor, type),

    FIELD(Problem, batch), FIELD(Problem, heads), FIELD(Problem, kv_heads), FIELD(Problem, queries), FIELD(Problem, keys),
    FIELD(Problem, head_dim), FIELD(Problem, value_dim), FIELD(Problem, hidden1), FIELD(Problem, hidden2),
    FIELD(Problem, weight_sets), FIELD(Problem, queries_projected), FIELD(Problem, keys_projected), FIELD(Problem, is_causal),
    FIELD(Problem, residual), FIELD(Problem, num_threads), FIELD(Problem, drop_below), FIELD(Problem, has_dropout), FIELD(Problem, seed),
    FIELD(Problem, residual_scale), FIELD(Problem, softcap), FIELD(Problem, query), FIELD(Problem, key), FIELD(Problem, value), FIELD(Problem, mask),
    FIELD(Problem, query_weight), FIELD(Problem, query_bias), FIELD(Problem, key_weight), FIELD(Problem, key_bias),
    FIELD(Problem, weight2), FIELD(Problem, bias2), FIELD(Problem, weight3), FIELD(Problem, sinks),

    FIELD(ForwardResult, output), FIELD(ForwardResult, softmax),

    FIELD(BackwardResult, output), FIELD(BackwardResult, grad_output), FIELD(BackwardResult, softmax),
    FIELD(BackwardResult, grad_query), FIELD(BackwardResult, grad_key), FIELD(BackwardResult, grad_value),
    FIELD(BackwardResult, grad_query_weight), FIELD(BackwardResult, grad_query_bias), FIELD(BackwardResult, grad_key_weight),
    FIELD(BackwardResult, grad_key_bias), FIELD(BackwardResult, grad_weight2), FIELD(BackwardResult, grad_bias2),
    FIELD(BackwardResult, grad_weight3), FIELD(BackwardResult, grad_mask),
};

#undef FIELD

constexpr size_t size_of_known_fields() {
  size_t total = 0;
  for (const Field& field : FIELDS) total += field.type ? field.size : 0;
  return total;
}
static_assert(size_of_known_fields() == sizeof(Tensor) + sizeof(Problem) + sizeof(ForwardResult) + sizeof(BackwardResult),
              "FIELDS must list every field of every structure, and TYPE_NAME know its type");

// Holds a line for each thing that both sides must see alike: its name, a colon, and what it is
struct InterfaceDescription {
  char text[16384] = "";  // several times what it takes
  size_t length = 0;

  template <class... Values>
  void add(const char* format, Values... values) {
    if (length < sizeof(text)) length += size_t(std::snprintf(text + length, sizeof(text) - length, format, values...));
  }

  InterfaceDescription() {
    add("INTERFACE_VERSION: %d\nReal: %s\n", INTERFACE_VERSION, sizeof(Real) == 8 ? "float64" : "float32");
    add("ElementType.float32: %d\nElementType.float64: %d\nElementType.bfloat16: %d\n", int(FLOAT32), int(FLOAT64), int(BFLOAT16));
    add("ElementType.float16: %d\nElementType.bool: %d\n", int(FLOAT16), int(BOOL));
    for (const Field& field : FIELDS) add("%s: %s at byte %d\n", field.name, field.type, int(field.offset));
    add("Tensor: %d bytes\nProblem: %d bytes\n", int(sizeof(Tensor)), int(sizeof(Problem)));
    add("ForwardResult: %d bytes\nBackwardResult: %d bytes\n", int(sizeof(ForwardResult)), int(sizeof(BackwardResult)));
  }
};
