#include "common/columns.cuh"
#include "dropout/dropout.h"

// 4 bytes an element in 16 bits leave 27 instructions for it (gelu_cuda.cu says how); sm_90 has 24 here, rows and key
// included. Half of a Philox call's 16 decisions are thrown away: drawing them once would mean handing them from lane
// to lane, which costs about as much.

namespace stackbert {
namespace cuda {
namespace {

struct Arguments {
  Dropout op;
  Tiling tiling;
};
constexpr int kRows = 4;  // 64 bytes of a thread under way

template <typename T, int kWidth>
__global__ void __launch_bounds__(kTilingThreads, 2) dropout_kernel(const __grid_constant__ Arguments a) {
  using Vector = Elements<T, kWidth>;
  const int64_t rows = a.op.rows, columns = a.op.columns, c = a.tiling.column<kWidth>();
  if (c >= columns) return;
  const PhiloxKey key = dropout_key(a.op.rng, a.op.site);
  const float scale = dropout_scale(a.op.threshold);
  const T* x = static_cast<const T*>(a.op.x) + c;
  T* y = static_cast<T*>(a.op.y) + c;
  for (int64_t first = a.tiling.first_row<kRows>(); first < rows; first += a.tiling.turn<kRows>()) {
    Vector in[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * a.tiling.down;
      if (row < rows) in[r] = Vector::load(x + row * columns);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * a.tiling.down;
      if (row >= rows) break;
      float out[kWidth];
      in[r].to_floats(out);
      drop<kWidth>(key, row, static_cast<int>(c), a.op.threshold, scale, out);
      Vector::from_floats(out).store(y + row * columns);
    }
  }
}

}  // namespace

void dropout(const Dropout& a, int device, void* stream) {
  if (a.rows == 0 || a.columns == 0) return;
  const OnDevice on_device("dropout", device);
  with_vectors(a.dtype, a.columns, {a.x, a.y}, [&](auto element, auto width) {
    constexpr int kWidth = decltype(width)::value;
    const Tiling tiles = tiling(a.columns, kWidth);
    launch("dropout", dropout_kernel<decltype(element), kWidth>, blocks_for_rows<kRows>(tiles, a.rows), tiles.threads(),
           0, stream, Arguments{a, tiles});
  });
}

}  // namespace cuda
}  // namespace stackbert
