#include "common/columns.cuh"
#include "gelu/gelu.h"

// Forward in 16 bits moves 4 bytes an element, which leaves 27 instructions for it at 4.3 TB/s on 132 multiprocessors
// of four schedulers at 1.755 GHz, backward 41, and 3 or 5 of the slower unit that has exp2 and the reciprocal.
//
// gelu(u) = max(u, 0) - |u| tail(|u|), and the slope at u is down(|u|) for u < 0, 1 - down(|u|) above: both forms need
// one half of the axis only, the half where their digits are.

namespace stackbert {
namespace cuda {
namespace {

constexpr float kHalfLog2e = 0.721347520f;  // log2(e) / 2
constexpr float kBell = 0.398942280f;       // 1 / sqrt(2 pi)

// Phi(-a), a >= 0, for float results: to 1e-6 of itself for a < 13, where floats end.
struct Erf32 {
  float bell, tail;

  explicit STACKBERT_DEVICE Erf32(float a) {
    // exp(-a^2 / 2) t P(t), t = 1 / (a + 3), as in gelu_cpu.cpp.
    const float t = ptx::reciprocal(a + 3.f);
    float p = t * -454.559326f + 860.549133f;
    p = p * t - 600.173706f;
    p = p * t + 162.164124f;
    p = p * t - 13.5350399f;
    p = p * t + 9.79034042f;
    p = p * t + 3.02900529f;
    p = p * t + 1.20245457f;
    p = p * t + 0.398859501f;
    bell = ptx::exp2(a * a * -kHalfLog2e);
    tail = bell * (p * t);
  }
  STACKBERT_DEVICE float down(float a) const { return tail - a * (kBell * bell); }
};

// The same for 16-bit results: to 1e-5 for a < 5, 4e-4 for a < 13, where results are below 1e-6.
struct Erf16 {
  float tail;

  explicit STACKBERT_DEVICE Erf16(float a) {
    // log2 Phi(-a) is smooth: minimax on [0, 13.5], weighted towards a < 5. The first coefficient is below 0, so that
    // larger a need no clamp.
    float p = a * -2.19041763e-9f + 1.57557594e-7f;
    p = p * a - 4.95363292e-6f;
    p = p * a + 9.03196560e-5f;
    p = p * a - 1.07298279e-3f;
    p = p * a + 8.90195929e-3f;
    p = p * a - 5.45484163e-2f;
    p = p * a - 0.458039671f;
    p = p * a - 1.15136492f;
    p = p * a - 0.999990463f;
    tail = ptx::exp2(p);
  }
  STACKBERT_DEVICE float down(float a) const { return tail - a * (kBell * ptx::exp2(a * a * -kHalfLog2e)); }
};

// 1 / (1 + 2^w), w = a (kLinear + kCubic a^2): what 1 / (1 + exp(2 v)) is.
struct Tanh {
  static constexpr float kLinear = 2.30220820f;  // 2 sqrt(2 / pi) log2(e)
  static constexpr float kCubic = 0.102943240f;  // 0.044715 kLinear
  static constexpr float kLn2 = 0.693147181f;
  float tail, share;

