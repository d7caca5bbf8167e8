// lamb_: one step of LAMB (You et al. 2019, arXiv 1904.00962, algorithm 2) over all parts, in place. A part is one
// parameter of the model: a tensor, or a stretch of a bank's row.
//
//   g = grad * scale * min(1, max_norm / (norm * scale + 1e-6))        the second factor only if max_norm > 0
//   m = beta1 m + (1 - beta1) g
//   v = beta2 v + (1 - beta2) g^2
//   D = sqrt(v) / sqrt(1 - beta2^t) + eps
//   r = m / (1 - beta1^t) / D + weight_decay w
//   w = w - lr ratio(r) r                                              ratio(x) = |w| / |x|, 1 where either is 0
//
// lans_: one step of LANS (Zheng et al. 2020, arXiv 2006.13484), which has no max_norm:
//
//   g = grad * scale / (|grad * scale| + eps)                          grad * scale where that is 0
//   m, v, D and r as above
//   c = g / D + weight_decay w
//   w = w - lr (beta1 ratio(r) r + (1 - beta1) ratio(c) c)
//
// Norms are those of a part, w before the step. A part that is not `adapted` (a bias, a norm) has no weight decay and
// the ratio 1. t, and when a step is skipped, are as of adamw (optimizer.h). Deterministic: squares are summed in
// float32 a few hundred at a time, those sums in double, in one order; results do not depend on threads.
//
// Bytes that move for an element of float32, and 2 more for a copy:
//   squares   grad read                                                 lans  4
//   moments   w, grad, m, v read; m, v written              lamb 24     lans 24    and the norms of w, r, c
//   apply     w, m, v (lans: grad) read; w written          lamb 16     lans 20
//                                                           lamb 40     lans 48
// r and c are computed twice: to keep them would move 8 bytes more than to read w, m and v again.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace stackbert {

struct Part {
  float* weights;
  const float* grads;
  float* exp_avg;
  float* exp_avg_sq;
  bfloat16* copies;  // the new weights once more, or null
  float* step;       // steps taken; several parts of a row share it
  int64_t size;
  bool adapted;
  bool counts;  // the one of those parts that counts the step
};

constexpr int64_t kPartBlock = 8192;  // elements of a task
static inline int64_t part_blocks(int64_t size) { return (size + kPartBlock - 1) / kPartBlock; }

struct PartSums {
  double weights, r, c;  // squares; of a gradient's block in `weights`, first
};

// What all elements of a part share. All are rounded once, from double.
struct PartFactors {
  float gradient, mean, root, decay;
  float r, c;  // what those are subtracted times
};

struct Layerwise {
  const Part* parts;
  int64_t count;
  PartFactors* factors;  // [count]: scratch
  PartSums* sums;        // [sum of part_blocks(size)]: scratch
  double lr, beta1, beta2, eps, weight_decay, max_norm;
  const float* norm;  // these as of AdamW
  const float* scale;
  const float* found_inf;
  float* skipped;
  int threads;
};

STACKBERT_CPU_KERNEL(lamb, Layerwise)
STACKBERT_CPU_KERNEL(lans, Layerwise)

namespace cuda {

constexpr int kPartElements = 2048;  // of a block

struct PartLine {
  float* weights;
  const float* grads;
  float* exp_avg;
  float* exp_avg_sq;
  bfloat16* copies;  // or null
  float* step;
  int64_t size;
  int64_t flags;  // kAdapted, kCounts
  int64_t first;  // the part's first block
  int64_t wide;   // so many of its blocks are whole, at addresses that are multiples of 16 bytes
};
static_assert(sizeof(PartLine) == 80, "ops/optimizer/segments.py makes lines of ten int64");
constexpr int64_t kAdapted = 1, kCounts = 2;

struct Layerwise {
  const PartLine* table;  // [parts], at a multiple of 16 bytes, as are lines and factors; on the device, as all tensors
  const int32_t* lines;   // [blocks]: the part that each works on
  float* factors;         // [8 parts]: scratch
  float* partials;        // [3, blocks]: scratch
  int64_t parts, blocks;
  double lr, beta1, beta2, eps, weight_decay, max_norm;
  const float* norm;       // these as on the CPU
  const float* scale;      // or null
  const float* found_inf;  // or null
  float* skipped;          // [2], or null
};

// Four launches and five: (lans: squares of each block); a block for each part that decides and prepares; moments and
// the squares of each block; a block for each part that adds those up; apply.
void lamb(const Layerwise& arguments, int device, void* stream);
void lans(const Layerwise& arguments, int device, void* stream);

}  // namespace cuda

}  // namespace stackbert
