#include "attention/attention.h"
#include "common/dropout_mask.h"
#include "common/gemm_panel.h"
#include "common/parallel.h"

namespace stackbert {
namespace STACKBERT_ISA {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// 2^x within 2 ulp for x <= 0, and 0 below -126. Softmax in powers of two needs no range reduction but rounding.
inline Floats exp2(Floats x) {
  const Floats clamped = maximum(x, broadcast(-126.f));
  const Floats shifted = clamped + 12582912.f;  // 1.5 * 2^23: the integer lands in the low mantissa bits
  const Floats r = clamped - (shifted - 12582912.f);
  Floats y = r * 1.535336188319500e-4f + 1.339887440266574e-3f;  // Cephes exp2f
  y = y * r + 9.618437357674640e-3f;
  y = y * r + 5.550332471162809e-2f;
  y = y * r + 2.402264791363012e-1f;
  y = y * r + 6.931472028550421e-1f;
  y = y * r + 1.f;
  y = bit_cast<Floats>(bit_cast<Ints>(y) + (bit_cast<Ints>(shifted) << 23));
  return select(x < -126.f, Floats{}, y);
}

// One sequence of one head.
struct Head {
  int64_t sequence, head, start, length;
};

template <typename T>
T* rows_of(const HeadRows& x, const Head& h) {
  return static_cast<T*>(x.data) + h.sequence * x.batch + h.start * x.token + h.head * x.head;
}

template <typename T>
void load_row(const T* x, float factor, int64_t columns, float* y) {
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) store(y + c, load(x + c) * factor);
  if (c < columns) store(y + c, load_first(x + c, static_cast<int>(columns - c)) * factor);
}

template <typename T>
float dot(const T* x, const float* y, int64_t columns) {
  Floats total = {};
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) total += load(x + c) * load(y + c);
  if (c < columns) total += load_first(x + c, static_cast<int>(columns - c)) * load(y + c);
  return sum(total);
}

template <typename T>
void write_row(const float* x, float factor, int64_t columns, T* y) {
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) store(y + c, load(x + c) * factor);
  if (c < columns) store_first(y + c, load(x + c) * factor, static_cast<int>(columns - c));
}

// Asks for rows [first, first + kQueryBlock) of a head, a block's products before they are needed.
template <typename T>
void prefetch_rows(const HeadRows& x, const Head& h, int64_t first, int64_t columns) {
  const int64_t end = first + kQueryBlock < h.length ? first + kQueryBlock : h.length;
  for (int64_t row = first; row < end; ++row) prefetch_row(rows_of<const T>(x, h) + row * x.token, columns);
}

// Zeros in the padding after a sequence.
template <typename T>
void clear_padding(const Attention& a, const HeadRows& x, const Head& h) {
  if (a.packed) return;
  for (int64_t row = h.length; row < a.max_seqlen; ++row)
    std::memset(rows_of<T>(x, h) + row * x.token, 0, a.head_dim * sizeof(T));
}

// The random bytes of a head's queries, taken in order.
class Mask {
 public:
  Mask(const Attention& a, const Head& h, float* scratch)
      : threshold(a.threshold),
        scale(dropout_scale(a.threshold)),
        key_(a.threshold ? dropout_key(a.rng, a.site) : PhiloxKey{}),
        head_(h),
        blocks_((h.length + 63) / 64),
        bytes_(reinterpret_cast<uint8_t*>(scratch)) {}

  const uint8_t* row(int64_t query, int64_t first_of_block) {
    const int64_t i = (query - first_of_block) % kMaskQueries;
    if (i == 0)
      attention_bytes(key_, static_cast<uint32_t>(head_.sequence), static_cast<uint32_t>(head_.head),
                      static_cast<uint32_t>(query), static_cast<uint32_t>(blocks_), bytes_);
    return bytes_ + i * 64 * blocks_;
  }

  const int threshold;
  const float scale;

 private:
  const PhiloxKey key_;
  const Head head_;
  const int64_t blocks_;
  uint8_t* bytes_;
};

// Scores of a row, in units of log 2, become exp(score - max) with dropout. Returns the denominator; max is an output.
template <bool kDropout>
float softmax_row(float* p, int64_t length, const uint8_t* bytes, int threshold, float scale, float& max) {
  const int64_t padded = round_up(length, kLanes);
  for (int64_t c = length; c < padded; ++c) p[c] = -__builtin_inff();
  Floats highest = load(p);
  for (int64_t c = kLanes; c < padded; c += kLanes) highest = maximum(highest, load(p + c));
  max = maximum(highest);
  Floats total = {};
  for (int64_t c = 0; c < padded; c += kLanes) {
    const Floats e = exp2(load(p + c) - max);
    total += e;
    store(p + c, kDropout ? keep(e, bytes + c, threshold, scale) : e);
  }
  return sum(total);
}

