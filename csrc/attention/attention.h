// attention: out = dropout(softmax(q k^T * scale)) v within each sequence and head, and its gradient.
//
// B sequences, T tokens, S longest sequence, H heads, D head dimension. Packed: q [T, H, D], sequence b is rows
// seqlens[b] to seqlens[b + 1]. Padded: q [B, S, H, D], sequence b has seqlens[b] rows; the rows after them are never
// read, and are zero in what is written. The mask is the attention mask of common/philox.h. Arithmetic is fp32 whatever
// the dtype. One thread does all of a (sequence, head), in an order that depends on its length alone: results do not
// depend on the thread count.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace stackbert {

// A tensor whose last dimension is dense; strides in elements. Packed tensors have batch = 0.
struct HeadRows {
  void* data;
  int64_t batch, token, head;
};

struct Attention {
  HeadRows q, k, v;  // dtype
  HeadRows out;      // dtype; written forward, read backward
  float* lse;        // packed [H, T], padded [B, H, S]: log of the softmax's denominator; forward: may be null
  int64_t lse_batch, lse_head;
  const int32_t* seqlens;
  const int32_t* order;  // [B] numbers of the sequences in the order in which they are taken, longest first
  bool packed;
  int64_t sequences, max_seqlen, heads, head_dim;
  DType dtype;  // float32, bfloat16
  float scale;
  const int64_t* rng;  // [2] seed, step
  uint32_t site;
  int threshold;   // round(256 p), 0..255; 0: no dropout
  float* scratch;  // attention_scratch(...) floats for each thread, on a border of 64 bytes
  int threads;
};

struct AttentionBackward {
  Attention forward;
  HeadRows dout, dq, dk, dv;  // dtype
};

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kQueryBlock = 96;  // query rows whose scores are held at once

// Floats of scratch a thread needs, whatever the instruction set: rounded to the widest vectors.
inline int64_t attention_scratch(int64_t max_seqlen, int64_t head_dim, bool backward) {
  const int64_t s = (max_seqlen + 15) / 16 * 16, d = (head_dim + 15) / 16 * 16, scores = kQueryBlock * (s + 16);
  const int64_t mask = (s + 63) / 64 * 64;
  return backward ? 5 * s * d + 5 * kQueryBlock * d + 2 * scores + mask
                  : 2 * s * d + 2 * kQueryBlock * d + scores + mask;
}

// On a GPU: 16-bit dtypes, head dimensions 32, 64 and 128, every row 16-byte aligned; `scratch` and `threads` unused,
// `order` of forward.order on the device, as seqlens are. Lengths are read there alone.
namespace cuda {
void attention_forward(const Attention& a, int device, void* stream);
// `delta`: floats, laid out as forward.lse, for rowsum(out dout).
void attention_backward(const AttentionBackward& a, float* delta, int device, void* stream);
}  // namespace cuda

STACKBERT_CPU_KERNEL(attention_forward, Attention)
STACKBERT_CPU_KERNEL(attention_backward, AttentionBackward)

}  // namespace stackbert
