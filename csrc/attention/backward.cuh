// What the attention kernels' backward shares. Scores and their gradients are made again from the saved log-sum-exp,
// without atomics and without a float32 dq in memory.
//
// Two passes (attention_backward_cuda.cu): one has 64 queries a block and gives dq and delta = rowsum(out dout),
// another has 64 keys a block and gives dk and dv. Scores are computed twice, 7 products instead of 5. Up to 128 tokens
// one block owns all of a (sequence, head): a kernel of its own (attention_one_tile_backward_cuda.cu) computes them
// once and reads and writes each tensor once.
#pragma once

#include "attention/tiles.cuh"

namespace stackbert {
namespace cuda {

// Sequences of up to so many tokens have their backward in one block; at D = 128 its tiles leave no room for a second
// block on a multiprocessor, and the two passes do.
template <int D>
constexpr int kOneTileRows = D <= 64 ? 128 : 0;

struct Backward {
  AttentionBackward a;
  float* delta;  // rowsum(out dout), over what dropout scales by
};

// Sequences of up to kOneTileRows tokens, none at head dimensions where that is 0; the passes leave them out.
void attention_one_tile_backward(const Backward& b, void* stream);

template <int kTiles>
STACKBERT_DEVICE void scale_all(float (&c)[kTiles][4], float scale) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] *= scale;
}

// Probabilities from scores and the rows' log-sum-exp (both in log2, by `scale`), with columns from `columns` on taken
// out, and from dp = mask (dout v^T): ds = p (dp - delta). Both packed, p after the mask; bit 2n + e of `kept` is that
// of column 8n + 2t + e. What is kept is not scaled here: delta is divided by that scale instead, and the sums get it.
template <typename T, int kTiles>
STACKBERT_DEVICE void score_gradients(const float (&s)[kTiles][4], const float (&dp)[kTiles][4], float scale,
                                      const float (&lse)[2], const float (&delta)[2], int columns, uint32_t kept_low,
                                      uint32_t kept_high, uint32_t (*p_packed)[2], uint32_t (*ds_packed)[2]) {
  const int t = ptx::lane() % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float dropped[2], ds[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool inside = 8 * n + 2 * t + e < columns;
        const float p = inside ? ptx::exp2(s[n][2 * half + e] * scale - lse[half]) : 0.f;
        const bool kept = (half ? kept_high : kept_low) >> (2 * n + e) & 1;
        dropped[e] = kept ? p : 0.f;
        ds[e] = p * ((kept ? dp[n][2 * half + e] : 0.f) - delta[half]);
      }
      if (p_packed) p_packed[n][half] = ptx::pack<T>(dropped[0], dropped[1]);
      ds_packed[n][half] = ptx::pack<T>(ds[0], ds[1]);
    }
}

// What probabilities that dropout keeps are multiplied with.
STACKBERT_DEVICE float kept_scale(const Attention& a) { return a.threshold > 0 ? dropout_scale(a.threshold) : 1.f; }

// rowsum(out dout) / kept_scale of rows g and g + 8 of this warp's 16, `valid` of which exist; dout's tile is in shared
// memory.
template <typename T, int D, typename Douts>
STACKBERT_DEVICE void row_delta(const Backward& b, const Place& place, int row, int valid, const Douts& douts, int own,
                                float (&delta)[2]) {
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  const T* out = static_cast<const T*>(b.a.forward.out.data);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = g + 8 * half;
    float sum = 0.f;
    if (r < valid)
#pragma unroll
      for (int c = t; c < D / 8; c += 4) {
        const Words4 x = ptx::load(reinterpret_cast<const Words4*>(out + place.at(b.a.forward.out, row + r) + 8 * c));
        const Words4 y = douts.chunk(own + r, c).template as<Words4>().load();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const ptx::Pair o = ptx::unpack<T>(x.v[i]), d = ptx::unpack<T>(y.v[i]);
          sum += o.low * d.low + o.high * d.high;
        }
      }
    delta[half] = row_sum(sum) * (static_cast<float>(256 - b.a.forward.threshold) / 256.f);
  }
}

// The log-sum-exp, in log2, of rows g and g + 8; rows that do not exist get probability 0.
STACKBERT_DEVICE void row_lse(const Attention& a, const Place& place, int row, int valid, float (&lse)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = ptx::lane() / 4 + 8 * half;
    lse[half] = r < valid ? ptx::load(a.lse + place.lse_at(a, row + r)) * kLog2e : INFINITY;
  }
}

}  // namespace cuda
}  // namespace stackbert
