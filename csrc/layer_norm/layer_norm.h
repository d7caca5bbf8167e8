// layer_norm and what BERT puts before it. R rows (tokens), C columns, all tensors dense.
//
//   z = residual + dropout(x + x_bias)             the mask is the row mask of common/philox.h
//   y = (z - mean) * rstd * weight + bias          over the columns of a row
//
// Without a residual z = x, and this is layer_norm. Arithmetic and statistics are fp32 whatever the dtype; z is never
// rounded to it. Backward gets the same inputs and the two statistics of each row and computes z and the mask again.
// Sums over rows (dweight, dbias, dx_bias) have the same bits for any number of threads.
#pragma once

#include "common/column_sums.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace stackbert {

struct SumInputs {
  const void* x;         // [R, C] dtype
  const void* residual;  // [R, C] dtype; null: z = x, and x_bias is null and threshold 0
  const float* x_bias;   // [C], or null
  int64_t rows, columns;
  DType dtype;         // float32, bfloat16
  const int64_t* rng;  // [2] seed, step; read only if threshold > 0
  uint32_t site;
  int threshold;  // round(256 p); 0 = no dropout
};

struct LayerNormFwd {
  SumInputs sum;
  const float* weight;  // [C]
  const float* bias;    // [C]
  float eps;
  void* y;           // [R, C] dtype
  float* mean;       // [R], or null: forward only
  float* rstd;       // [R], or null
  float* workspace;  // row_workspace(R, C, 0)
  int threads;
};

struct LayerNormBwd {
  SumInputs sum;
  const void* dy;       // [R, C] dtype
  const float* weight;  // [C]
  const float* mean;    // [R]
  const float* rstd;    // [R]
  void* dx;             // [R, C] dtype; null if there is no residual: dresidual is x's gradient
  void* dresidual;      // [R, C] dtype; the gradient of z
  float* dweight;       // [C]
  float* dbias;         // [C]
  float* dx_bias;       // [C], or null
  float* workspace;     // row_workspace(R, C, 4)
  int threads;
};

// y = z
struct DropoutAddFwd {
  SumInputs sum;
  void* y;           // [R, C] dtype
  float* workspace;  // row_workspace(R, C, 0)
  int threads;
};

// dx = dropout's gradient of dy; that of the residual is dy itself.
struct DropoutAddBwd {
  const void* dy;  // [R, C] dtype
  void* dx;        // [R, C] dtype
  float* dx_bias;  // [C], or null
  int64_t rows, columns;
  DType dtype;
  const int64_t* rng;
  uint32_t site;
  int threshold;
  float* workspace;  // row_workspace(R, C, 1)
  int threads;
};

// A chunk's part of the workspace: a row of z, `extra` rows of partial sums and the like, and a row of random bytes,
// which are drawn up to 256 at a time.
static inline int64_t chunk_workspace(int64_t columns, int64_t extra) {
  return (1 + extra) * padded(columns) + (columns + 255) / 256 * 64;
}

// Floats.
static inline int64_t row_workspace(int64_t rows, int64_t columns, int64_t extra) {
  return row_chunks(rows).count * chunk_workspace(columns, extra);
}

// On a GPU: float16 too, `threads` unused, forward without a workspace; up to kMaxCudaColumns columns in the norms,
// below 2^31 in dropout_add, whose backward wants no workspace either where dx_bias is null.
namespace cuda {
constexpr int64_t kMaxCudaColumns = 8192;
int64_t layer_norm_bwd_workspace(int64_t rows, int64_t columns, int device);  // floats
void layer_norm_fwd(const LayerNormFwd& a, int device, void* stream);
void layer_norm_bwd(const LayerNormBwd& a, int device, void* stream);
int64_t dropout_add_bwd_workspace(int64_t rows, int64_t columns, int device);  // floats; aligned to 16 bytes
void dropout_add_fwd(const DropoutAddFwd& a, int device, void* stream);
void dropout_add_bwd(const DropoutAddBwd& a, int device, void* stream);
}  // namespace cuda

STACKBERT_CPU_KERNEL(layer_norm_fwd, LayerNormFwd)
STACKBERT_CPU_KERNEL(layer_norm_bwd, LayerNormBwd)
STACKBERT_CPU_KERNEL(dropout_add_fwd, DropoutAddFwd)
STACKBERT_CPU_KERNEL(dropout_add_bwd, DropoutAddBwd)

}  // namespace stackbert
