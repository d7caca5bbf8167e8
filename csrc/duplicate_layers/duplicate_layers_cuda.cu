#include <algorithm>
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

// Rows of `columns` dense units of `unit` bytes, each `stride` units after the one before.
struct Bank {
  void* rows;
  int64_t columns, stride;
  int unit;
  int64_t first;  // block
};

// What moves, last to first, by value: nothing to allocate, to copy, or to keep alive.
struct Moves {
  Bank banks[kBanksPerLaunch];
  Move rows[kMovesPerLaunch];
  int banks_used, count;
};

// A thread does all rows of its own columns.
template <typename Unit>
STACKBERT_DEVICE void move_rows(const Moves& a, const Bank& bank, int64_t first) {
  for (int m = 0; m < a.count; ++m) {
    const Unit* from = static_cast<const Unit*>(bank.rows) + a.rows[m].from * bank.stride;
    Unit* to = static_cast<Unit*>(bank.rows) + a.rows[m].to * bank.stride;
    Unit held[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = first + v * kThreads;
      if (c < bank.columns) held[v] = ptx::load(from + c);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = first + v * kThreads;
      if (c < bank.columns) ptx::store(to + c, held[v]);
    }
  }
}

__global__ void __launch_bounds__(kThreads) duplicate_layers_kernel(const __grid_constant__ Moves a) {
  int b = 0;
  while (b + 1 < a.banks_used && static_cast<int64_t>(blockIdx.x) >= a.banks[b + 1].first) ++b;
  const Bank& bank = a.banks[b];
  const int64_t first = (static_cast<int64_t>(blockIdx.x) - bank.first) * (kThreads * kVectors) + threadIdx.x;
  if (bank.unit == 16)
    move_rows<ptx::Words4>(a, bank, first);
  else if (bank.unit == 4)
    move_rows<uint32_t>(a, bank, first);
  else if (bank.unit == 2)
    move_rows<uint16_t>(a, bank, first);
  else
    move_rows<uint8_t>(a, bank, first);
}

// The widest unit that every row begins and ends on.
int unit_of(const RowBank& bank) {
  const uint64_t bits =
      reinterpret_cast<uintptr_t>(bank.bank) | static_cast<uint64_t>(bank.row_bytes | bank.row_stride);
  for (const int unit : {16, 4, 2})
    if (bits % static_cast<uint64_t>(unit) == 0) return unit;
  return 1;
}

}  // namespace

void duplicate_layers(const DuplicateBanks& a, int device, void* stream) {
  const OnDevice on_device("duplicate_layers_", device);
  std::vector<Move> moves;
  for (int64_t i = a.n - 1; i >= 0; --i)
    if (a.map[i] != i) moves.push_back({static_cast<int32_t>(i), static_cast<int32_t>(a.map[i])});
  const int64_t a_block = kThreads * kVectors;
  for (int64_t begin = 0; begin < a.count; begin += kBanksPerLaunch) {
    Moves arguments{};
    int64_t blocks = 0;
    for (int64_t i = begin; i < std::min(begin + kBanksPerLaunch, a.count); ++i) {
      const RowBank& bank = a.banks[i];
      if (bank.row_bytes == 0) continue;
      const int unit = unit_of(bank);
      const int64_t columns = bank.row_bytes / unit;
      arguments.banks[arguments.banks_used++] = {bank.bank, columns, bank.row_stride / unit, unit, blocks};
      blocks += (columns + a_block - 1) / a_block;
    }
    if (blocks == 0) continue;
    for (size_t done = 0; done < moves.size(); done += arguments.count) {
      // Launches follow each other on the stream, so rows are written last to first across them too.
      arguments.count = static_cast<int>(std::min<size_t>(kMovesPerLaunch, moves.size() - done));
      std::copy_n(moves.begin() + static_cast<std::ptrdiff_t>(done), arguments.count, arguments.rows);
      launch("duplicate_layers_", duplicate_layers_kernel, blocks, kThreads, 0, stream, arguments);
    }
  }
}

}  // namespace cuda
}  // namespace stackbert
