// What the steps of the optimizers share on a GPU. A table of lines says where each stretch of elements is; a block
// works on a stretch's kElements from block * kElements on.
#pragma once

#include <limits>

#include "common/rows.cuh"

namespace stackbert {
namespace cuda {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// base^n by squaring: the same digits as on the CPU.
STACKBERT_DEVICE double power(double base, int64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1, base *= base)
    if (n & 1) result *= base;
  return result;
}

struct Decision {
  bool skip;
  float factor;  // of the gradients
};

template <typename Step>
STACKBERT_DEVICE Decision decide(const Step& a) {
  const float scale = a.scale ? ptx::load(a.scale) : 1.f, norm = (a.norm ? ptx::load(a.norm) : 0.f) * scale;
  const bool finite = norm > -kInfinity && norm < kInfinity;  // false for NaN
  const float clip = a.max_norm > 0.0 ? static_cast<float>(a.max_norm) / (norm + 1e-6f) : 1.f;
  return {!finite || (a.found_inf && !(ptx::load(a.found_inf) == 0.f)), scale * (clip < 1.f ? clip : 1.f)};
}

// By one thread of a step.
STACKBERT_DEVICE void count(float* skipped, bool skip) {
  if (!skipped) return;
  ptx::store(skipped, ptx::load(skipped) + (skip ? 1.f : 0.f));
  ptx::store(skipped + 1, skip ? ptx::load(skipped + 1) + 1.f : 0.f);
}

// A line of a table, in registers: sixteen bytes a load.
template <typename Line>
STACKBERT_DEVICE Line load_line(const Line* at) {
  struct Words {
    ptx::Words4 v[sizeof(Line) / 16];
  } words;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Line) / 16); ++i)
    words.v[i] = ptx::load(reinterpret_cast<const ptx::Words4*>(at) + i);
  return ptx::bits_as<Line>(words);
}

// What a thread of kThreads has of the sum of the squares of elements first .. first + kElements - 1, as far as there
// are so many; wide: there are, at an address for accesses of 16 bytes.
template <int kElements, int kThreads>
STACKBERT_DEVICE float squares(const float* elements, int64_t size, int64_t first, bool wide) {
  constexpr int kVectors = kElements / (4 * kThreads);
  static_assert(kVectors * 4 * kThreads == kElements, "whole vectors");
  const int t = static_cast<int>(threadIdx.x);
  float sum = 0.f;
  if (wide) {
    ptx::Vec<float, 4> x[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      x[v] = ptx::load(reinterpret_cast<const ptx::Vec<float, 4>*>(elements + first) + v * kThreads + t);
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int k = 0; k < 4; ++k) sum += x[v].v[k] * x[v].v[k];
  } else {
    const int64_t left = size - first;
#pragma unroll 1
    for (int e = t; e < kElements && e < left; e += kThreads) {
      const float x = ptx::load(elements + first + e);
      sum += x * x;
    }
  }
  return sum;
}

// Of `count` partial sums, in double until they are a block's. As of block_sum: two in a row need two places.
template <int kThreads>
STACKBERT_DEVICE float total(const float* partials, int64_t count, ptx::Shared<float> scratch) {
  double own = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) own += static_cast<double>(ptx::load(partials + i));
  return block_sum<kThreads / 32>(static_cast<float>(own), scratch);
}

// Four new weights once more, rounded to nearest.
STACKBERT_DEVICE void store_copies(bfloat16* at, const ptx::Vec<float, 4>& w) {
  const ptx::Vec<uint32_t, 2> packed{{ptx::pack<bfloat16>(w.v[0], w.v[1]), ptx::pack<bfloat16>(w.v[2], w.v[3])}};
  ptx::store_once(reinterpret_cast<ptx::Vec<uint32_t, 2>*>(at), packed);
}
STACKBERT_DEVICE void store_copies(bfloat16* at, const ptx::Vec<float, 1>& w) {
  Elements<bfloat16, 1>::from_floats(w.v).store(at);
}

}  // namespace cuda
}  // namespace stackbert
