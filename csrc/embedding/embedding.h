// embedding_layer_norm: where BERT begins. T tokens, C columns, all tensors dense.
//
//   z = word[ids] + position[positions] + token_type[token_types]
//   y = dropout((z - mean) * rstd * weight + bias)          over the columns of a row; the row mask of common/philox.h
//
// Arithmetic and statistics are fp32 whatever the dtypes, and y is rounded once. Backward gets the same inputs and the
// two statistics of each token, and computes z and the mask again. The gradient of a table's row is the sum over the
// tokens that read it; a row that none read gets zero. Sums over tokens have the same bits for any number of threads:
// tokens are sorted by row, ties in their own order, and cut into pieces of kPieceTokens; what a piece holds of a row
// is summed in order, and where a row goes on over a border the parts of the pieces are added in order.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "layer_norm/layer_norm.h"

namespace stackbert {

constexpr int kTables = 3;            // word, position, token type
constexpr int64_t kPieceTokens = 64;  // a piece's two rows of partial sums are 3% of what it reads

struct EmbeddingInputs {
  const int64_t* ids[kTables];  // [T], each in [0, rows of its table)
  const void* tables[kTables];  // [rows, C] table_dtype
  int64_t table_rows[kTables];
  int64_t tokens, columns;
  DType table_dtype;   // float32, bfloat16
  DType dtype;         // of y and dy: float32, bfloat16
  const int64_t* rng;  // [2] seed, step; read only if threshold > 0
  uint32_t site;
  int threshold;  // round(256 p); 0 = no dropout
};

struct EmbeddingFwd {
  EmbeddingInputs in;
  const float* weight;  // [C]
  const float* bias;    // [C]
  float eps;
  void* y;           // [T, C] dtype
  float* mean;       // [T], or null: forward only
  float* rstd;       // [T], or null
  float* workspace;  // row_workspace(T, C, 0)
  int threads;
};

struct EmbeddingBwd {
  EmbeddingInputs in;
  const void* dy;          // [T, C] dtype
  const float* weight;     // [C]
  const float* mean;       // [T]
  const float* rstd;       // [T]
  void* dtables[kTables];  // [rows, C] table_dtype
  float* dweight;          // [C]
  float* dbias;            // [C]
  float* dz;               // [T, C] scratch: the gradient of z
  int64_t* order;          // embedding_order(T, rows of the tables): scratch
  float* workspace;        // embedding_workspace(T, C)
  int threads;
};

static inline int64_t embedding_pieces(int64_t tokens) { return (tokens + kPieceTokens - 1) / kPieceTokens; }

// Integers: for each table the tokens by row, and where each row's tokens begin.
static inline int64_t embedding_order(int64_t tokens, int64_t all_table_rows) {
  return kTables * tokens + all_table_rows;
}

// Floats: for each table two rows a piece; and what the row pass takes, which has two rows of sums and one of scratch.
static inline int64_t embedding_workspace(int64_t tokens, int64_t columns) {
  return 2 * kTables * embedding_pieces(tokens) * padded(columns) + row_workspace(tokens, columns, 3);
}

// On a GPU: up to kMaxEmbeddingColumns columns, float16 too, `threads` unused, forward without a workspace, and the
// host does not look at indices: one out of range is not read, makes its token's row of y and of dz NaN, and gives its
// table no gradient. Backward is two calls, between which tokens are sorted.
namespace cuda {
constexpr int64_t kMaxEmbeddingColumns = 4096;

struct EmbeddingRowsBwd {
  EmbeddingInputs in;
  const void* dy;       // [T, C] dtype
  const float* weight;  // [C]
  const float* mean;    // [T]
  const float* rstd;    // [T]
  float* dz;            // [T, C] the gradient of z
  float* dweight;       // [C]
  float* dbias;         // [C]
  float* workspace;     // embedding_rows_bwd_workspace
};

// The gradients of the tables. Each begins as zeros.
struct EmbeddingSums {
  const void* rows[kTables];      // [T] sorted: what tokens read; below 0 or from table_rows on: out of range
  const int64_t* order[kTables];  // [T] which token stands there
  bool narrow[kTables];           // whether `rows` is int16, else int32
  int64_t table_rows[kTables];
  void* dtables[kTables];  // [rows, C] table_dtype
  DType table_dtype;
  int64_t tokens, columns, pieces;  // embedding_pieces(T)
  const float* dz;                  // [T, C]
  float* parts;                     // embedding_parts(T, C): scratch
};

// Floats.
static inline int64_t embedding_parts(int64_t tokens, int64_t columns) {
  return 2 * kTables * embedding_pieces(tokens) * columns;
}
int64_t embedding_rows_bwd_workspace(int64_t tokens, int64_t columns, int device);

void embedding_fwd(const EmbeddingFwd& a, int device, void* stream);
void embedding_rows_bwd(const EmbeddingRowsBwd& a, int device, void* stream);
void embedding_sums(const EmbeddingSums& a, int device, void* stream);
}  // namespace cuda

STACKBERT_CPU_KERNEL(embedding_fwd, EmbeddingFwd)
STACKBERT_CPU_KERNEL(embedding_bwd, EmbeddingBwd)

}  // namespace stackbert
