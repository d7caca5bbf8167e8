// Vectors of floats in the compiler's vector extensions: the same code is AVX-512, AVX2, SSE2 or NEON, by the flags
// with which the including file is compiled. Everything lives in the instruction set's own namespace, and nothing here
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

// The conversions between widths are spelled out: GCC 12 makes __builtin_convertvector of them element by element.
inline Floats load(const bfloat16* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bit_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
  Halves half;
  std::memcpy(&half, p, sizeof half);
  return bit_cast<Floats>(__builtin_convertvector(half, Words) << 16);
#endif
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even. A NaN keeps its sign and becomes quiet instead of being carried over into an infinity.
inline Halves to_bfloat16(Floats v) {
  const Words bits = bit_cast<Words>(v);
#if defined(__AVX512F__)
  const __m512i x = bit_cast<__m512i>(bits), odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7FFF)), odd);
  // Where v is a NaN, of either kind (the first two classes of the table), v made quiet; elsewhere what was rounded.
  const __m512 chosen = _mm512_fixupimm_ps(bit_cast<__m512>(rounded), bit_cast<__m512>(v), _mm512_set1_epi32(0x22), 0);
  const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                         31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return bit_cast<Halves>(_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, bit_cast<__m512i>(chosen))));
#else
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;
  const Words chosen = (v == v) ? rounded : quiet;
#if defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(chosen), _mm256_setzero_si256());
  return bit_cast<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(chosen, Halves);
#endif
#endif
}

inline void store(bfloat16* p, Floats v) {
  const Halves half = to_bfloat16(v);
  std::memcpy(p, &half, sizeof half);
}

// The first n < kLanes elements; the other lanes are zero.
#if defined(__AVX512F__)
inline __mmask16 lanes_below(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Floats load_first(const float* p, int n) { return bit_cast<Floats>(_mm512_maskz_loadu_ps(lanes_below(n), p)); }
inline Floats load_first(const bfloat16* p, int n) {
  const __m256i half = _mm256_maskz_loadu_epi16(lanes_below(n), p);
  return bit_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store_first(float* p, Floats v, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), bit_cast<__m512>(v)); }
inline void store_first(bfloat16* p, Floats v, int n) {
  _mm256_mask_storeu_epi16(p, lanes_below(n), bit_cast<__m256i>(to_bfloat16(v)));
}
inline Floats first(Floats v, int n) {
  return bit_cast<Floats>(_mm512_maskz_mov_ps(lanes_below(n), bit_cast<__m512>(v)));
}
#else
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

// v with zeros in lanes n and up.
inline Floats first(Floats v, int n) {
  Floats kept = {};
  std::memcpy(&kept, &v, n * sizeof(float));
  return kept;
}
#endif

// What is left of a row at a vector's place: a whole vector, known at compile time, or its first n < kLanes elements.
struct Whole {};
template <typename T>
inline Floats load(const T* p, Whole) {
  return load(p);
}
template <typename T>
inline Floats load(const T* p, int n) {
  return load_first(p, n);
}
template <typename T>
inline void store(T* p, Floats v, Whole) {
  store(p, v);
}
template <typename T>
inline void store(T* p, Floats v, int n) {
  store_first(p, v, n);
}
inline Floats first(Floats v, Whole) { return v; }

// store(), past the caches where the instruction set can; p is aligned to what a whole vector takes in memory. For
// results that would leave the caches before they are read: nothing is fetched in order to be overwritten. End with
// streamed().
#if defined(__AVX512F__)
inline void stream(float* p, Floats v, Whole) { _mm512_stream_ps(p, bit_cast<__m512>(v)); }
inline void stream(bfloat16* p, Floats v, Whole) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(to_bfloat16(v)));
}
#elif defined(__AVX2__)
inline void stream(float* p, Floats v, Whole) { _mm256_stream_ps(p, bit_cast<__m256>(v)); }
inline void stream(bfloat16* p, Floats v, Whole) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(to_bfloat16(v)));
}
#else
template <typename T>
inline void stream(T* p, Floats v, Whole) {
  store(p, v);
}
#endif
template <typename T>
inline void stream(T* p, Floats v, int n) {
  store_first(p, v, n);
}
inline void streamed() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Asks for the line at p, which may be any address.
inline void prefetch(const void* p) { __builtin_prefetch(p); }

