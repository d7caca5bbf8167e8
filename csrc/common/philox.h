// Dropout masks: a pure function of (seed, step, site, coordinates), the same bits on every device and in every
// implementation. stackbert_kernels/ops/philox.py states the same in plain PyTorch and is what tests compare with.
//
// Philox4x32 (Salmon et al., SC'11) with 7 rounds, the fewest that pass BigCrush. One call gives 16 random bytes, one
// for each of 16 elements: keep when byte >= threshold.
//
//   subkey      = first two words of Philox(key = seed, counter = (step lo, step hi, site, 0))
//   row ops     : counter (column / 16, token lo, token hi, 0); the element's byte is number column % 16
//   attention   : counter (key / 64 * 4 + key % 8 / 2, query, head, sequence); byte number key % 64 / 8 * 2 + key % 2
//
// The attention order is that of a tensor-core accumulator: the lane that holds keys 8j + 2t and 8j + 2t + 1 of a
// query, for j = 0..7, finds all its 16 decisions in one call.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define STACKBERT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define STACKBERT_HOST_DEVICE inline
#endif

namespace stackbert {

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;  // key increments
constexpr int kPhiloxRounds = 7;

struct PhiloxKey {
  uint32_t k0, k1;
};

struct PhiloxWords {
  uint32_t w[4];
};

STACKBERT_HOST_DEVICE PhiloxWords philox(PhiloxKey key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0, p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key.k0,
                   n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key.k1;
    c0 = n0, c1 = static_cast<uint32_t>(p1), c2 = n2, c3 = static_cast<uint32_t>(p0);
    key.k0 += kPhiloxW0, key.k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// rng: the op's int64 [2] tensor, (seed, step).
STACKBERT_HOST_DEVICE PhiloxKey dropout_key(const int64_t* rng, uint32_t site) {
  const uint64_t seed = static_cast<uint64_t>(rng[0]), step = static_cast<uint64_t>(rng[1]);
  const PhiloxWords words = philox({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                                   static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), site, 0);
  return {words.w[0], words.w[1]};
}

// What is kept is scaled by the realised keep rate, so that the mean is exact whatever the rounding of p to 1/256.
STACKBERT_HOST_DEVICE float dropout_scale(int threshold) { return 256.f / static_cast<float>(256 - threshold); }

}  // namespace stackbert
