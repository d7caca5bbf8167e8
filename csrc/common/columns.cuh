// How kernels that need nothing of a whole row share out an [R, C] tensor: a thread keeps kWidth neighbouring columns,
// whose parameters and sums stay in its registers, and takes rows of them, kRows at a time.
#pragma once

#include <algorithm>

#include "common/column_sums.cuh"
#include "common/rows.cuh"

namespace stackbert {
namespace cuda {

constexpr int kTilingThreads = 512;  // of a block, at most; two fit a multiprocessor with 64 registers a thread

// A block has `across` threads for each of `down` neighbouring rows; `tiles` blocks side by side cover a row.
struct Tiling {
  int across, down;
  unsigned tiles;

  template <int kWidth>
  STACKBERT_DEVICE int64_t column() const {
    return (static_cast<int64_t>(blockIdx.x % tiles) * across + threadIdx.x % static_cast<unsigned>(across)) * kWidth;
  }
  STACKBERT_DEVICE int row_in_block() const { return static_cast<int>(threadIdx.x / static_cast<unsigned>(across)); }
  // The first of kRows rows, `down` apart, and from there to the next kRows.
  template <int kRows>
  STACKBERT_DEVICE int64_t first_row() const {
    return static_cast<int64_t>(blockIdx.x / tiles) * (kRows * down) + row_in_block();
  }
  template <int kRows>
  STACKBERT_DEVICE int64_t turn() const {
    return static_cast<int64_t>(gridDim.x / tiles) * (kRows * down);
  }

  int threads() const { return across * down; }
};

inline Tiling tiling(int64_t columns, int width) {
  const int64_t vectors = (columns + width - 1) / width;
  const int64_t tiles = (vectors + kTilingThreads - 1) / kTilingThreads;
  const int across = static_cast<int>(((vectors + tiles - 1) / tiles + 31) / 32 * 32);
  return {across, kTilingThreads / across, static_cast<unsigned>(tiles)};
}

// run(T{}, width) for the element type that `dtype` names: 16-byte vectors where columns and addresses allow them, else
// single elements.
template <typename Run>
void with_vectors(DType dtype, int64_t columns, std::initializer_list<const void*> addresses, const Run& run) {
  with_dtype(dtype, [&](auto element) {
    constexpr int kWidth = kWide<decltype(element)>;
    if (columns % kWidth == 0 && aligned_16(addresses))
      run(element, std::integral_constant<int, kWidth>{});
    else
      run(element, std::integral_constant<int, 1>{});
  });
}

// Blocks of a kernel that keeps no sums: all rows in one turn, as far as a grid reaches.
template <int kRows>
int64_t blocks_for_rows(const Tiling& tiling, int64_t rows) {
  const int64_t a_block = static_cast<int64_t>(kRows) * tiling.down, most = (int64_t{1} << 31) - 1;
  return std::min((rows + a_block - 1) / a_block, most / tiling.tiles) * tiling.tiles;
}

// Partial sums of a kernel that keeps sums over rows, each by `tiles` blocks: as many as are under way at once, and no
// more than pay for their own bytes.
inline int64_t partial_sums(int64_t rows, int processors) {
  return std::min<int64_t>((rows + 15) / 16, 2 * processors);
}

// Bytes of shared memory that leave_sums wants.
template <int kWidth>
int sums_bytes(const Tiling& tiling) {
  return tiling.down > 1 ? tiling.threads() * kWidth * static_cast<int>(sizeof(float)) : 0;
}

// Adds up the sums of a block's rows, and writes the first row's threads' to the block's own partial sums, [C]. Called
// by all threads of the block.
template <int kWidth>
STACKBERT_DEVICE void leave_sums(const Tiling& tiling, int64_t columns, float (&sums)[kWidth], float* partials) {
  const auto scratch = ptx::shared_memory().as<float>();
  const int row = tiling.row_in_block(), threads = tiling.across * tiling.down;
  const int thread = static_cast<int>(threadIdx.x);
  if (tiling.down > 1) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) scratch.store(i * threads + thread, sums[i]);
    ptx::block_sync();
  }
  const int64_t column = tiling.column<kWidth>();
  if (row > 0 || column >= columns) return;
#pragma unroll 1
  for (int below = 1; below < tiling.down; ++below)
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] += scratch.load(i * threads + below * tiling.across + thread);
  store_parameters<kWidth>(partials + static_cast<int64_t>(blockIdx.x / tiling.tiles) * columns + column, sums);
}

}  // namespace cuda
}  // namespace stackbert
