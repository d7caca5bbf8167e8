// duplicate_layers_: row i of the bank becomes the old row map[i], for i in [0, n), in place; the rows from n on are
// untouched. Rows are copied as bytes, whatever they hold.
//
// Rows are written last to first, each column slice on its own, and no scratch is needed: when row i is written, only
// rows above i have been written before it, and its source map[i] <= i is none of those, so it still holds what it held
// at the start. A slice reads and writes its own columns alone, so slices may run in any order and at the same time.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace stackbert {

struct DuplicateLayers {
  void* bank;  // rows of row_bytes dense bytes, each row_stride >= row_bytes bytes after the one before
  int64_t row_bytes, row_stride;
  const int64_t* map;  // [n], in host memory; 0 <= map[i] <= i
  int64_t n;
  int threads;  // CPU only
};

STACKBERT_CPU_KERNEL(duplicate_layers, DuplicateLayers)

namespace cuda {

struct RowBank {
  void* bank;  // as above
  int64_t row_bytes, row_stride;
};

// The same map on several banks: weights, moments, a copy in bf16.
struct DuplicateBanks {
  const RowBank* banks;  // [count], in host memory as the map
  int64_t count;
  const int64_t* map;
  int64_t n;
};

// One launch for every kBanksPerLaunch banks and kMovesPerLaunch rows that change, on `stream` of `device`.
constexpr int kMovesPerLaunch = 128, kBanksPerLaunch = 8;
void duplicate_layers(const DuplicateBanks& arguments, int device, void* stream);

}  // namespace cuda
}  // namespace stackbert
