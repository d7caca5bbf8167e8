// adamw_: one step of Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101) over all regions, in
// place.
//
//   g = grad * scale * min(1, max_norm / (norm * scale + 1e-6))        the second factor only if max_norm > 0
//   m = beta1 m + (1 - beta1) g
//   v = beta2 v + (1 - beta2) g^2
//   w = (1 - lr weight_decay) w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// t is the row's own step count, this step included; weight decay reaches the first `decay` elements of a row. The step
// is skipped where norm * scale is not finite or found_inf is not zero: nothing changes then but `skipped`. An element
// is read and written once, 28 bytes in all; those of the gradients are left alone. Results do not depend on threads.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace stackbert {

// Dense [rows, size] each.
struct AdamWRegion {
  float* weights;
  const float* grads;
  float* exp_avg;
  float* exp_avg_sq;
  float* steps;      // [rows]: steps that each row has taken
  bfloat16* copies;  // the new weights once more, or null
  int64_t rows, size, decay;
};

struct AdamW {
  const AdamWRegion* regions;
  int64_t count;
  double lr, beta1, beta2, eps, weight_decay, max_norm;
  const float* norm;       // scalar: the norm of all gradients as they are; or null: 0
  const float* scale;      // scalar, or null: 1
  const float* found_inf;  // scalar, or null: 0
  float* skipped;          // [2]: steps skipped in all, and in a row until now; or null
  int threads;
};

STACKBERT_CPU_KERNEL(adamw, AdamW)

// global_norm: the square root of the sum of the squares of all elements of all tensors, deterministic: elements are
// summed in float32 a few hundred at a time, those sums in double, in one order. Not finite where an element is not, or
// where the squares of a few hundred sum to more than float32 holds: adamw skips its step then.
struct NormTensor {
  const float* elements;  // dense
  int64_t size;
};

struct GlobalNorm {
  const NormTensor* tensors;
  int64_t count;
  double* partials;  // [sum of norm_blocks(size)]
  float* norm;       // scalar
  int threads;
};

constexpr int64_t kNormBlock = 8192;  // elements of a task
static inline int64_t norm_blocks(int64_t size) { return (size + kNormBlock - 1) / kNormBlock; }

STACKBERT_CPU_KERNEL(global_norm, GlobalNorm)

// On a GPU the regions are a table in device memory, made when addresses or sizes change, which they seldom do.
namespace cuda {

constexpr int kAdamWElements = 2048;  // of a block

// A row: size elements, of which the first `decay` have weight decay.
struct AdamWLine {
  float* weights;
  const float* grads;
  float* exp_avg;
  float* exp_avg_sq;
  bfloat16* copies;  // or null
  float* step;
  int64_t size, decay;
  int64_t first;  // the row's first block; it has one for every kAdamWElements elements or a part of them
  int64_t wide;   // so many of its blocks are whole, at addresses that are multiples of 16 bytes
};
static_assert(sizeof(AdamWLine) == 80, "ops/optimizer/segments.py makes lines of ten int64");

struct AdamW {
  const AdamWLine* table;  // [rows], at a multiple of 16 bytes, as are lines and factors; on the device, as are those
  const int32_t* lines;    // [blocks]: the row that each works on
  float* factors;          // [2 + 2 rows]: scratch
  int64_t rows, blocks;
  double lr, beta1, beta2, eps, weight_decay, max_norm;
  const float* norm;       // these as on the CPU, in device memory
  const float* scale;      // or null
  const float* found_inf;  // or null
  float* skipped;          // [2], or null
};

// Two launches: the first decides and counts, the second moves the elements. `copies` are rounded to nearest.
void adamw(const AdamW& arguments, int device, void* stream);

constexpr int kNormElements = 4096;  // of a block

struct NormLine {
  const float* elements;
  int64_t size, first, wide;  // as in AdamWLine, of kNormElements elements
};
static_assert(sizeof(NormLine) == 32, "ops/optimizer/segments.py makes lines of four int64");

struct GlobalNorm {
  const NormLine* table;  // [tensors], at a multiple of 16 bytes; on the device, as all that follows
  const int32_t* lines;   // [blocks]
  float* partials;        // [blocks]
  float* norm;            // scalar
  int64_t blocks;
};

// Two launches: a sum of each block, and their sum.
void global_norm(const GlobalNorm& arguments, int device, void* stream);

}  // namespace cuda

}  // namespace stackbert
