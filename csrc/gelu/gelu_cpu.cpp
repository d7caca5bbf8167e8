#include "common/column_sums.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "gelu/gelu.h"

namespace stackbert {
namespace STACKBERT_ISA {
namespace {

// gelu(u) and its slope. NaN stays NaN; infinities give what u * Phi(u) gives.
struct Erf {
  Floats cdf, bell;  // Phi(u); exp(-u^2 / 2)

  explicit Erf(Floats u) {
    // Phi(-a) = exp(-a^2 / 2) R(a) for a >= 0: no cancellation, so that the lower tail keeps its digits as far as float
    // reaches.
    const Floats a = minimum(absolute(u), broadcast(13.5f));  // exp(-13.5^2 / 2) is below the smallest normal float
    // a^2 in two parts, the first exact: rounding a^2 would cost a^2 / 2 ulp of the result.
    const Floats high = bit_cast<Floats>(bit_cast<Words>(a) & 0xFFFFF000);
    const Floats square = high * high * -0.5f;
    bell = exp_in_range(maximum(square, broadcast(-88.f)), (a - high) * (a + high) * -0.5f);
    bell = select(square < -87.f, Floats{}, bell);
    // R(a) = t P(s), t = 1 / (a + 3), s = t on [1/17, 1/3] brought to [-1, 1]: minimax in relative error, 4.7e-8.
    const Floats t = reciprocal(a + 3.f);
    const Floats s = t * 7.28571415f - 1.42857146f;
    Floats p = s * -5.64368565e-05f + 1.35290931e-04f;
    p = p * s + 6.11159659e-04f;
    p = p * s - 1.99847482e-03f;
    p = p * s - 7.32756360e-03f;
    p = p * s + 2.11391505e-02f;
    p = p * s + 1.71393022e-01f;
    p = p * s + 4.89726454e-01f;
    p = p * s + 8.26377451e-01f;
    const Floats tail = bell * (p * t);
    cdf = select(u < 0.f, tail, 1.f - tail);
  }

  Floats value(Floats u) const { return u * cdf; }
  Floats slope(Floats u) const { return cdf + u * (bell * 0.398942280f); }  // 1 / sqrt(2 pi)
};

struct Tanh {
  static constexpr float kScale = 0.797884561f, kCubic = 0.044715f;  // sqrt(2 / pi)
  Floats small, share, logistic;  // e = exp(-2 |v|), 1 / (1 + e), 1 / (1 + exp(-2 v))

  explicit Tanh(Floats u) {
    const Floats v = u * (u * u * (kScale * kCubic) + kScale);
    small = exp(absolute(v) * -2.f);
    share = reciprocal(small + 1.f);
    logistic = select(u < 0.f, small * share, share);
  }

  Floats value(Floats u) const { return u * logistic; }
  Floats slope(Floats u) const {
    return logistic + u * (small * share * share) * (u * u * (6.f * kScale * kCubic) + 2.f * kScale);
  }
};

template <typename T, typename Gelu>
void forward(const BiasGeluFwd& a) {
  parallel_row_chunks(a.threads, a.rows, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.columns;
      T* y = static_cast<T*>(a.y) + row * a.columns;
      for_vectors(0, a.columns, [&](int64_t c, auto part) {
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
