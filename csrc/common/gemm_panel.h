// Small matrix products in fp32 whose operands stay in cache: C [M, N] (+)= A [M, K] B [K, N].
//
// A is read one scalar at a time, with any strides. B is packed in panels of kPanel columns, each panel dense [K,
// width], the last one narrower but a whole number of vectors: one step of K is then kPanelVectors neighbouring
// vectors. C is row-major. N is a multiple of kLanes. A tile of C stays in registers over a stretch of K: 6 x 4
// accumulators of 32 registers, 6 x 2 of 16.
#pragma once

#include "common/simd.h"

namespace stackbert {
namespace STACKBERT_ISA {

constexpr int kPanelVectors = kVectorRegisters == 32 ? 4 : 2;
constexpr int kPanel = kPanelVectors * kLanes;
constexpr int kTileRows = 6;
constexpr int64_t kPanelDepth = 128;  // rows of a panel used together: 32 KB of AVX-512's first-level cache of 48

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <int kRows, int kVectors>
void gemm_tile(const float* a, int64_t a_row, int64_t a_column, const float* b, float* c, int64_t c_row, int64_t depth,
               bool add) {
  Floats total[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) total[i][j] = add ? load(c + i * c_row + j * kLanes) : Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Floats row[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Floats x = broadcast(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) total[i][j] += x * row[j];
    }
    a += a_column;
    b += kVectors * kLanes;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(c + i * c_row + j * kLanes, total[i][j]);
}

typedef void (*GemmTile)(const float*, int64_t, int64_t, const float*, float*, int64_t, int64_t, bool);

template <int kVectors>
GemmTile gemm_tile_of(int64_t rows) {
  switch (rows) {
    case 1:
      return &gemm_tile<1, kVectors>;
    case 2:
      return &gemm_tile<2, kVectors>;
    case 3:
      return &gemm_tile<3, kVectors>;
    case 4:
      return &gemm_tile<4, kVectors>;
    case 5:
      return &gemm_tile<5, kVectors>;
    default:
      return &gemm_tile<6, kVectors>;
  }
}

inline GemmTile gemm_tile_of(int64_t rows, int64_t vectors) {
#if defined(__AVX512F__)
  if (vectors == 4) return gemm_tile_of<4>(rows);
  if (vectors == 3) return gemm_tile_of<3>(rows);
#endif
  return vectors == 2 ? gemm_tile_of<2>(rows) : gemm_tile_of<1>(rows);
}

// b_depth: rows with which B was packed, depth or more. add: C += A B instead of C = A B.
inline void gemm(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_column,
                 const float* b, int64_t b_depth, float* c, int64_t c_row, bool add) {
  const int64_t rest = rows % kTileRows;
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int64_t width = columns - column < kPanel ? columns - column : kPanel;
    const GemmTile tile = gemm_tile_of(kTileRows, width / kLanes), last_tile = gemm_tile_of(rest, width / kLanes);
    for (int64_t k = 0; k < depth; k += kPanelDepth) {
      const int64_t stretch = depth - k < kPanelDepth ? depth - k : kPanelDepth;
      const float* panel = b + column * b_depth + k * width;
      const float* a_k = a + k * a_column;
      int64_t row = 0;
      for (; row + kTileRows <= rows; row += kTileRows)
        tile(a_k + row * a_row, a_row, a_column, panel, c + row * c_row + column, c_row, stretch, add || k > 0);
      if (rest)
        last_tile(a_k + row * a_row, a_row, a_column, panel, c + row * c_row + column, c_row, stretch, add || k > 0);
    }
  }
}

// Asks for the row at x before it is needed. Rows of strided tensors are a page apart, where the hardware does not look
// ahead.
constexpr int64_t kRowsAhead = 16;
template <typename T>
inline void prefetch_row(const T* x, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(x + c);
}

// Packs x [rows, columns], rows `stride` elements apart and dense inside, times factor; columns up to the next multiple
// of kLanes become zero.
template <typename T>
void pack_panels(const T* x, int64_t stride, int64_t rows, int64_t columns, float factor, float* panels) {
  const int64_t padded = round_up(columns, kLanes);
  for (int64_t first = 0; first < padded; first += kPanel) {
    const int64_t width = padded - first < kPanel ? padded - first : kPanel;
    for (int64_t row = 0; row < rows; ++row, panels += width) {
      if (first == 0) prefetch_row(x + (row + kRowsAhead) * stride, columns);
      for (int64_t c = first; c < first + width; c += kLanes) {
        const T* from = x + row * stride + c;
        store(panels + c - first,
              (c + kLanes <= columns ? load(from) : load_first(from, static_cast<int>(columns - c))) * factor);
      }
    }
  }
}

// v[i][j] becomes v[j][i]: a perfect shuffle of the rows, once per bit of a lane's number.
inline void transpose(Floats v[kLanes]) {
  Ints low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  for (int step = 1; step < kLanes; step *= 2) {
    Floats next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
#if defined(__clang__)
      for (int lane = 0; lane < kLanes; ++lane) {
        next[2 * i][lane] = lane % 2 ? v[i + kLanes / 2][lane / 2] : v[i][lane / 2];
        next[2 * i + 1][lane] = lane % 2 ? v[i + kLanes / 2][(lane + kLanes) / 2] : v[i][(lane + kLanes) / 2];
      }
#else
      next[2 * i] = __builtin_shuffle(v[i], v[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[i + kLanes / 2], high);
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

// Packs the transposition of x [rows, columns]: B [columns, rows], its columns up to the next multiple of kLanes zero.
template <typename T>
void pack_transposed(const T* x, int64_t stride, int64_t rows, int64_t columns, float* panels) {
  const int64_t padded = round_up(rows, kLanes);
  for (int64_t first = 0; first < padded; first += kPanel) {
    const int64_t width = padded - first < kPanel ? padded - first : kPanel;
    for (int64_t row = first; row < first + width; row += kLanes) {
      for (int i = 0; i < kLanes; ++i) prefetch_row(x + (row + kRowsAhead + i) * stride, columns);
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int part = columns - c < kLanes ? static_cast<int>(columns - c) : kLanes;
        const T* from = x + row * stride + c;
        Floats block[kLanes];
        if (part == kLanes && row + kLanes <= rows) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) block[i] = load(from + i * stride);
        } else {
          for (int i = 0; i < kLanes; ++i) block[i] = row + i < rows ? load_first(from + i * stride, part) : Floats{};
        }
        transpose(block);
        for (int i = 0; i < part; ++i) store(panels + (c + i) * width + row - first, block[i]);
      }
    }
    panels += width * columns;
  }
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
