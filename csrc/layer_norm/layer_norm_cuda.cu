#include <algorithm>

#include "common/column_sums.cuh"
#include "common/rows.cuh"
#include "layer_norm/layer_norm.h"

// A row is held in registers by its threads: one warp up to 1,024 columns, more beyond, and where the addresses do not
// allow 16-byte accesses. Thread t of a row's kThreads has vectors t, t + kThreads, ... of kWidth elements, so that a
// warp's access is one run of 512 bytes.
//
// Forward at 768 columns in 16 bits moves 3 tensors, backward 5 (x, residual and dy in, dx and dresidual out). The mask
// costs a Philox call a vector, some 30 instructions: a tenth of the issue slots that the bytes leave.

namespace stackbert {
namespace cuda {
namespace {

template <typename T_, int kWidth_, int kVectors_, int kWarps_>
struct Row {
  using T = T_;
  static constexpr int kWidth = kWidth_, kVectors = kVectors_, kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;  // of a row
  static constexpr int kElements = kWidth * kVectors;
  static_assert(kElements <= 32, "the mask is a word");
  // Whether a row's loads are all under way before the first is used. Where a vector's raw form takes as many registers
  // as its floats there is no room for it, and other warps hide the wait.
  static constexpr bool kEarly = kWarps == 1;
  using Vector = Elements<T, kWidth>;

  static STACKBERT_DEVICE int thread() { return static_cast<int>(threadIdx.x % kThreads); }
  static STACKBERT_DEVICE int column(int vector) { return (vector * kThreads + thread()) * kWidth; }
};

// One row of a tensor, a vector at a time.
template <typename R>
class Loaded {
 public:
  STACKBERT_DEVICE Loaded(const void* tensor, int64_t row, int64_t columns)
      : row_(static_cast<const typename R::T*>(tensor) + row * columns) {
    if constexpr (R::kEarly) {
#pragma unroll
      for (int v = 0; v < R::kVectors; ++v)
        if (tensor && R::column(v) < columns) raw_[v] = R::Vector::load(row_ + R::column(v));
    }
  }
  STACKBERT_DEVICE void to_floats(int vector, float* out) const {
    if constexpr (R::kEarly)
      raw_[vector].to_floats(out);
    else
      R::Vector::load(row_ + R::column(vector)).to_floats(out);
  }

 private:
  const typename R::T* row_;
  typename R::Vector raw_[R::kEarly ? R::kVectors : 1] = {};  // else what skips a load keeps the last row's registers
};

// z = residual + dropout(x + x_bias), 0 past the row's end. Returns which elements are kept, a bit each.
template <typename R>
STACKBERT_DEVICE uint32_t sum(const SumInputs& a, const Loaded<R>& x, const Loaded<R>& residual, int64_t row,
                              PhiloxKey key, float scale, float (&z)[R::kElements]) {
  uint32_t kept = 0xFFFFFFFF;
#pragma unroll
  for (int v = 0; v < R::kVectors; ++v) {
    float* out = z + v * R::kWidth;
    const int c = R::column(v);
    if (c >= a.columns) {
#pragma unroll
      for (int i = 0; i < R::kWidth; ++i) out[i] = 0.f;
      continue;
    }
    x.to_floats(v, out);
    if (a.x_bias) {
      float shift[R::kWidth];
      load_parameters<R::kWidth>(a.x_bias + c, shift);
#pragma unroll
      for (int i = 0; i < R::kWidth; ++i) out[i] += shift[i];
    }
    if (a.threshold > 0) {
      const uint32_t bits = drop<R::kWidth>(key, row, c, a.threshold, scale, out);
      kept = v == 0 ? bits : kept | bits << (v * R::kWidth);
    }
    if (a.residual) {
      float added[R::kWidth];
      residual.to_floats(v, added);
#pragma unroll
      for (int i = 0; i < R::kWidth; ++i) out[i] += added[i];
    }
  }
  return kept;
}

template <typename R>
constexpr int kForwardWarps = R::kWarps == 1 ? 8 : R::kWarps;  // of a block

template <typename R>
__global__ void __launch_bounds__(32 * kForwardWarps<R>) layer_norm_fwd_kernel(const __grid_constant__ LayerNormFwd a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kForwardWarps<R> / R::kWarps) + ptx::warp() / R::kWarps;
  if (row >= a.sum.rows) return;
  const auto scratch = ptx::shared_memory().as<float>();
  const Loaded<R> x(a.sum.x, row, a.sum.columns), residual(a.sum.residual, row, a.sum.columns);
  PhiloxKey key{};
  if (a.sum.threshold > 0) key = dropout_key(a.sum.rng, a.sum.site);
  float z[R::kElements];
  sum<R>(a.sum, x, residual, row, key, dropout_scale(a.sum.threshold), z);

