// Vectors of floats in the compiler's vector extensions: the same code is AVX-512, AVX2, SSE2 or NEON, by the flags with
// which the including file is compiled. Everything lives in the instruction set's own namespace, and nothing here
// instantiates a standard template, so that the linker can never put AVX-512 code where a plain machine runs it.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#ifndef STACKBERT_ISA
#error "compile with -DSTACKBERT_ISA=generic, avx2 or avx512"
#endif

namespace stackbert {
namespace STACKBERT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectorRegisters = 16;
#else
constexpr int kLanes = 4, kVectorRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Floats broadcast(float x) { return x - Floats{}; }

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const bfloat16* p) {
  Halves half;
  std::memcpy(&half, p, sizeof half);
  return bit_cast<Floats>(__builtin_convertvector(half, Words) << 16);
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even. A NaN keeps its sign and becomes quiet instead of being carried over into an infinity.
inline void store(bfloat16* p, Floats v) {
  const Words bits = bit_cast<Words>(v);
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;
  const Halves half = __builtin_convertvector((v == v) ? rounded : quiet, Halves);
  std::memcpy(p, &half, sizeof half);
}

// The first n < kLanes elements; the other lanes are zero.
template <typename T>
inline Floats load_first(const T* p, int n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store_first(T* p, Floats v, int n) {
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

inline Floats select(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
inline Floats minimum(Floats a, Floats b) { return a < b ? a : b; }

inline float sum(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline float maximum(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// e^x within 2 ulp; 0 below -87.33 (subnormal results are flushed), +inf above 88.72. NaN stays NaN.
inline Floats exp(Floats x) {
  const Floats clamped = minimum(maximum(x, broadcast(-88.f)), broadcast(89.f));
  const Floats shifted = clamped * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the integer lands in the low mantissa bits
  const Floats n = shifted - 12582912.f;
  Floats r = clamped - n * 0.693359375f;  // ln 2 in two parts, the first exact in few bits
  r = r + n * 2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes expf
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  // 2^n in two factors: 2^128 and 2^-127 do not fit a float's exponent field, their halves do.
  const Ints exponent = bit_cast<Ints>(shifted) - 0x4B400000;
  const Ints half = exponent >> 1;
  y = y * bit_cast<Floats>((half + 127) << 23) * bit_cast<Floats>((exponent - half + 127) << 23);
  y = select(x < -87.33f, Floats{}, y);
  y = select(x > 88.72f, broadcast(__builtin_inff()), y);
  return select(x == x, y, x);
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