// body(i, part) for the vectors of [begin, end): part is Whole{}, or how many elements the last vector has.
template <typename Body>
inline void for_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, Whole{});
  if (i < end) body(i, static_cast<int>(end - i));
}

inline Floats select(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }
// Of a NaN and a number the second argument is taken, as by the machine's instructions.
#if defined(__AVX512F__)
inline Floats maximum(Floats a, Floats b) {
  return bit_cast<Floats>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
}
inline Floats minimum(Floats a, Floats b) {
  return bit_cast<Floats>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
}
#else
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
inline Floats minimum(Floats a, Floats b) { return a < b ? a : b; }
#endif
inline Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return bit_cast<Floats>(_mm512_sqrt_ps(bit_cast<__m512>(x)));
#elif defined(__AVX2__)
  return bit_cast<Floats>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#elif defined(__x86_64__)
  return bit_cast<Floats>(_mm_sqrt_ps(bit_cast<__m128>(x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
inline Floats absolute(Floats x) { return bit_cast<Floats>(bit_cast<Words>(x) & 0x7FFFFFFF); }

inline float sum(Floats v) {
  // In halves, which the compiler keeps in registers: by lanes it would go through memory.
  float lanes[4];
#if defined(__AVX2__)
  __m256 eight;
#if defined(__AVX512F__)
  __m256 halves[2];
  std::memcpy(halves, &v, sizeof halves);
  eight = _mm256_add_ps(halves[0], halves[1]);
#else
  std::memcpy(&eight, &v, sizeof eight);
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  std::memcpy(lanes, &four, sizeof lanes);
#else
  std::memcpy(lanes, &v, sizeof lanes);
#endif
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

inline float maximum(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// 1 / x within 1 ulp for normal x whose reciprocal is normal.
inline Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
  const Floats y = bit_cast<Floats>(_mm512_rcp14_ps(bit_cast<__m512>(x)));
  return y + y * (1.f - x * y);  // one Newton step from 14 bits
#else
  return 1.f / x;
#endif
}

// What rounding left out of product = a * b.
inline Floats product_error(Floats a, Floats b, Floats product) {
#if defined(__AVX512F__)
  return bit_cast<Floats>(_mm512_fmsub_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(product)));
#elif defined(__FMA__)
  return bit_cast<Floats>(_mm256_fmsub_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(product)));
#else
  // Dekker: the products of 12-bit halves are exact.
  const Floats a1 = bit_cast<Floats>(bit_cast<Words>(a) & 0xFFFFF000), a2 = a - a1;
  const Floats b1 = bit_cast<Floats>(bit_cast<Words>(b) & 0xFFFFF000), b2 = b - b1;
  return ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2;
#endif
}

// e^(x + tail) for |tail| << 1, within 2 ulp of the exact value of the sum; x in [-91, 89]. Subnormal results may be
// less exact.
inline Floats exp_in_range(Floats x, Floats tail) {
  const Floats shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the integer lands in the low mantissa bits
  const Floats n = shifted - 12582912.f;
  Floats r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in few bits
  r = r + n * 2.12194440e-4f + tail;
  Floats y = r * 1.38145401e-3f + 8.36874520e-3f;  // minimax in relative error on [-ln 2 / 2, ln 2 / 2]: 3e-9
  y = y * r + 4.16683908e-2f;
  y = y * r + 1.66665204e-1f;
  y = y * r + 4.99999934e-1f;
  y = y * r + 1.f;
  y = y * r + 1.f;
#if defined(__AVX512F__)
  return bit_cast<Floats>(_mm512_scalef_ps(bit_cast<__m512>(y), bit_cast<__m512>(n)));
#else
  // 2^n in two factors: 2^128 and 2^-127 do not fit a float's exponent field, their halves do.
  const Ints exponent = bit_cast<Ints>(shifted) - 0x4B400000;
  const Ints half = exponent >> 1;
  return y * bit_cast<Floats>((half + 127) << 23) * bit_cast<Floats>((exponent - half + 127) << 23);
#endif
}

// e^x within 2 ulp; 0 below -87.33 (subnormal results are flushed), +inf above 88.72. NaN stays NaN.
inline Floats exp(Floats x) {
  Floats y = exp_in_range(minimum(maximum(x, broadcast(-88.f)), broadcast(89.f)), Floats{});
  y = select(x < -87.33f, Floats{}, y);
  y = select(x > 88.72f, broadcast(__builtin_inff()), y);
  return select(x == x, y, x);
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
