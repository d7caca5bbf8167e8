// cross_entropy: the masked-LM loss of a chunk of rows, from logits that a matrix product left without the bias. R
// rows, V words, dense.
//   losses[r] = log sum_v exp(z[r, v]) - z[r, labels[r]],  z = logits + bias
//   logits    = d (scale * sum of losses) / d z, in place, where a gradient is wanted
// Arithmetic and sums are fp32 whatever the dtype. A bias of -inf takes its word out: probability and gradient are 0.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace stackbert {

// The bias gradient comes as sums over this many rows each, so that it does not depend on the number of threads.
constexpr int64_t kCrossEntropyRows = 16;

struct CrossEntropy {
  void* logits;           // [R, V] dtype
  const float* bias;      // [V]
  const int64_t* labels;  // [R], each in [0, V)
  float* losses;          // [R]
  float* bias_parts;      // [ceil(R / 16), V] column sums of the gradient; null = not wanted
  bool* correct;          // [R] whether the label is the first word with the highest z; null = not wanted
  int64_t rows, vocabulary;
  DType dtype;    // float32, bfloat16
  bool gradient;  // false leaves logits alone
  float scale;
  int threads;
};

STACKBERT_CPU_KERNEL(cross_entropy, CrossEntropy)

}  // namespace stackbert
