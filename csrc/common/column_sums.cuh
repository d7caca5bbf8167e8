// The second half of every sum over rows: each block of a kernel leaves its own partial sums in a workspace, and these
// are added up here, in one order.
#pragma once

#include "common/launch.cuh"

namespace stackbert {
namespace cuda {

template <int kSums>
struct PartialSums {
  const float* partials;  // [blocks, kSums, columns]
  int64_t blocks, columns;
  float* sums[kSums];  // [columns] each; null: not wanted
};

constexpr int kColumnSumWarps = 8;

// A warp has 32 neighbouring columns; the block's warps share out the partial sums.
template <int kSums>
__global__ void __launch_bounds__(32 * kColumnSumWarps)
    column_sums_kernel(const __grid_constant__ PartialSums<kSums> a) {
  const auto scratch = ptx::shared_memory().as<float>();
  const int64_t columns = a.columns;
  const unsigned which = blockIdx.x % kSums;
  const int64_t c = static_cast<int64_t>(blockIdx.x / kSums) * 32 + ptx::lane();
  if (!a.sums[which]) return;
  float total = 0.f;
  if (c < columns)
    for (int64_t b = ptx::warp(); b < a.blocks; b += kColumnSumWarps)
      total += ptx::load(a.partials + (b * kSums + which) * columns + c);
  scratch.store(ptx::warp() * 32 + ptx::lane(), total);
  ptx::block_sync();
  if (ptx::warp() != 0 || c >= columns) return;
  total = 0.f;
#pragma unroll
  for (int w = 0; w < kColumnSumWarps; ++w) total += scratch.load(w * 32 + ptx::lane());
  ptx::store(a.sums[which] + c, total);
}

template <int kSums>
void column_sums(const char* op, const PartialSums<kSums>& a, void* stream) {
  launch(op, column_sums_kernel<kSums>, (a.columns + 31) / 32 * kSums, 32 * kColumnSumWarps,
         32 * kColumnSumWarps * static_cast<int>(sizeof(float)), stream, a);
}

}  // namespace cuda
}  // namespace stackbert
