// The random bytes of dropout, kLanes Philox calls at a time. common/philox.h says which byte belongs to which element.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

namespace stackbert {
namespace STACKBERT_ISA {

// The 64-bit products a[i] * m as low and high words.
inline void multiply(Words a, uint32_t m, Words& low, Words& high) {
#if defined(__AVX512F__)
  const __m512i x = bit_cast<__m512i>(a), factor = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  low = bit_cast<Words>(_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, static_cast<_MM_PERM_ENUM>(0xA0)));
  high = bit_cast<Words>(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
#elif defined(__AVX2__)
  const __m256i x = bit_cast<__m256i>(a), factor = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
  low = bit_cast<Words>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
  high = bit_cast<Words>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
#else
  typedef uint64_t Wide __attribute__((vector_size(kLanes * 8)));
  const Wide product = __builtin_convertvector(a, Wide) * m;
  low = __builtin_convertvector(product, Words);
  high = __builtin_convertvector(product >> 32, Words);
#endif
}

inline void philox(PhiloxKey key, Words c[4]) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Words low0, high0, low1, high1;
    multiply(c[0], kPhiloxM0, low0, high0);
    multiply(c[2], kPhiloxM1, low1, high1);
    c[0] = high1 ^ c[1] ^ key.k0, c[1] = low1;
    c[2] = high0 ^ c[3] ^ key.k1, c[3] = low0;
    key.k0 += kPhiloxW0, key.k1 += kPhiloxW1;
  }
}

inline Words lane_numbers() {
  Words v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<uint32_t>(i);
  return v;
}

// Bytes of columns [first, first + 16 * kLanes) of one token; first must be a multiple of 16.
constexpr int kRowBytes = 16 * kLanes;
inline void row_bytes(PhiloxKey key, int64_t token, int64_t first, uint8_t* bytes) {
#if defined(__AVX512F__)
  // A call in each 64-bit lane, its words in the lower halves: vpmuludq multiplies just those and gives both words of
  // the product, and what is left in the upper halves never matters. Lanes hold calls 0 4 1 5 2 6 3 7, so that the
  // words come out in order.
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i calls = _mm512_add_epi64(_mm512_set1_epi64(first / 16), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  __m512i c0[2] = {calls, _mm512_add_epi64(calls, _mm512_set1_epi64(8))}, c1[2], c2[2], c3[2];
  for (int i = 0; i < 2; ++i) {
    c1[i] = _mm512_set1_epi64(token), c2[i] = _mm512_set1_epi64(token >> 32), c3[i] = _mm512_setzero_si512();
  }
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i k0 = _mm512_set1_epi32(static_cast<int>(key.k0)), k1 = _mm512_set1_epi32(static_cast<int>(key.k1));
    for (int i = 0; i < 2; ++i) {
      const __m512i p0 = _mm512_mul_epu32(c0[i], m0), p1 = _mm512_mul_epu32(c2[i], m1);
      const __m512i high0 = _mm512_shuffle_epi32(p0, _MM_PERM_DDBB), high1 = _mm512_shuffle_epi32(p1, _MM_PERM_DDBB);
      c0[i] = _mm512_ternarylogic_epi32(high1, c1[i], k0, 0x96), c1[i] = p1;  // 0x96: exclusive or of three
      c2[i] = _mm512_ternarylogic_epi32(high0, c3[i], k1, 0x96), c3[i] = p0;
    }
    key.k0 += kPhiloxW0, key.k1 += kPhiloxW1;
  }
  for (int i = 0; i < 2; ++i) {
    const __m512i low = _mm512_mask_shuffle_epi32(c0[i], 0xAAAA, c1[i], _MM_PERM_CCAA);
    const __m512i high = _mm512_mask_shuffle_epi32(c2[i], 0xAAAA, c3[i], _MM_PERM_CCAA);
    _mm512_storeu_si512(bytes + 128 * i, _mm512_unpacklo_epi64(low, high));
    _mm512_storeu_si512(bytes + 128 * i + 64, _mm512_unpackhi_epi64(low, high));
  }
#else
  Words c[4] = {lane_numbers() + static_cast<uint32_t>(first / 16), Words{} + static_cast<uint32_t>(token),
                Words{} + static_cast<uint32_t>(static_cast<uint64_t>(token) >> 32), Words{}};
  philox(key, c);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int word = 0; word < 4; ++word) {
      const uint32_t bits = c[word][lane];
      std::memcpy(bytes + 16 * lane + 4 * word, &bits, 4);
    }
