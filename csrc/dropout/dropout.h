// dropout: y = x * keep / keep_rate, element by element, with the row mask of common/philox.h. Its own gradient: dx is
// the same function of dy. R rows (tokens), C columns, dense.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace stackbert {

struct Dropout {
  const void* x;  // [R, C] dtype
  void* y;        // [R, C] dtype; may be x
  int64_t rows, columns;
  DType dtype;         // float32, bfloat16
  const int64_t* rng;  // [2] seed, step
  uint32_t site;
  int threshold;  // round(256 p), 1..255
  int threads;
};

// On a GPU: float16 too, columns below 2^31, `threads` unused.
namespace cuda {
void dropout(const Dropout& a, int device, void* stream);
}  // namespace cuda

STACKBERT_CPU_KERNEL(dropout, Dropout)

}  // namespace stackbert