  explicit STACKBERT_DEVICE Tanh(float a) {
    const float small = ptx::exp2(-a * (kLinear + kCubic * (a * a)));
    share = ptx::reciprocal(1.f + small);
    tail = small * share;
  }
  STACKBERT_DEVICE float down(float a) const {
    const float weighed = a * tail;  // before a^2, which may be infinite where tail is 0
    return tail - share * (kLinear * kLn2 * weighed + 3.f * kCubic * kLn2 * (a * (a * weighed)));
  }
};

template <typename Form>
STACKBERT_DEVICE float gelu(float u) {
  return fmaxf(u, 0.f) - fabsf(u) * Form(fabsf(u)).tail;
}

template <typename Form>
STACKBERT_DEVICE float slope(float u) {
  const float down = Form(fabsf(u)).down(fabsf(u));
  return u < 0.f ? down : 1.f - down;
}

struct Forward {
  BiasGeluFwd op;
  Tiling tiling;
};
constexpr int kForwardRows = 4;  // 64 bytes of a thread under way

template <typename T, int kWidth, typename Form>
__global__ void __launch_bounds__(kTilingThreads, 2) bias_gelu_fwd_kernel(const __grid_constant__ Forward a) {
  using Vector = Elements<T, kWidth>;
  const int64_t rows = a.op.rows, columns = a.op.columns, c = a.tiling.column<kWidth>();
  if (c >= columns) return;
  float bias[kWidth];
  load_parameters<kWidth>(a.op.bias + c, bias);
  const T* x = static_cast<const T*>(a.op.x) + c;
  T* y = static_cast<T*>(a.op.y) + c;
  for (int64_t first = a.tiling.first_row<kForwardRows>(); first < rows; first += a.tiling.turn<kForwardRows>()) {
    Vector in[kForwardRows];
#pragma unroll
    for (int r = 0; r < kForwardRows; ++r) {
      const int64_t row = first + r * a.tiling.down;
      if (row < rows) in[r] = Vector::load(x + row * columns);
    }
#pragma unroll
    for (int r = 0; r < kForwardRows; ++r) {
      const int64_t row = first + r * a.tiling.down;
      if (row >= rows) break;
      float u[kWidth];
      in[r].to_floats(u);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) u[i] = gelu<Form>(u[i] + bias[i]);
      Vector::from_floats(u).store(y + row * columns);
    }
  }
}

struct Backward {
  BiasGeluBwd op;
  Tiling tiling;
};
constexpr int kBackwardRows = 2;

template <typename T, int kWidth, typename Form>
__global__ void __launch_bounds__(kTilingThreads, 2) bias_gelu_bwd_kernel(const __grid_constant__ Backward a) {
  using Vector = Elements<T, kWidth>;
  const int64_t columns = a.op.columns, c = a.tiling.column<kWidth>();
  const int64_t rows = c < columns ? a.op.rows : 0;
  float bias[kWidth], dbias[kWidth] = {};
  if (c < columns) load_parameters<kWidth>(a.op.bias + c, bias);
  const T* x = static_cast<const T*>(a.op.x) + c;
  const T* dy = static_cast<const T*>(a.op.dy) + c;
  T* dx = static_cast<T*>(a.op.dx) + c;
  for (int64_t first = a.tiling.first_row<kBackwardRows>(); first < rows; first += a.tiling.turn<kBackwardRows>()) {
    Vector in[kBackwardRows], incoming[kBackwardRows];
#pragma unroll
    for (int r = 0; r < kBackwardRows; ++r) {
      const int64_t row = first + r * a.tiling.down;
      if (row < rows) in[r] = Vector::load(x + row * columns), incoming[r] = Vector::load(dy + row * columns);
    }
#pragma unroll
    for (int r = 0; r < kBackwardRows; ++r) {
      const int64_t row = first + r * a.tiling.down;
      if (row >= rows) break;
      float u[kWidth], down[kWidth];
      in[r].to_floats(u);
      incoming[r].to_floats(down);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        down[i] *= slope<Form>(u[i] + bias[i]);
        dbias[i] += down[i];
      }
      Vector::from_floats(down).store(dx + row * columns);
    }
  }
  leave_sums<kWidth>(a.tiling, columns, dbias, a.op.workspace);
}

// run(T{}, width, form) for the form that is asked for; `form` is a null pointer of its type.
template <typename Run>
void with_form(DType dtype, bool tanh, int64_t columns, std::initializer_list<const void*> addresses, const Run& run) {
  with_vectors(dtype, columns, addresses, [&](auto element, auto width) {
    using Erf = std::conditional_t<std::is_same<decltype(element), float>::value, Erf32, Erf16>;
    tanh ? run(element, width, static_cast<Tanh*>(nullptr)) : run(element, width, static_cast<Erf*>(nullptr));
  });
}

}  // namespace

int64_t bias_gelu_bwd_workspace(int64_t rows, int64_t columns, int device) {
  return partial_sums(rows, multiprocessors("bias_gelu_bwd", device)) * columns;
}

void bias_gelu_fwd(const BiasGeluFwd& a, int device, void* stream) {
  if (a.rows == 0 || a.columns == 0) return;
  const OnDevice on_device("bias_gelu_fwd", device);
  with_form(a.dtype, a.tanh, a.columns, {a.x, a.bias, a.y}, [&](auto element, auto width, auto form) {
    constexpr int kWidth = decltype(width)::value;
    using Form = std::remove_pointer_t<decltype(form)>;
    const Tiling tiles = tiling(a.columns, kWidth);
    launch("bias_gelu_fwd", bias_gelu_fwd_kernel<decltype(element), kWidth, Form>,
           blocks_for_rows<kForwardRows>(tiles, a.rows), tiles.threads(), 0, stream, Forward{a, tiles});
  });
}

void bias_gelu_bwd(const BiasGeluBwd& a, int device, void* stream) {
  if (a.columns == 0) return;
  const OnDevice on_device("bias_gelu_bwd", device);
  const int64_t partials = partial_sums(a.rows, multiprocessors("bias_gelu_bwd", device));
  if (a.rows > 0)
    with_form(a.dtype, a.tanh, a.columns, {a.x, a.bias, a.dy, a.dx}, [&](auto element, auto width, auto form) {
      constexpr int kWidth = decltype(width)::value;
      using Form = std::remove_pointer_t<decltype(form)>;
      const Tiling tiles = tiling(a.columns, kWidth);
      launch("bias_gelu_bwd", bias_gelu_bwd_kernel<decltype(element), kWidth, Form>, partials * tiles.tiles,
             tiles.threads(), sums_bytes<kWidth>(tiles), stream, Backward{a, tiles});
    });
  column_sums<1>("bias_gelu_bwd", {a.workspace, partials, a.columns, {a.dbias}}, stream);
}

}  // namespace cuda
}  // namespace stackbert
