// The statistics that layer_norm normalises a row with.
#pragma once

#include "common/simd.h"

namespace stackbert {
namespace STACKBERT_ISA {

struct Statistics {
  float mean, rstd;
};

// Of the row z [C], whose sum lane by lane is `total`. at(c) is called for each vector, to ask for what is wanted next:
// meanwhile arithmetic goes on in cache.
template <typename At>
inline Statistics statistics(const float* z, int64_t columns, Floats total, float eps, const At& at) {
  // Second pass: E[(z - m)^2] keeps its digits when |m| >> std, E[z^2] - m^2 does not. The sum of z - m is what
  // rounding left out of m.
  const float share = 1.f / static_cast<float>(columns), near_mean = sum(total) * share;
  Floats rest = {}, square = {};
  for_vectors(0, columns, [&](int64_t c, auto part) {
    at(c);
    const Floats centred = first(load(z + c, part) - near_mean, part);
    rest += centred;
    square += centred * centred;
  });
  const float correction = sum(rest) * share;
  const float variance = sum(square) * share - correction * correction;
  return {near_mean + correction, 1.f / __builtin_sqrtf((variance < 0.f ? 0.f : variance) + eps)};
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
