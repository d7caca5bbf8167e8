// What the attention kernels share: tiles of [rows, D] 16-bit elements in shared memory, and products of tiles by mma.
//
// A tile's rows are cut into chunks of 16 bytes, and chunk c of row r lies at place c ^ r (mod 8): the 8 rows that one
// 8 x 8 matrix is loaded from are then in different banks, at the same column as at different ones.
//
// Scores are products of mma.sync.m16n8k16: a warp has 16 rows of a tile and all its columns, so that a softmax row
// lies in four lanes. Dropout is drawn again in backward: the accumulator's layout is the mask's (common/philox.h), so
// a lane draws 16 decisions in one call, some 30 instructions, where stored bits would cost their traffic twice.
#pragma once

#include <type_traits>

#include "attention/attention.h"
#include "common/philox.h"
#include "common/ptx.cuh"

namespace stackbert {
namespace cuda {

using ptx::Shared;
using ptx::Words4;

template <typename T, int kRows_, int D>
struct Tile {
  static constexpr int kRows = kRows_, kChunks = D / 8, kBytes = kRows_ * D * 2;
  Shared<unsigned char> memory;

  explicit STACKBERT_DEVICE Tile(Shared<unsigned char> first) : memory(first) {}
  STACKBERT_DEVICE Shared<unsigned char> chunk(int row, int c) const {
    const int turn = kChunks >= 8 ? row % 8 : row / 2 % 4;
    return memory + (row * kChunks + (c ^ turn)) * 16;
  }

  // Rows [0, rows) of a tensor, zeros after them, by all kThreads threads of the block; committed by the caller.
  template <int kThreads>
  STACKBERT_DEVICE void copy_async(const HeadRows& from, int64_t first, int rows) const {
    const T* data = static_cast<const T*>(from.data) + first;
#pragma unroll
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, c = i % kChunks;
      ptx::copy_async_16(chunk(row, c), row < rows ? data + row * from.token + c * 8 : data, row < rows);
    }
  }

  // Elements (row + g, column + 2t ...) and so on: an A operand of [16, 16].
  STACKBERT_DEVICE Words4 a_operand(int row, int column) const {
    const int matrix = ptx::lane() / 8, r = ptx::lane() % 8;
    return ptx::load_matrices(chunk(row + matrix % 2 * 8 + r, column / 8 + matrix / 2));
  }
  // The same of the transpose: A [16, 16] whose element (i, k) is (row + k, column + i) here.
  STACKBERT_DEVICE Words4 a_operand_transposed(int row, int column) const {
    const int matrix = ptx::lane() / 8, r = ptx::lane() % 8;
    return ptx::load_matrices_transposed(chunk(row + matrix / 2 * 8 + r, column / 8 + matrix % 2));
  }
  // B [16, 8] twice, for 16 rows of this tile as the columns of B: element (k, n) is (row + n, column + k).
  STACKBERT_DEVICE Words4 b_operands_of_rows(int row, int column) const {
    const int matrix = ptx::lane() / 8, r = ptx::lane() % 8;
    return ptx::load_matrices(chunk(row + matrix / 2 * 8 + r, column / 8 + matrix % 2));
  }
  // B [16, 8] twice, for 16 columns of this tile: element (k, n) is (row + k, column + n).
  STACKBERT_DEVICE Words4 b_operands_of_columns(int row, int column) const {
    const int matrix = ptx::lane() / 8, r = ptx::lane() % 8;
    return ptx::load_matrices_transposed(chunk(row + matrix % 2 * 8 + r, column / 8 + matrix / 2));
  }

  // A warp's [16, 8 kTiles] accumulators, rounded, into rows row .. row + 15 from `column` on.
  template <int kTiles>
  STACKBERT_DEVICE void store(int row, int column, const float (&c)[kTiles][4]) const {
    const int g = ptx::lane() / 4, t = ptx::lane() % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        (chunk(row + g + 8 * half, column / 8 + n) + 4 * t)
            .template as<uint32_t>()
            .store(0, ptx::pack<T>(c[n][2 * half], c[n][2 * half + 1]));
  }
  template <int kTiles>
  STACKBERT_DEVICE void store_packed(int row, int column, const uint32_t (&c)[kTiles][2]) const {
    const int g = ptx::lane() / 4, t = ptx::lane() % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        (chunk(row + g + 8 * half, column / 8 + n) + 4 * t).template as<uint32_t>().store(0, c[n][half]);
  }

