#include "common/columns.cuh"
#include "layer_norm/layer_norm.h"

// Forward moves 3 tensors, backward 2: the residual's gradient is dy itself.

namespace stackbert {
namespace cuda {
namespace {

struct Forward {
  DropoutAddFwd op;
  Tiling tiling;
};
constexpr int kForwardRows = 2;  // 64 bytes of a thread under way

template <typename T, int kWidth>
__global__ void __launch_bounds__(kTilingThreads, 2) dropout_add_fwd_kernel(const __grid_constant__ Forward a) {
  using Vector = Elements<T, kWidth>;
  const SumInputs& in = a.op.sum;
  const int64_t rows = in.rows, columns = in.columns, c = a.tiling.column<kWidth>();
  if (c >= columns) return;
  PhiloxKey key{};
  if (in.threshold > 0) key = dropout_key(in.rng, in.site);
  const float scale = dropout_scale(in.threshold);
  float bias[kWidth] = {};
  if (in.x_bias) load_parameters<kWidth>(in.x_bias + c, bias);
  const T* x = static_cast<const T*>(in.x) + c;
  const T* residual = static_cast<const T*>(in.residual) + c;
  T* y = static_cast<T*>(a.op.y) + c;
  for (int64_t first = a.tiling.first_row<kForwardRows>(); first < rows; first += a.tiling.turn<kForwardRows>()) {
    Vector dropped[kForwardRows], added[kForwardRows];
#pragma unroll
    for (int r = 0; r < kForwardRows; ++r) {
      const int64_t row = first + r * a.tiling.down;
      if (row < rows) dropped[r] = Vector::load(x + row * columns), added[r] = Vector::load(residual + row * columns);
    }
#pragma unroll
    for (int r = 0; r < kForwardRows; ++r) {
      const int64_t row = first + r * a.tiling.down;
      if (row >= rows) break;
      float out[kWidth], other[kWidth];
      dropped[r].to_floats(out);
      added[r].to_floats(other);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out[i] += bias[i];
      if (in.threshold > 0) drop<kWidth>(key, row, static_cast<int>(c), in.threshold, scale, out);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out[i] += other[i];
      Vector::from_floats(out).store(y + row * columns);
    }
  }
}

struct Backward {
  DropoutAddBwd op;
  Tiling tiling;
};
constexpr int kBackwardRows = 3;  // a fourth would spill

template <typename T, int kWidth>
__global__ void __launch_bounds__(kTilingThreads, 2) dropout_add_bwd_kernel(const __grid_constant__ Backward a) {
  using Vector = Elements<T, kWidth>;
  const int64_t columns = a.op.columns, c = a.tiling.column<kWidth>();
  const int64_t rows = c < columns ? a.op.rows : 0;
  PhiloxKey key{};
  if (a.op.threshold > 0) key = dropout_key(a.op.rng, a.op.site);
  const float scale = dropout_scale(a.op.threshold);
  float dx_bias[kWidth] = {};
  const T* dy = static_cast<const T*>(a.op.dy) + c;
  T* dx = static_cast<T*>(a.op.dx) + c;
  for (int64_t first = a.tiling.first_row<kBackwardRows>(); first < rows; first += a.tiling.turn<kBackwardRows>()) {
    Vector incoming[kBackwardRows] = {};  // rows left out would keep the last turn's registers
#pragma unroll
    for (int r = 0; r < kBackwardRows; ++r) {
      const int64_t row = first + r * a.tiling.down;
      if (row < rows) incoming[r] = Vector::load(dy + row * columns);
    }
#pragma unroll
    for (int r = 0; r < kBackwardRows; ++r) {
      const int64_t row = first + r * a.tiling.down;
      if (row >= rows) break;
      float down[kWidth];
      incoming[r].to_floats(down);
      if (a.op.threshold > 0) drop<kWidth>(key, row, static_cast<int>(c), a.op.threshold, scale, down);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) dx_bias[i] += down[i];
      Vector::from_floats(down).store(dx + row * columns);
    }
  }
  if (a.op.dx_bias) leave_sums<kWidth>(a.tiling, columns, dx_bias, a.op.workspace);
}

}  // namespace

int64_t dropout_add_bwd_workspace(int64_t rows, int64_t columns, int device) {
  return partial_sums(rows, multiprocessors("dropout_add_bwd", device)) * columns;
}

void dropout_add_fwd(const DropoutAddFwd& a, int device, void* stream) {
  if (a.sum.rows == 0 || a.sum.columns == 0) return;
  const OnDevice on_device("dropout_add_fwd", device);
  with_vectors(a.sum.dtype, a.sum.columns, {a.sum.x, a.sum.residual, a.sum.x_bias, a.y}, [&](auto element, auto width) {
    constexpr int kWidth = decltype(width)::value;
    const Tiling tiles = tiling(a.sum.columns, kWidth);
    launch("dropout_add_fwd", dropout_add_fwd_kernel<decltype(element), kWidth>,
           blocks_for_rows<kForwardRows>(tiles, a.sum.rows), tiles.threads(), 0, stream, Forward{a, tiles});
  });
}

void dropout_add_bwd(const DropoutAddBwd& a, int device, void* stream) {
  if (a.columns == 0) return;
  const OnDevice on_device("dropout_add_bwd", device);
  const int64_t partials = partial_sums(a.rows, multiprocessors("dropout_add_bwd", device));
  if (a.rows > 0)
    with_vectors(a.dtype, a.columns, {a.dy, a.dx}, [&](auto element, auto width) {
      constexpr int kWidth = decltype(width)::value;
      const Tiling tiles = tiling(a.columns, kWidth);
      const int64_t down = a.dx_bias ? partials : blocks_for_rows<kBackwardRows>(tiles, a.rows) / tiles.tiles;
      launch("dropout_add_bwd", dropout_add_bwd_kernel<decltype(element), kWidth>, down * tiles.tiles, tiles.threads(),
             a.dx_bias ? sums_bytes<kWidth>(tiles) : 0, stream, Backward{a, tiles});
    });
  if (a.dx_bias) column_sums<1>("dropout_add_bwd", {a.workspace, partials, a.columns, {a.dx_bias}}, stream);
}

}  // namespace cuda
}  // namespace stackbert
