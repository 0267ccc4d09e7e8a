// Reads and writes tensors, whatever their type and strides, and holds the kernels' own memory.
#pragma once

#include <limits>

#include "interface.h"

INLINE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

INLINE float float_from_half(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  // multiplies, since the exponents' biases differ by 112; a product brings subnormal numbers right as well
  const float scaled = float_from_bits(magnitude) * float_from_bits(0x77800000);
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  uint32_t bits;
  std::memcpy(&bits, &scaled, 4);
  if (magnitude >= 0x0f800000) bits |= 0x7f800000;  // infinite or NaN
  return float_from_bits(bits | sign);
}

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Rounds to nearest, ties to even, as half_from_float does; NaN stays NaN
INLINE uint16_t bfloat16_from_float(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE uint16_t half_from_float(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  // rounds to a subnormal half, a multiple of 2^-24, the distance of floats from 1/2 on
  const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t half = magnitude < 0x38800000 ? subnormal : magnitude < 0x47800000 ? normal : large;
  return uint16_t(half | (bits >> 16 & 0x8000));
}

template <class Element, class Convert>
INLINE void convert_row(const char* data, int64_t stride, int64_t n, Real* out, Convert convert) {
  const Element* p = reinterpret_cast<const Element*>(data);
  if (stride == 1)
    for (int64_t i = 0; i < n; i++) out[i] = Real(convert(p[i]));
  else
    for (int64_t i = 0; i < n; i++) out[i] = Real(convert(p[i * stride]));
}

// Reads n numbers of the last dimension, whatever their type, starting at `data`
static void read_row(const Tensor& tensor, const char* data, int64_t n, Real* out) {
  const int64_t stride = tensor.strides[3];
  switch (tensor.type) {
    case FLOAT32: return convert_row<float>(data, stride, n, out, [](float x) { return x; });
    case FLOAT64: return convert_row<double>(data, stride, n, out, [](double x) { return x; });
    case BFLOAT16:
      return convert_row<uint16_t>(data, stride, n, out, [](uint16_t x) { return float_from_bits(uint32_t(x) << 16); });
    case FLOAT16: return convert_row<uint16_t>(data, stride, n, out, float_from_half);
    case BOOL: return convert_row<uint8_t>(data, stride, n, out, [](uint8_t x) { return x ? Real(0) : -std::numeric_limits<Real>::infinity(); });
  }
}

template <class Element, class Convert>
INLINE void write_converted(char* data, int64_t stride, int64_t n, const Real* in, Convert convert) {
  Element* p = reinterpret_cast<Element*>(data);
  if (stride == 1)
    for (int64_t i = 0; i < n; i++) p[i] = convert(in[i]);
  else
    for (int64_t i = 0; i < n; i++) p[i * stride] = convert(in[i]);
}

// Goes the other way: writes n numbers to where `data` points
static void write_row(const Tensor& tensor, const char* data, int64_t n, const Real* in) {
  char* out = const_cast<char*>(data);
  const int64_t stride = tensor.strides[3];
  switch (tensor.type) {
    case FLOAT32: return write_converted<float>(out, stride, n, in, [](Real x) { return float(x); });
    case FLOAT64: return write_converted<double>(out, stride, n, in, [](Real x) { return double(x); });
    case BFLOAT16: return write_converted<uint16_t>(out, stride, n, in, [](Real x) { return bfloat16_from_float(float(x)); });
    case FLOAT16:
#if defined(NEURAL_ATTENTION_AVX512) && !defined(NEURAL_ATTENTION_FLOAT64)
      for (; stride == 1 && n >= LANES; n -= LANES, in += LANES, out += 2 * LANES)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph((__m512)load(in), _MM_FROUND_TO_NEAREST_INT));
#endif
      return write_converted<uint16_t>(out, stride, n, in, [](Real x) { return half_from_float(float(x)); });
  }
}

// Returns whether rows of `width` numbers can be read as whole vectors where they lie
INLINE bool lies_as_rows(const Tensor& tensor, int64_t width) { return tensor.is_plain() && width % LANES == 0; }

// Points to rows of numbers, `stride` apart
struct Rows {
  const Real* data;
  int64_t stride;
};

