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

// On a GPU the matrix product has added the bias, float16 is taken too, and the host does not look at labels: a row
// whose label is ignore_index has loss and gradient 0 and is not correct, one whose label is no word has NaN for both.
namespace cuda {
struct CrossEntropyRows {
  void* logits;           // [R, V] dtype, on 16 bytes, V a multiple of 16
  const int64_t* labels;  // [R], of which [0, words) are words
  const float* count;     // [] what the sum of losses is divided by
  float* losses;          // [R]
  bool* correct;          // [R] whether the label is the first word with the highest logit; null = not wanted
  float* sums;            // [blocks, V] column sums of the gradient, each over the rows of a block; null = not wanted
  int64_t rows, vocabulary, words, ignore_index;
  int64_t blocks;  // cross_entropy_blocks, asked once: gradient of any number of rows; 0: a row a block, without sums
  DType dtype;
  bool gradient;  // false leaves logits alone
  bool add;       // to the sums that an earlier chunk of rows left
};

// How many blocks take turns at the rows of a chunk; 0 where a row does not fit into a block.
int64_t cross_entropy_blocks(int64_t rows, int64_t vocabulary, DType dtype, int device);
void cross_entropy(const CrossEntropyRows& a, int device, void* stream);
}  // namespace cuda

}  // namespace stackbert