// p: scores become probabilities with dropout. dp: their gradients become those of the scores, p * (keep(dp) - delta).
template <bool kDropout>
void softmax_backward_row(float* p, float* dp, int64_t length, float lse, float delta, const uint8_t* bytes,
                          int threshold, float scale) {
  for (int64_t c = 0; c < length; c += kLanes) {
    const Floats e = exp2(load(p + c) - lse);
    Floats probability = e, gradient = load(dp + c);
    if (kDropout) {
      const Kept lanes = kept_lanes(bytes + c, threshold);
      probability = kept(lanes, e, scale);
      gradient = kept(lanes, gradient, scale);
    }
    store(p + c, probability);
    store(dp + c, e * (gradient - delta));
  }
}

// Hands out stretches of a thread's scratch.
class Scratch {
 public:
  explicit Scratch(float* next) : next_(next) {}
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += floats;
    return taken;
  }

 private:
  float* next_;
};

template <typename T, bool kDropout>
void forward_head(const Attention& a, const Head& h, float* thread_scratch) {
  const int64_t d = a.head_dim, wide = round_up(d, kLanes), keys = round_up(h.length, kLanes),
                score_row = keys + kLanes;
  Scratch scratch(thread_scratch);
  float* k_t = scratch.take(d * keys);
  float* v = scratch.take(h.length * wide);
  float* q = scratch.take(kQueryBlock * wide);
  float* out = scratch.take(kQueryBlock * wide);
  float* p = scratch.take(kQueryBlock * score_row);
  Mask mask(a, h, scratch.take(round_up(h.length, 64)));
  prefetch_rows<T>(a.q, h, 0, d);
  pack_transposed(rows_of<const T>(a.k, h), a.k.token, h.length, d, k_t);
  pack_panels(rows_of<const T>(a.v, h), a.v.token, h.length, d, 1.f, v);
  const T* q_rows = rows_of<const T>(a.q, h);
  T* out_rows = rows_of<T>(a.out, h);
  float* lse = a.lse ? a.lse + h.sequence * a.lse_batch + h.head * a.lse_head + h.start : nullptr;

  for (int64_t first = 0; first < h.length; first += kQueryBlock) {
    const int64_t rows = h.length - first < kQueryBlock ? h.length - first : kQueryBlock;
    for (int64_t i = 0; i < rows; ++i) load_row(q_rows + (first + i) * a.q.token, a.scale * kLog2E, d, q + i * wide);
    prefetch_rows<T>(a.q, h, first + kQueryBlock, d);
    prefetch_rows<T>(a.out, h, first, d);
    gemm(rows, keys, d, q, wide, 1, k_t, d, p, score_row, false);
    float factor[kQueryBlock];
    for (int64_t i = 0; i < rows; ++i) {
      float max;
      const uint8_t* bytes = kDropout ? mask.row(first + i, first) : nullptr;
      const float total = softmax_row<kDropout>(p + i * score_row, h.length, bytes, mask.threshold, mask.scale, max);
      factor[i] = 1.f / total;
      if (lse) lse[first + i] = max * kLn2 + __builtin_logf(total);
    }
    gemm(rows, wide, h.length, p, score_row, 1, v, h.length, out, wide, false);
    for (int64_t i = 0; i < rows; ++i) write_row(out + i * wide, factor[i], d, out_rows + (first + i) * a.out.token);
  }
  clear_padding<T>(a, a.out, h);
  if (lse && !a.packed)
    for (int64_t row = h.length; row < a.max_seqlen; ++row) lse[row] = 0.f;
}

