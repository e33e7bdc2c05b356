// Vectors of floats as wide as the instruction set that this file is compiled for. The compiler's own vector types
// (GCC, Clang) turn into its instructions; everything has internal linkage, since code for one instruction set must
// never be linked into another's.
#pragma once

#include <stdint.h>

#ifndef MEGATRON_MED_VECTOR_BYTES
#define MEGATRON_MED_VECTOR_BYTES 16
#endif

namespace {

typedef float Floats __attribute__((vector_size(MEGATRON_MED_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(MEGATRON_MED_VECTOR_BYTES)));
typedef uint32_t Bits __attribute__((vector_size(MEGATRON_MED_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(MEGATRON_MED_VECTOR_BYTES / 2)));

constexpr int64_t kLanes = MEGATRON_MED_VECTOR_BYTES / 4;

struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

inline Floats broadcast(float x) { return Floats{} + x; }

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline Floats load(const float* from) {
  Floats x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline Floats load(const BFloat16* from) {
  Halves x;
  __builtin_memcpy(&x, from, sizeof x);
  return bit_cast<Floats>(__builtin_convertvector(x, Bits) << 16);
}

inline void store(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof x); }

// Rounded to the nearest, ties to even; not a number stays not a number.
inline void store(BFloat16* to, Floats x) {
  const Bits bits = bit_cast<Bits>(x);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves narrow = __builtin_convertvector(x == x ? rounded : Bits{} + 0x7fc0, Halves);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

inline void store_one(float* to, float x) { *to = x; }
inline void store_one(BFloat16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  to->bits = x == x ? static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

// x as it would be read back after it was stored as T.
template <typename T>
inline Floats rounded(Floats x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  T kept[kLanes];
  store(kept, x);
  return load(kept);
}

// Which places of a vector are used: all of them, or the first few. What is read into the others is `rest`.
struct Whole {};
struct Part {
  int64_t count;
};

template <typename T>
inline Floats load(const T* from, Whole, float = 0) {
  return load(from);
}

inline Floats load(const float* from, Part part, float rest = 0) {
  Floats x = broadcast(rest);
  __builtin_memcpy(&x, from, part.count * sizeof(float));
  return x;
}

inline Floats load(const BFloat16* from, Part part, float rest = 0) {
  float kept[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) kept[lane] = lane < part.count ? to_float(from[lane]) : rest;
  return load(kept);
}

template <typename T>
inline void store(T* to, Floats x, Whole) {
  store(to, x);
}

template <typename T>
inline void store(T* to, Floats x, Part part) {
  T kept[kLanes];
  store(kept, x);
  __builtin_memcpy(to, kept, part.count * sizeof(T));
}

// Calls work(i, Whole{}) for places [i, i + kLanes), and work(i, Part{count}) for those behind the last whole vector.
template <typename Work>
inline void over(int64_t width, const Work& work) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) work(i, Whole{});
  if (i < width) work(i, Part{width - i});
}

template <int kCount>
inline float sum_of(const float* x) {
  if constexpr (kCount == 1) {
    return *x;
  } else {
    typedef float Half __attribute__((vector_size(kCount * 2)));
    Half low, high;
    __builtin_memcpy(&low, x, sizeof low);
    __builtin_memcpy(&high, x + kCount / 2, sizeof high);
    const Half both = low + high;
    float lanes[kCount / 2];
    __builtin_memcpy(lanes, &both, sizeof both);
    return sum_of<kCount / 2>(lanes);
  }
}

// The sum of the lanes, pairwise.
inline float sum(Floats x) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &x, sizeof x);
  return sum_of<static_cast<int>(kLanes)>(lanes);
}

inline float largest(Floats x) {
  float found = x[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) found = x[lane] > found ? x[lane] : found;
  return found;
}

// e^x for x <= 88, within 2 units in the last place; 0 below -87; what is not a number stays so. 2^n * e^r with
// r = x - n ln 2 in two parts, and the Taylor polynomial of degree 7 for |r| <= ln(2)/2.
inline Floats exp(Floats x) {
  const Floats bounded = x > -87.0f ? x : broadcast(-87.0f);
  const Floats shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: what is added rounds to a whole number
  const Floats n = shifted - 12582912.0f;
  const Floats r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  return x > -87.0f ? y * bit_cast<Floats>(exponent) : x == x ? Floats{} : x;
}

// 1 / (1 + e^-x), without overflow.
inline Floats sigmoid(Floats x) {
  const Floats small = exp(x > 0 ? -x : x);  // at most 1
  return (x > 0 ? broadcast(1.0f) : small) / (1.0f + small);
}

}  // namespace
