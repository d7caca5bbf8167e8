// bias_gelu: y = gelu(x + bias), and its gradients. R rows, C columns, dense; arithmetic is fp32 whatever the dtype.
//
//   erf    gelu(u) = u Phi(u), Phi the normal distribution function
//   tanh   gelu(u) = u / (1 + exp(-2 v)), v = sqrt(2 / pi) (u + 0.044715 u^3): what 0.5 u (1 + tanh v) is, without its
//   cancellation
//
// dbias has the same bits for any number of threads.
#pragma once

#include "common/column_sums.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace stackbert {

struct BiasGeluFwd {
  const void* x;      // [R, C] dtype
  const float* bias;  // [C]
  void* y;            // [R, C] dtype
  int64_t rows, columns;
  DType dtype;  // float32, bfloat16
  bool tanh;
  int threads;
};

struct BiasGeluBwd {
  const void* dy;     // [R, C] dtype
  const void* x;      // [R, C] dtype
  const float* bias;  // [C]
  void* dx;           // [R, C] dtype
  float* dbias;       // [C]
  int64_t rows, columns;
  DType dtype;
  bool tanh;
  float* workspace;  // bias_gelu_workspace(R, C)
  int threads;
};

// Floats: a row of partial sums for each chunk.
static inline int64_t bias_gelu_workspace(int64_t rows, int64_t columns) {
  return row_chunks(rows).count * padded(columns);
}

// On a GPU: float16 too, `threads` unused.
namespace cuda {
int64_t bias_gelu_bwd_workspace(int64_t rows, int64_t columns, int device);  // floats; aligned to 16 bytes
void bias_gelu_fwd(const BiasGeluFwd& a, int device, void* stream);
void bias_gelu_bwd(const BiasGeluBwd& a, int device, void* stream);
}  // namespace cuda

STACKBERT_CPU_KERNEL(bias_gelu_fwd, BiasGeluFwd)
STACKBERT_CPU_KERNEL(bias_gelu_bwd, BiasGeluBwd)

}  // namespace stackbert