  float total = 0.f;
#pragma unroll
  for (int i = 0; i < R::kElements; ++i) total += z[i];
  const float columns = static_cast<float>(a.sum.columns);
  const float mean = block_sum<R::kWarps>(total, scratch) / columns;

  float square = 0.f;  // around the mean: E[z^2] - mean^2 loses its digits when |mean| >> std
#pragma unroll
  for (int v = 0; v < R::kVectors; ++v)
    if (R::column(v) < a.sum.columns)
#pragma unroll
      for (int i = v * R::kWidth; i < (v + 1) * R::kWidth; ++i) square += (z[i] - mean) * (z[i] - mean);
  const float rstd = ptx::reciprocal_sqrt(block_sum<R::kWarps>(square, scratch + R::kWarps) / columns + a.eps);

  auto* y = static_cast<typename R::T*>(a.y) + row * a.sum.columns;
#pragma unroll
  for (int v = 0; v < R::kVectors; ++v) {
    const int c = R::column(v);
    if (c >= a.sum.columns) continue;
    float weight[R::kWidth], bias[R::kWidth], out[R::kWidth];
    load_parameters<R::kWidth>(a.weight + c, weight);
    load_parameters<R::kWidth>(a.bias + c, bias);
#pragma unroll
    for (int i = 0; i < R::kWidth; ++i) out[i] = (z[v * R::kWidth + i] - mean) * rstd * weight[i] + bias[i];
    R::Vector::from_floats(out).store(y + c);
  }
  if (a.mean && R::thread() == 0) {
    ptx::store(a.mean + row, mean);
    ptx::store(a.rstd + row, rstd);
  }
}

// Sums over rows: each block has its own [3, C] of partial sums in the workspace.
enum Sum { kWeight, kBias, kXBias, kSums };

template <typename R>
constexpr int kBackwardWarps = R::kWarps == 1 ? 4 : R::kWarps;

template <typename R>
__global__ void __launch_bounds__(32 * kBackwardWarps<R>)
    layer_norm_bwd_kernel(const __grid_constant__ LayerNormBwd a) {
  constexpr int kRows = kBackwardWarps<R> / R::kWarps;  // at once, of a block
  const auto scratch = ptx::shared_memory().as<float>();
  const int64_t columns = a.sum.columns, step = static_cast<int64_t>(gridDim.x) * kRows;
  PhiloxKey key{};
  if (a.sum.threshold > 0) key = dropout_key(a.sum.rng, a.sum.site);
  const float scale = dropout_scale(a.sum.threshold);
  float dweight[R::kElements] = {}, dbias[R::kElements] = {}, dx_bias[R::kElements] = {};

  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + ptx::warp() / R::kWarps; row < a.sum.rows;
       row += step) {
    const Loaded<R> x(a.sum.x, row, columns), residual(a.sum.residual, row, columns), incoming(a.dy, row, columns);
    const float mean = ptx::load(a.mean + row), rstd = ptx::load(a.rstd + row);
    float z[R::kElements], dy[R::kElements] = {};  // without it they would be kept from one row to the next
    const uint32_t kept = sum<R>(a.sum, x, residual, row, key, scale, z);
    const float kept_scale = a.sum.threshold > 0 ? scale : 1.f;

    // xhat = (z - mean) rstd, g = dy weight; dz = rstd (g - mean(g) - xhat mean(g xhat))
    float of_g = 0.f, of_g_xhat = 0.f;
#pragma unroll
    for (int v = 0; v < R::kVectors; ++v) {
      const int c = R::column(v);
      if (c >= columns) continue;
      float weight[R::kWidth];
      load_parameters<R::kWidth>(a.weight + c, weight);
      incoming.to_floats(v, dy + v * R::kWidth);
#pragma unroll
      for (int i = 0; i < R::kWidth; ++i) {
        const int e = v * R::kWidth + i;
        z[e] = (z[e] - mean) * rstd;
        dweight[e] += dy[e] * z[e], dbias[e] += dy[e];
        dy[e] *= weight[i];
        of_g += dy[e], of_g_xhat += dy[e] * z[e];
      }
    }
    // Two sums in turn, in two places: the barrier within each stands between the other's reads and its next writes.
    const float mean_g = block_sum<R::kWarps>(of_g, scratch) / static_cast<float>(columns);
    const float mean_g_xhat = block_sum<R::kWarps>(of_g_xhat, scratch + R::kWarps) / static_cast<float>(columns);

#pragma unroll
    for (int v = 0; v < R::kVectors; ++v) {
      const int c = R::column(v);
      if (c >= columns) continue;
      float dz[R::kWidth], dx[R::kWidth];
#pragma unroll
      for (int i = 0; i < R::kWidth; ++i) {
        const int e = v * R::kWidth + i;
        dz[i] = rstd * (dy[e] - mean_g - z[e] * mean_g_xhat);
        dx[i] = kept >> e & 1 ? dz[i] * kept_scale : 0.f;
        dx_bias[e] += dx[i];
      }
      R::Vector::from_floats(dz).store(static_cast<typename R::T*>(a.dresidual) + row * columns + c);
      if (a.dx) R::Vector::from_floats(dx).store(static_cast<typename R::T*>(a.dx) + row * columns + c);
    }
  }

