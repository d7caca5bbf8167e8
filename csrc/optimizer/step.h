// What the steps of the optimizers share on the CPU.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace stackbert {
namespace STACKBERT_ISA {

// base^n by squaring: the same digits wherever it is computed.
inline double power(double base, int64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1, base *= base)
    if (n & 1) result *= base;
  return result;
}

struct Decision {
  bool skip;
  float factor;  // of the gradients
};

// Counts the step, too.
template <typename Step>
inline Decision decide(const Step& a) {
  const float scale = a.scale ? *a.scale : 1.f, norm = (a.norm ? *a.norm : 0.f) * scale;
  const bool skip = !__builtin_isfinite(norm) || (a.found_inf && !(*a.found_inf == 0.f));
  if (a.skipped) a.skipped[0] += skip, a.skipped[1] = skip ? a.skipped[1] + 1.f : 0.f;
  const float clip = a.max_norm > 0.0 ? static_cast<float>(a.max_norm) / (norm + 1e-6f) : 1.f;
  return {skip, scale * (clip < 1.f ? clip : 1.f)};
}

constexpr int64_t kSummed = 512;  // elements: few enough for a sum in float32

inline double sum_of_squares(const float* x, int64_t begin, int64_t end) {
  double total = 0.0;
  for (int64_t i = begin; i < end; i += kSummed) {
    Floats squares{};
    for_vectors(i, i + kSummed < end ? i + kSummed : end, [&](int64_t c, auto part) {
      const Floats v = load(x + c, part);
      squares = squares + v * v;
    });
    total += sum(squares);
  }
  return total;
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