#endif
}

// Bytes of keys [0, 64 * blocks) of queries [query, query + kMaskQueries), a query after the other.
constexpr int kMaskQueries = 4;
inline void attention_bytes(PhiloxKey key, uint32_t sequence, uint32_t head, uint32_t query, uint32_t blocks,
                            uint8_t* bytes) {
  uint32_t block = 0;
  for (int64_t group = 0; group < kMaskQueries * static_cast<int64_t>(blocks); group += kLanes / 4) {
    // Four neighbouring lanes, t = 0..3, draw for the 64 keys of a block: short sequences share a call.
    uint32_t counter[kLanes], queries[kLanes];
    for (int lane = 0; lane < kLanes; lane += 4) {
      for (int t = 0; t < 4; ++t) counter[lane + t] = 4 * block + t, queries[lane + t] = query;
      if (++block == blocks) block = 0, ++query;
    }
    Words c[4] = {Words{}, Words{}, Words{} + head, Words{} + sequence};
    std::memcpy(&c[0], counter, sizeof c[0]);
    std::memcpy(&c[1], queries, sizeof c[1]);
    philox(key, c);
    // Word w of the four lanes holds keys 16w .. 16w + 15: the low halves the first eight, the high halves the rest.
    for (int part = 0; part < kLanes / 4; ++part, bytes += 64)
      for (int word = 0; word < 4; ++word) {
#if defined(__AVX512F__) || defined(__AVX2__)
        __m128i lanes;
        std::memcpy(&lanes, reinterpret_cast<const char*>(&c[word]) + 16 * part, 16);
        lanes = _mm_shuffle_epi8(lanes, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
        std::memcpy(bytes + 16 * word, &lanes, 16);
#else
        for (int t = 0; t < 4; ++t) {
          const uint32_t bits = c[word][4 * part + t];
          const uint16_t low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits >> 16);
          std::memcpy(bytes + 16 * word + 2 * t, &low, 2);
          std::memcpy(bytes + 16 * word + 8 + 2 * t, &high, 2);
        }
#endif
      }
  }
}

// Which of kLanes elements are kept, byte >= threshold, as a condition for `kept`.
#if defined(__AVX512F__)
typedef __mmask16 Kept;
inline Kept kept_lanes(const uint8_t* bytes, int threshold) {
  __m128i random;
  std::memcpy(&random, bytes, sizeof random);
  return _mm_cmpge_epu8_mask(random, _mm_set1_epi8(static_cast<char>(threshold)));
}
inline Floats kept(Kept lanes, Floats x, float scale) {
  return bit_cast<Floats>(_mm512_maskz_mul_ps(lanes, bit_cast<__m512>(x), _mm512_set1_ps(scale)));
}
#else
typedef Ints Kept;
inline Kept kept_lanes(const uint8_t* bytes, int threshold) {
  Bytes random;
  std::memcpy(&random, bytes, sizeof random);
#if defined(__AVX2__)
  const Ints wide = bit_cast<Ints>(_mm256_cvtepu8_epi32(_mm_set1_epi64x(bit_cast<int64_t>(random))));
#else
  const Ints wide = __builtin_convertvector(random, Ints);
#endif
  return wide >= threshold;
}
inline Floats kept(Kept lanes, Floats x, float scale) { return select(lanes, x * scale, Floats{}); }
#endif

// x * scale where byte >= threshold, 0 elsewhere.
inline Floats keep(Floats x, const uint8_t* bytes, int threshold, float scale) {
  return kept(kept_lanes(bytes, threshold), x, scale);
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