  // The rows of a block, one after the other, so that the sums have one order.
  float* partial = a.workspace + static_cast<int64_t>(blockIdx.x) * kSums * columns;
#pragma unroll
  for (int turn = 0; turn < kRows; ++turn) {
    if (turn > 0) ptx::block_sync();
    if (ptx::warp() / R::kWarps != turn) continue;
#pragma unroll
    for (int e = 0; e < R::kElements; ++e) {
      const int c = R::column(e / R::kWidth) + e % R::kWidth;
      if (c >= columns) continue;
      const float own[kSums] = {dweight[e], dbias[e], dx_bias[e]};
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        const int at = s * static_cast<int>(columns) + c;
        float total = own[s];
        if (turn > 0) total += scratch.load(at);
        if (turn + 1 < kRows)
          scratch.store(at, total);
        else
          ptx::store(partial + at, total);
      }
    }
  }
}

// run(Row<...>{}) for the smallest row that holds `columns`.
template <typename Run>
void with_row(const SumInputs& a, bool wide, const Run& run) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = kWide<T>;
    if (!wide || a.columns % kWidth != 0) {
      if (a.columns <= 1024) return run(Row<T, 1, 4, 8>{});
      return run(Row<T, 1, 22, 12>{});  // with four warps more, backward's sums would not fit the registers of each
    }
    if (a.columns <= 768) return run(Row<T, kWidth, 24 / kWidth, 1>{});
    if constexpr (kWidth == 8) {
      if (a.columns <= 1024) return run(Row<T, kWidth, 4, 1>{});
      return run(Row<T, kWidth, 4, 8>{});
    } else {  // half as many elements: fp32 vectors take twice the registers while they are loaded
      if (a.columns <= 1024) return run(Row<T, kWidth, 4, 2>{});
      return run(Row<T, kWidth, 4, 16>{});
    }
  });
}

// Two or three fit a multiprocessor at once, by their registers. No more than rows; fewer where a block has several.
int backward_blocks(int64_t rows, int processors) { return static_cast<int>(std::min<int64_t>(rows, 3 * processors)); }

}  // namespace

int64_t layer_norm_bwd_workspace(int64_t rows, int64_t columns, int device) {
  return backward_blocks(rows, multiprocessors("layer_norm_bwd", device)) * kSums * columns;
}

void layer_norm_fwd(const LayerNormFwd& a, int device, void* stream) {
  if (a.sum.rows == 0) return;
  const OnDevice on_device("layer_norm_fwd", device);
  const bool wide = aligned_16({a.sum.x, a.sum.residual, a.sum.x_bias, a.weight, a.bias, a.y});
  with_row(a.sum, wide, [&](auto row) {
    using R = decltype(row);
    constexpr int kRows = kForwardWarps<R> / R::kWarps;
    launch("layer_norm_fwd", layer_norm_fwd_kernel<R>, (a.sum.rows + kRows - 1) / kRows, 32 * kForwardWarps<R>,
           R::kWarps > 1 ? 2 * R::kWarps * static_cast<int>(sizeof(float)) : 0, stream, a);
  });
}

void layer_norm_bwd(const LayerNormBwd& a, int device, void* stream) {
  const OnDevice on_device("layer_norm_bwd", device);
  const int blocks = backward_blocks(a.sum.rows, multiprocessors("layer_norm_bwd", device));
  const bool wide = aligned_16({a.sum.x, a.sum.residual, a.sum.x_bias, a.weight, a.dy, a.dx, a.dresidual});
  if (a.sum.rows > 0)
    with_row(a.sum, wide, [&](auto row) {
      using R = decltype(row);
      const int shared =
          static_cast<int>(sizeof(float)) * (R::kWarps > 1 ? 2 * R::kWarps : kSums * static_cast<int>(a.sum.columns));
      launch("layer_norm_bwd", layer_norm_bwd_kernel<R>, blocks, 32 * kBackwardWarps<R>, shared, stream, a);
    });
  column_sums<kSums>("layer_norm_bwd",
                     {a.workspace, a.sum.rows > 0 ? blocks : 0, a.sum.columns, {a.dweight, a.dbias, a.dx_bias}},
                     stream);
}

}  // namespace cuda
}  // namespace stackbert
