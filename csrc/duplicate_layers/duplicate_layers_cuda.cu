#include <vector>

#include "common/launch.cuh"
#include "duplicate_layers/duplicate_layers.h"

namespace stackbert {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // loads that a thread has under way at once: a row's stores wait for its loads

struct Move {
  int32_t to, from;
};

// Rows of `columns` dense Vectors, each `stride` Vectors after the one before; what moves, last to first, by value:
// nothing to allocate, to copy, or to keep alive.
template <typename Vector>
struct Moves {
  Vector* bank;
  int64_t columns, stride;
  Move rows[kMovesPerLaunch];
  int count;
};

// A thread does all rows of its own columns.
template <typename Vector>
__global__ void __launch_bounds__(kThreads) duplicate_layers_kernel(const __grid_constant__ Moves<Vector> a) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kVectors) + threadIdx.x;
  for (int m = 0; m < a.count; ++m) {
    const Vector* from = a.bank + a.rows[m].from * a.stride;
    Vector* to = a.bank + a.rows[m].to * a.stride;
    Vector held[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = first + v * kThreads;
      if (c < a.columns) held[v] = ptx::load(from + c);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = first + v * kThreads;
      if (c < a.columns) ptx::store(to + c, held[v]);
    }
  }
}

template <typename Vector>
void run(const DuplicateLayers& a, const std::vector<Move>& moves, void* stream) {
  constexpr int64_t size = sizeof(Vector);
  const int64_t a_block = kThreads * kVectors;
  Moves<Vector> arguments{static_cast<Vector*>(a.bank), a.row_bytes / size, a.row_stride / size, {}, 0};
  for (const Move& move : moves) {
    arguments.rows[arguments.count++] = move;
    // Launches follow each other on the stream, so rows are written last to first across them too.
    if (arguments.count == kMovesPerLaunch || &move == &moves.back()) {
      launch("duplicate_layers_", duplicate_layers_kernel<Vector>, (arguments.columns + a_block - 1) / a_block,
             kThreads, 0, stream, arguments);
      arguments.count = 0;
    }
  }
}

}  // namespace

void duplicate_layers(const DuplicateLayers& a, int device, void* stream) {
  if (a.row_bytes == 0) return;
  const OnDevice on_device("duplicate_layers_", device);
  // The widest vector that every row begins and ends on.
  const uint64_t alignment = reinterpret_cast<uintptr_t>(a.bank) | static_cast<uint64_t>(a.row_bytes | a.row_stride);
  std::vector<Move> moves;
  for (int64_t i = a.n - 1; i >= 0; --i)
    if (a.map[i] != i) moves.push_back({static_cast<int32_t>(i), static_cast<int32_t>(a.map[i])});
  if (alignment % 16 == 0)
    run<ptx::Words4>(a, moves, stream);
  else if (alignment % 4 == 0)
    run<uint32_t>(a, moves, stream);
  else if (alignment % 2 == 0)
    run<uint16_t>(a, moves, stream);
  else
    run<uint8_t>(a, moves, stream);
}

}  // namespace cuda
}  // namespace stackbert
