// Sums over the rows of [R, C], the same bits for any number of threads: rows are cut into chunks by R alone, each
// chunk has its own row of partial sums, and these are added in order.
#pragma once

#include <cstdint>

namespace stackbert {

// Chunks of rows: enough for many threads, few enough that their partial sums are small beside the data.
struct RowChunks {
  int64_t rows_each, count;
};

static inline RowChunks row_chunks(int64_t rows) {
  const int64_t share = (rows + 127) / 128, rows_each = share < 16 ? 16 : share;
  return {rows_each, (rows + rows_each - 1) / rows_each};
}

// Floats that hold `columns` columns so that whole vectors of every instruction set fit, and rows start on cache lines.
static inline int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

}  // namespace stackbert

#if defined(STACKBERT_ISA)

#include "common/parallel.h"
#include "common/simd.h"

namespace stackbert {
namespace STACKBERT_ISA {

// body(chunk, begin, end) for every chunk of rows. Threads work far apart, each through its own share of the rows:
// beside each other they would take the page faults of fresh memory for the same page.
template <typename Body>
void parallel_row_chunks(int threads, int64_t rows, const Body& body) {
  const RowChunks chunks = row_chunks(rows);
  const int64_t shares = threads < 1 ? 1 : threads, share = (chunks.count + shares - 1) / shares;
  parallel_tasks(threads, shares * share, [&](int64_t task) {
    const int64_t chunk = task % shares * share + task / shares, begin = chunk * chunks.rows_each;
    const int64_t end = begin + chunks.rows_each < rows ? begin + chunks.rows_each : rows;
    if (begin < end) body(chunk, begin, end);
  });
}

// sums[c] = partial[0][c] + partial[1][c] + ..., where partial rows are `stride` floats apart.
inline void add_partial_sums(int threads, const float* partial, int64_t stride, int64_t count, int64_t columns,
                             float* sums) {
  parallel_chunks(threads, columns, 1024, [=](int64_t begin, int64_t end) {
    for_vectors(begin, end, [=](int64_t c, auto part) {
      Floats total = {};
      for (int64_t i = 0; i < count; ++i) total += load(partial + i * stride + c, part);
      store(sums + c, total, part);
    });
  });
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert

#endif
