#include "common/check.cuh"
#include "duplicate_layers/duplicate_layers.h"

namespace stackbert {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // loads that a thread has under way at once: a row's stores wait for its loads

struct Move {
  int32_t to, from;
};

// By value in the kernel's arguments: nothing to allocate, to copy, or to keep alive.
struct Moves {
  Move rows[kMovesPerLaunch];  // last to first
  int count;
};

// bank: rows of `columns` dense Vectors, each `stride` Vectors after the one before. A thread does all rows of its own
// columns.
template <typename Vector>
__global__ void __launch_bounds__(kThreads)
    duplicate_layers_kernel(Vector* bank, int64_t columns, int64_t stride, const __grid_constant__ Moves moves) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kVectors) + threadIdx.x;
  for (int m = 0; m < moves.count; ++m) {
    const Vector* from = bank + moves.rows[m].from * stride;
    Vector* to = bank + moves.rows[m].to * stride;
    Vector held[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = first + v * kThreads;
      if (c < columns) held[v] = from[c];
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = first + v * kThreads;
      if (c < columns) to[c] = held[v];
    }
  }
}

template <typename Vector>
void launch(const DuplicateLayers& a, const Moves& moves, cudaStream_t stream) {
  constexpr int64_t size = sizeof(Vector);
  const int64_t columns = a.row_bytes / size, a_block = kThreads * kVectors, blocks = (columns + a_block - 1) / a_block;
  duplicate_layers_kernel<Vector><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<Vector*>(a.bank), columns, a.row_stride / size, moves);
  check_launch("duplicate_layers_");
}

}  // namespace

void duplicate_layers(const DuplicateLayers& a, int device, void* stream) {
  if (a.row_bytes == 0) return;
  const OnDevice on_device("duplicate_layers_", device);
  // The widest vector that every row begins and ends on.
  const uint64_t alignment = reinterpret_cast<uintptr_t>(a.bank) | static_cast<uint64_t>(a.row_bytes | a.row_stride);
  Moves moves;
  moves.count = 0;
  for (int64_t i = a.n - 1; i >= 0; --i) {
    if (a.map[i] != i) moves.rows[moves.count++] = {static_cast<int32_t>(i), static_cast<int32_t>(a.map[i])};
    // Launches follow each other on the stream, so rows are written last to first across them too.
    if (moves.count == kMovesPerLaunch || (i == 0 && moves.count > 0)) {
      const cudaStream_t on = static_cast<cudaStream_t>(stream);
      if (alignment % 16 == 0)
        launch<uint4>(a, moves, on);
      else if (alignment % 4 == 0)
        launch<uint32_t>(a, moves, on);
      else if (alignment % 2 == 0)
        launch<uint16_t>(a, moves, on);
      else
        launch<uint8_t>(a, moves, on);
      moves.count = 0;
    }
  }
}

}  // namespace cuda
}  // namespace stackbert