  // Rows row .. row + 15, which this warp alone has written, to rows [first, end) of a tensor's 16; 16 bytes a lane.
  STACKBERT_DEVICE void write_rows(int row, const HeadRows& to, int64_t at, int valid) const {
    T* data = static_cast<T*>(to.data) + at;
#pragma unroll
    for (int i = ptx::lane(); i < 16 * kChunks; i += 32) {
      const int r = i / kChunks, c = i % kChunks;
      if (r < valid)
        ptx::store(reinterpret_cast<Words4*>(data + r * to.token + c * 8),
                   chunk(row + r, c).template as<Words4>().load());
    }
  }
};

// c[n] += A B[n] for 16 more of the inner dimension: kTiles tiles of 8 columns, B operands by twos.
template <typename T, int kTiles, typename Operands>
STACKBERT_DEVICE void multiply(float (&c)[kTiles][4], const uint32_t (&a)[4], const Operands& b_operands) {
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    const Words4 b = b_operands(n);
    ptx::multiply_add<T>(c[n], a, b.v[0], b.v[1]);
    ptx::multiply_add<T>(c[n + 1], a, b.v[2], b.v[3]);
  }
}

template <int kTiles>
STACKBERT_DEVICE void clear(float (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0.f;
}

// rows of `a` from a_row on, times rows of `b` from b_row on: c [16, 8 kTiles] = a b^T over D columns.
template <typename T, int kTiles, typename A, typename B>
STACKBERT_DEVICE void rows_by_rows(float (&c)[kTiles][4], const A& a, int a_row, const B& b, int b_row) {
  clear(c);
#pragma unroll
  for (int k = 0; k < A::kChunks * 8; k += 16)
    multiply<T>(c, a.a_operand(a_row, k).v, [&](int n) { return b.b_operands_of_rows(b_row + 8 * n, k); });
}

// Accumulators c [16, 8 kTiles], packed, as the A operand of columns 16 i .. 16 i + 15.
template <int kTiles>
STACKBERT_DEVICE Words4 as_a_operand(const uint32_t (&c)[kTiles][2], int i) {
  return {{c[2 * i][0], c[2 * i][1], c[2 * i + 1][0], c[2 * i + 1][1]}};
}

// The decisions of one row's 64 keys that an accumulator's lane holds: bit 2j + e is key 8j + 2t + e.
STACKBERT_DEVICE uint32_t kept_of_row(PhiloxKey key, int key_group, int query, int head, int sequence, int threshold) {
  const PhiloxWords words =
      philox(key, static_cast<uint32_t>(4 * key_group + ptx::lane() % 4), static_cast<uint32_t>(query),
             static_cast<uint32_t>(head), static_cast<uint32_t>(sequence));
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i)
    kept |= (static_cast<int>(words.w[i / 4] >> (8 * (i % 4)) & 255) >= threshold ? 1u : 0u) << i;
  return kept;
}

// Over the four lanes that hold a row.
STACKBERT_DEVICE float row_max(float x) {
  x = fmaxf(x, ptx::shuffle_xor(x, 1));
  return fmaxf(x, ptx::shuffle_xor(x, 2));
}
STACKBERT_DEVICE float row_sum(float x) {
  x += ptx::shuffle_xor(x, 1);
  return x + ptx::shuffle_xor(x, 2);
}

// Which (tile, head, sequence) a block has: sequences in the given order, longest first, a sequence's tiles together,
// so that they find its keys in the L2 cache.
struct Place {
  int tile, head, sequence, length;
  int64_t start;  // its first row, in elements of a HeadRows without batch stride: packed tokens

  STACKBERT_DEVICE Place(const Attention& a, int tiles) {
    const int64_t block = blockIdx.x;
    tile = static_cast<int>(block % tiles);
    head = static_cast<int>(block / tiles % a.heads);
    sequence = ptx::load(a.order + block / tiles / a.heads);
    const int first = ptx::load(a.seqlens + sequence);
    start = a.packed ? first : 0;
    length = a.packed ? ptx::load(a.seqlens + sequence + 1) - first : first;
  }
  // The element of `row` of this sequence and head.
  STACKBERT_DEVICE int64_t at(const HeadRows& x, int row) const {
    return sequence * x.batch + (start + row) * x.token + head * x.head;
  }
  STACKBERT_DEVICE int64_t lse_at(const Attention& a, int row) const {
    return sequence * a.lse_batch + head * a.lse_head + start + row;
  }
};

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// run(T{}, D) for the element type and head dimension of `a`.
template <typename Run>
void with_kernel(const Attention& a, const Run& run) {
  const auto with_type = [&](auto element) {
    if (a.head_dim == 32) return run(element, std::integral_constant<int, 32>{});
    if (a.head_dim == 64) return run(element, std::integral_constant<int, 64>{});
    return run(element, std::integral_constant<int, 128>{});
  };
  if (a.dtype == DType::kBFloat16)
    with_type(bfloat16{});
  else
    with_type(float16{});
}

}  // namespace cuda
}  // namespace stackbert
