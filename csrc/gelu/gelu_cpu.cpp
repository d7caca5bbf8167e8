#include "common/column_sums.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "gelu/gelu.h"

namespace stackbert {
namespace STACKBERT_ISA {
namespace {

// gelu(u) and its slope. NaN stays NaN, and infinities give NaN where u * Phi(u) is infinity times zero.
struct Erf {
  Floats tail, bell;  // Phi(-|u|); exp(-u^2 / 2)

  explicit Erf(Floats u) {
    // Phi(-a) = exp(-a^2 / 2) R(a): no cancellation, so that the lower tail keeps its digits as far as float reaches.
    const Floats a = minimum(absolute(u), broadcast(13.5f));
    const Floats square = a * a;  // its rounding would cost a^2 / 2 ulp of the exponential
    bell = exp_in_range(square * -0.5f, product_error(a, a, square) * -0.5f);
    bell = select(a > 13.19f, Floats{}, bell);  // the smallest normal float is exp(-13.2^2 / 2)
    // R(a) = t P(t), t = 1 / (a + 3): minimax in relative error on [0, 13.5], 4e-8.
    const Floats t = reciprocal(a + 3.f);
    Floats p = t * -454.559326f + 860.549133f;
    p = p * t - 600.173706f;
    p = p * t + 162.164124f;
    p = p * t - 13.5350399f;
    p = p * t + 9.79034042f;
    p = p * t + 3.02900529f;
    p = p * t + 1.20245457f;
    p = p * t + 0.398859501f;
    tail = bell * (p * t);
  }

  Floats value(Floats u) const { return maximum(Floats{}, u) - absolute(u) * tail; }
  Floats slope(Floats u) const {
    return select(u < 0.f, tail, 1.f - tail) + u * (bell * 0.398942280f);  // 1 / sqrt(2 pi)
  }
};

struct Tanh {
  static constexpr float kScale = 0.797884561f, kCubic = 0.044715f;  // sqrt(2 / pi)
  Floats small, share, logistic;  // e = exp(-2 |v|), 1 / (1 + e), 1 / (1 + exp(-2 v))

  explicit Tanh(Floats u) {
    const Floats v = u * (u * u * (kScale * kCubic) + kScale);
    const Floats w = absolute(v) * -2.f;
    small = select(w < -87.f, Floats{}, exp_in_range(maximum(broadcast(-88.f), w), Floats{}));
    share = reciprocal(small + 1.f);
    logistic = select(u < 0.f, small * share, share);
  }

  Floats value(Floats u) const { return u * logistic; }
  Floats slope(Floats u) const {
    return logistic + u * (small * share * share) * (u * u * (6.f * kScale * kCubic) + 2.f * kScale);
  }
};

// Bytes. The hardware's own prefetching stops at 4 KB borders, and waiting there would cost as much as the arithmetic.
// Fastest of 512, 1024, 2048, 4096 on a Sapphire Rapids core.
constexpr int64_t kAhead = 2048;

template <typename T, typename Gelu>
void forward(const BiasGeluFwd& a) {
  parallel_row_chunks(a.threads, a.rows, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.columns;
      T* y = static_cast<T*>(a.y) + row * a.columns;
      for_vectors(0, a.columns, [&](int64_t c, auto part) {
        prefetch(x + c + kAhead / sizeof(T));
        const Floats u = load(x + c, part) + load(a.bias + c, part);
        store(y + c, Gelu(u).value(u), part);
      });
    }
  });
}

template <typename T, typename Gelu>
void backward(const BiasGeluBwd& a) {
  const int64_t stride = padded(a.columns);
  parallel_row_chunks(a.threads, a.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* const dbias = a.workspace + chunk * stride;
    std::memset(dbias, 0, stride * sizeof(float));
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.columns;
      const T* dy = static_cast<const T*>(a.dy) + row * a.columns;
      T* dx = static_cast<T*>(a.dx) + row * a.columns;
      for_vectors(0, a.columns, [&](int64_t c, auto part) {
        prefetch(x + c + kAhead / sizeof(T)), prefetch(dy + c + kAhead / sizeof(T));
        const Floats u = load(x + c, part) + load(a.bias + c, part);
        const Floats down = load(dy + c, part) * Gelu(u).slope(u);
        store(dx + c, down, part);
        store(dbias + c, load(dbias + c, part) + down, part);
      });
    }
  });
  add_partial_sums(a.threads, a.workspace, stride, row_chunks(a.rows).count, a.columns, a.dbias);
}

}  // namespace

void bias_gelu_fwd(const BiasGeluFwd& a) {
  if (a.dtype == DType::kFloat32)
    a.tanh ? forward<float, Tanh>(a) : forward<float, Erf>(a);
  else
    a.tanh ? forward<bfloat16, Tanh>(a) : forward<bfloat16, Erf>(a);
}

void bias_gelu_bwd(const BiasGeluBwd& a) {
  if (a.dtype == DType::kFloat32)
    a.tanh ? backward<float, Tanh>(a) : backward<float, Erf>(a);
  else
    a.tanh ? backward<bfloat16, Tanh>(a) : backward<bfloat16, Erf>(a);
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