template <typename T, bool kDropout>
void backward_head(const AttentionBackward& b, const Head& h, float* thread_scratch) {
  const Attention& a = b.forward;
  const int64_t d = a.head_dim, wide = round_up(d, kLanes), keys = round_up(h.length, kLanes),
                score_row = keys + kLanes;
  Scratch scratch(thread_scratch);
  float* k_t = scratch.take(d * keys);
  float* v_t = scratch.take(d * keys);
  float* k = scratch.take(h.length * wide);
  float* dk = scratch.take(h.length * wide);
  float* dv = scratch.take(h.length * wide);
  float* q = scratch.take(kQueryBlock * wide);
  float* dout = scratch.take(kQueryBlock * wide);
  float* q_panels = scratch.take(kQueryBlock * wide);
  float* dout_panels = scratch.take(kQueryBlock * wide);
  float* dq = scratch.take(kQueryBlock * wide);
  float* p = scratch.take(kQueryBlock * score_row);
  float* dp = scratch.take(kQueryBlock * score_row);
  Mask mask(a, h, scratch.take(round_up(h.length, 64)));
  for (const HeadRows* x : {&a.q, &b.dout, &a.out}) prefetch_rows<T>(*x, h, 0, d);
  pack_transposed(rows_of<const T>(a.k, h), a.k.token, h.length, d, k_t);
  pack_transposed(rows_of<const T>(a.v, h), a.v.token, h.length, d, v_t);
  pack_panels(rows_of<const T>(a.k, h), a.k.token, h.length, d, a.scale, k);
  const T *q_rows = rows_of<const T>(a.q, h), *out_rows = rows_of<const T>(a.out, h),
          *dout_rows = rows_of<const T>(b.dout, h);
  const float* lse = a.lse + h.sequence * a.lse_batch + h.head * a.lse_head + h.start;

  for (int64_t first = 0; first < h.length; first += kQueryBlock) {
    const int64_t rows = h.length - first < kQueryBlock ? h.length - first : kQueryBlock;
    float delta[kQueryBlock];
    for (int64_t i = 0; i < rows; ++i) {
      load_row(q_rows + (first + i) * a.q.token, a.scale * kLog2E, d, q + i * wide);
      load_row(dout_rows + (first + i) * b.dout.token, 1.f, d, dout + i * wide);
      delta[i] = dot(out_rows + (first + i) * a.out.token, dout + i * wide, d);
    }
    pack_panels(q, wide, rows, wide, 1.f, q_panels);
    pack_panels(dout, wide, rows, wide, 1.f, dout_panels);
    for (const HeadRows* x : {&a.q, &b.dout, &a.out}) prefetch_rows<T>(*x, h, first + kQueryBlock, d);
    for (const HeadRows* x : {&b.dq, &b.dk, &b.dv}) prefetch_rows<T>(*x, h, first, d);
    gemm(rows, keys, d, q, wide, 1, k_t, d, p, score_row, false);
    gemm(rows, keys, d, dout, wide, 1, v_t, d, dp, score_row, false);
    for (int64_t i = 0; i < rows; ++i) {
      const uint8_t* bytes = kDropout ? mask.row(first + i, first) : nullptr;
      softmax_backward_row<kDropout>(p + i * score_row, dp + i * score_row, h.length, lse[first + i] * kLog2E, delta[i],
                                     bytes, mask.threshold, mask.scale);
    }
    gemm(h.length, wide, rows, p, 1, score_row, dout_panels, rows, dv, wide, first > 0);
    gemm(h.length, wide, rows, dp, 1, score_row, q_panels, rows, dk, wide, first > 0);
    gemm(rows, wide, h.length, dp, score_row, 1, k, h.length, dq, wide, false);
    for (int64_t i = 0; i < rows; ++i) write_row(dq + i * wide, 1.f, d, rows_of<T>(b.dq, h) + (first + i) * b.dq.token);
  }
  for (int64_t row = 0; row < h.length; ++row) {
    write_row(dk + row * wide, kLn2, d, rows_of<T>(b.dk, h) + row * b.dk.token);  // q carried scale / ln 2
    write_row(dv + row * wide, 1.f, d, rows_of<T>(b.dv, h) + row * b.dv.token);
  }
  clear_padding<T>(a, b.dq, h);
  clear_padding<T>(a, b.dk, h);
  clear_padding<T>(a, b.dv, h);
}

// body(head, scratch) for every head of every sequence, longest sequences first.
template <typename Body>
void for_heads(const Attention& a, int64_t scratch_floats, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_tasks(a.threads, a.threads, [&](int64_t worker) {
    float* scratch = a.scratch + worker * scratch_floats;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < a.sequences * a.heads;) {
      const int64_t sequence = a.order[task / a.heads];
      const int64_t start = a.packed ? a.seqlens[sequence] : 0;
      const int64_t end = a.packed ? a.seqlens[sequence + 1] : a.seqlens[sequence];
      body(Head{sequence, task % a.heads, start, end - start}, scratch);
    }
  });
}

template <typename T, bool kDropout>
void forward(const Attention& a) {
  for_heads(a, attention_scratch(a.max_seqlen, a.head_dim, false),
            [&](const Head& h, float* scratch) { forward_head<T, kDropout>(a, h, scratch); });
}

template <typename T, bool kDropout>
void backward(const AttentionBackward& b) {
  for_heads(b.forward, attention_scratch(b.forward.max_seqlen, b.forward.head_dim, true),
            [&](const Head& h, float* scratch) { backward_head<T, kDropout>(b, h, scratch); });
}

}  // namespace

void attention_forward(const Attention& a) {
  if (a.dtype == DType::kFloat32)
    a.threshold ? forward<float, true>(a) : forward<float, false>(a);
  else
    a.threshold ? forward<bfloat16, true>(a) : forward<bfloat16, false>(a);
}

void attention_backward(const AttentionBackward& b) {
  if (b.forward.dtype == DType::kFloat32)
    b.forward.threshold ? backward<float, true>(b) : backward<float, false>(b);
  else
    b.forward.threshold ? backward<bfloat16, true>(b) : backward<bfloat16, false>(b);
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