// Reads `count` rows of `width` numbers, as they lie where that will do, else copied to `room` [count, padded], zeros behind
static Rows read_rows(const Tensor& tensor, const char* data, int64_t count, int64_t width, Real* room) {
  if (lies_as_rows(tensor, width)) return {reinterpret_cast<const Real*>(data), tensor.strides[2]};
  const int64_t padded = round_up(width, LANES);
  for (int64_t i = 0; i < count; i++) {
    read_row(tensor, data + i * tensor.strides[2] * tensor.element_size(), width, room + i * padded);
    for (int64_t d = width; d < padded; d++) room[i * padded + d] = 0;
  }
  return {room, padded};
}

// Reads `count` rows of `width` numbers as the columns of out [width, ld]; columns up to the next multiple of LANES are zero.
// `row` is room for LANES rows of round_up(width, LANES) numbers.
static void read_transposed(const Tensor& tensor, const char* data, int64_t count, int64_t width, Real* out, int64_t ld,
                            Real* row) {
  if (width < LANES) {  // few columns: each by itself
    Tensor column = tensor;
    column.strides[3] = tensor.strides[2];
    for (int64_t d = 0; d < width; d++) {
      read_row(column, data + d * tensor.strides[3] * tensor.element_size(), count, out + d * ld);
      for (int64_t i = count; i < round_up(count, LANES); i++) out[d * ld + i] = 0;
    }
    return;
  }
  const int64_t row_bytes = tensor.strides[2] * tensor.element_size();
  const int64_t padded = round_up(width, LANES);
  for (int64_t first = 0; first < count; first += LANES) {
    const int64_t here = count - first < LANES ? count - first : LANES;
    const bool in_place = here == LANES && lies_as_rows(tensor, width);
    if (!in_place) {
      if (here < LANES || width < padded) std::memset(row, 0, sizeof(Real) * LANES * padded);
      for (int64_t i = 0; i < here; i++) read_row(tensor, data + (first + i) * row_bytes, width, row + i * padded);
    }
    const Real* from = in_place ? reinterpret_cast<const Real*>(data + first * row_bytes) : row;
    const int64_t stride = in_place ? tensor.strides[2] : padded;
    for (int64_t d = 0; d < width; d += LANES) {
      Vec block[LANES];
      unroll<LANES>([&](auto i) INLINE_LAMBDA { block[i] = load(from + i * stride + d); });
      transpose(block);
      const int64_t columns = width - d < LANES ? width - d : LANES;
      if (columns == LANES)
        unroll<LANES>([&](auto i) INLINE_LAMBDA { store(out + (d + i) * ld + first, block[i]); });
      else
        for (int64_t i = 0; i < columns; i++) store(out + (d + i) * ld + first, block[i]);
    }
  }
}

// Computes out [rows, ld] = weight [rows, width] times columns [width, ld_in], plus bias; `count` columns, in vectors
static void project(const Real* weight, const Real* bias, int64_t rows, int64_t width, const Real* columns, int64_t ld_in,
                    int64_t count, Real* out, int64_t ld) {
  for (int64_t j = 0; j < count; j += LANES) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      Vec sum[4];
      unroll<4>([&](auto i) INLINE_LAMBDA { sum[i] = splat(bias[r + i]); });
      for (int64_t d = 0; d < width; d++) {
        const Vec x = load(columns + d * ld_in + j);
        unroll<4>([&](auto i) INLINE_LAMBDA { sum[i] += x * weight[(r + i) * width + d]; });
      }
      unroll<4>([&](auto i) INLINE_LAMBDA { store(out + (r + i) * ld + j, sum[i]); });
    }
    for (; r < rows; r++) {
      Vec sum = splat(bias[r]);
      for (int64_t d = 0; d < width; d++) sum += load(columns + d * ld_in + j) * weight[r * width + d];
      store(out + r * ld + j, sum);
    }
  }
}

// Holds memory shared by the threads
struct Buffer {
  Real* const data;
  explicit Buffer(int64_t count) : data(new Real[count > 0 ? count : 1]) {}
  ~Buffer() { delete[] data; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// Holds a thread's memory, in pieces that start at vector boundaries
class Scratch {
 public:
  INLINE Real* take(int64_t count) {
    Real* piece = next_;
    next_ += round_up(count, LANES);
    return piece;
  }
  explicit Scratch(int64_t count) : memory_(new char[count * sizeof(Real) + 2 * VECTOR_BYTES]) {
    next_ = reinterpret_cast<Real*>(round_up(reinterpret_cast<int64_t>(memory_), VECTOR_BYTES));
  }
  ~Scratch() { delete[] memory_; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  char* memory_;
  Real* next_;
};
