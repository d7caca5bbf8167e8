#include <algorithm>
#include <limits>

#include "common/column_sums.cuh"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "embedding/embedding.h"

// The rows of a token lie in the registers of its threads as those of a layer norm do: thread t of kThreads has the
// vectors t, t + kThreads, ... of kWidth elements. The dtypes of tables and of y are chosen where something is loaded
// or stored, by branches that a whole launch takes alike: nine kernels in one.
//
// Gradients of the tables: a warp sums a piece of kPieceTokens sorted tokens for 128 columns, reading dz once for each
// table; a second kernel adds up what goes on over the border of a piece, in the order of the pieces.

namespace stackbert {
namespace cuda {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <int kWidth_, int kVectors_, int kWarps_>
struct Row {
  static constexpr int kWidth = kWidth_, kVectors = kVectors_, kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps, kElements = kWidth * kVectors;

  static STACKBERT_DEVICE int thread() { return static_cast<int>(threadIdx.x % kThreads); }
  static STACKBERT_DEVICE int column(int vector) { return (vector * kThreads + thread()) * kWidth; }
};

// with_dtype, on the device.
template <typename Run>
STACKBERT_DEVICE void with_element(DType dtype, const Run& run) {
  if (dtype == DType::kFloat32)
    run(float{});
  else if (dtype == DType::kBFloat16)
    run(bfloat16{});
  else
    run(float16{});
}

// kWidth elements in as few accesses as 16 bytes each allow.
template <typename T, int kWidth>
struct Wide {
  static constexpr int kAccess = kWidth == 1 ? 1 : kWide<T>;
  Elements<T, kAccess> parts[kWidth / kAccess];

  STACKBERT_DEVICE void load(const T* p) {
#pragma unroll
    for (int i = 0; i < kWidth; i += kAccess) parts[i / kAccess] = Elements<T, kAccess>::load(p + i);
  }
  STACKBERT_DEVICE void to_floats(float* out) const {
#pragma unroll
    for (int i = 0; i < kWidth; i += kAccess) parts[i / kAccess].to_floats(out + i);
  }
  static STACKBERT_DEVICE void store(T* p, const float* x) {
#pragma unroll
    for (int i = 0; i < kWidth; i += kAccess) Elements<T, kAccess>::from_floats(x + i).store(p + i);
  }
};

// The rows that a token reads; none where an index is out of range.
struct Sources {
  int64_t rows[kTables];
  bool valid = true;

  STACKBERT_DEVICE Sources(const EmbeddingInputs& a, int64_t token) {
#pragma unroll
    for (int i = 0; i < kTables; ++i) {
      rows[i] = ptx::load(a.ids[i] + token);
      valid = valid && rows[i] >= 0 && rows[i] < a.table_rows[i];
    }
  }
};

template <typename T>
STACKBERT_DEVICE const T* source(const EmbeddingInputs& a, const Sources& s, int table) {
  return static_cast<const T*>(a.tables[table]) + s.rows[table] * a.columns;
}

// z of a token, 0 past its last column and where it reads nothing. All loads of word rows are under way before the
// first is used; the other tables are in the caches. Registers that a load may leave out are cleared first, here and
// below: else they would hold on to the token before, in a loop.
template <typename R, typename T>
STACKBERT_DEVICE void load_sum(const EmbeddingInputs& a, const Sources& s, float (&z)[R::kElements]) {
  Wide<T, R::kWidth> word[R::kVectors] = {};
#pragma unroll
  for (int v = 0; v < R::kVectors; ++v)
    if (s.valid && R::column(v) < a.columns) word[v].load(source<T>(a, s, 0) + R::column(v));
#pragma unroll
  for (int v = 0; v < R::kVectors; ++v) {
    float* out = z + v * R::kWidth;
    const int c = R::column(v);
    if (!s.valid || c >= a.columns) {
#pragma unroll
      for (int i = 0; i < R::kWidth; ++i) out[i] = 0.f;
      continue;
    }
    word[v].to_floats(out);
#pragma unroll
    for (int table = 1; table < kTables; ++table) {
      Wide<T, R::kWidth> other;
      float added[R::kWidth];
      other.load(source<T>(a, s, table) + c);
      other.to_floats(added);
#pragma unroll
      for (int i = 0; i < R::kWidth; ++i) out[i] += added[i];
    }
  }
}

template <typename R>
constexpr int kForwardWarps = R::kWarps == 1 ? 8 : R::kWarps;  // of a block
// Of a multiprocessor, whose registers are to hold them: the compiler's own choice would spill.
template <typename R>
constexpr int kForwardBlocks = R::kWidth == 1 ? 1 : (R::kElements > 24 ? 3 : 4);

template <typename R>
__global__ void __launch_bounds__(32 * kForwardWarps<R>, kForwardBlocks<R>)
    embedding_fwd_kernel(const __grid_constant__ EmbeddingFwd a) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kForwardWarps<R> / R::kWarps) + ptx::warp() / R::kWarps;
  if (token >= a.in.tokens) return;
  const auto scratch = ptx::shared_memory().as<float>();
  const Sources s(a.in, token);
  float z[R::kElements];
  with_element(a.in.table_dtype, [&](auto element) { load_sum<R, decltype(element)>(a.in, s, z); });

  float total = 0.f;
#pragma unroll
  for (int i = 0; i < R::kElements; ++i) total += z[i];
  const float columns = static_cast<float>(a.in.columns);
  const float sum = block_sum<R::kWarps>(total, scratch), mean = s.valid ? sum / columns : kNaN;

  float square = 0.f;  // around the mean: E[z^2] - mean^2 loses its digits when |mean| >> std
#pragma unroll
  for (int v = 0; v < R::kVectors; ++v)
    if (R::column(v) < a.in.columns)
#pragma unroll
      for (int i = v * R::kWidth; i < (v + 1) * R::kWidth; ++i) square += (z[i] - mean) * (z[i] - mean);
  const float rstd = ptx::reciprocal_sqrt(block_sum<R::kWarps>(square, scratch + R::kWarps) / columns + a.eps);

  PhiloxKey key{};
  if (a.in.threshold > 0) key = dropout_key(a.in.rng, a.in.site);
  const float scale = dropout_scale(a.in.threshold);
#pragma unroll
  for (int v = 0; v < R::kVectors; ++v) {
    const int c = R::column(v);
    if (c >= a.in.columns) continue;
    float weight[R::kWidth], bias[R::kWidth], out[R::kWidth];
    load_parameters<R::kWidth>(a.weight + c, weight);
    load_parameters<R::kWidth>(a.bias + c, bias);
#pragma unroll
    for (int i = 0; i < R::kWidth; ++i) out[i] = (z[v * R::kWidth + i] - mean) * rstd * weight[i] + bias[i];
    if (a.in.threshold > 0) {
      const uint32_t kept = row_dropout<R::kWidth>(key, token, c, a.in.threshold);
#pragma unroll
      for (int i = 0; i < R::kWidth; ++i) out[i] *= kept >> i & 1 ? scale : 0.f;  // NaN stays
    }
    with_element(a.in.dtype, [&](auto element) {
      using Y = decltype(element);
      Wide<Y, R::kWidth>::store(static_cast<Y*>(a.y) + token * a.in.columns + c, out);
    });
  }
  if (a.mean && R::thread() == 0) {
    ptx::store(a.mean + token, mean);
    ptx::store(a.rstd + token, rstd);
  }
}

// Sums over tokens: each block has its own [2, C] of partial sums in the workspace.
enum Sum { kWeight, kBias, kSums };

// As many as backward_blocks counts on.
template <typename R>
constexpr int kBackwardBlocks = R::kWidth == 1 ? 1 : (R::kWarps <= 4 ? 8 : 2);

// A block for a row at a time: a thread keeps the sums of its columns beside the row.
template <typename R>
__global__ void __launch_bounds__(R::kThreads, kBackwardBlocks<R>)
    embedding_bwd_kernel(const __grid_constant__ EmbeddingRowsBwd a) {
  const auto scratch = ptx::shared_memory().as<float>();
  const int64_t columns = a.in.columns;
  PhiloxKey key{};
  if (a.in.threshold > 0) key = dropout_key(a.in.rng, a.in.site);
  const float scale = dropout_scale(a.in.threshold);
  float dweight[R::kElements] = {}, dbias[R::kElements] = {};

  for (int64_t token = blockIdx.x; token < a.in.tokens; token += gridDim.x) {
    const Sources s(a.in, token);
    const float mean = ptx::load(a.mean + token), rstd = ptx::load(a.rstd + token);
    float z[R::kElements], dy[R::kElements] = {};
    with_element(a.in.dtype, [&](auto element) {
      using Y = decltype(element);
      Wide<Y, R::kWidth> incoming[R::kVectors] = {};
#pragma unroll
      for (int v = 0; v < R::kVectors; ++v)
        if (R::column(v) < columns) incoming[v].load(static_cast<const Y*>(a.dy) + token * columns + R::column(v));
      with_element(a.in.table_dtype, [&](auto source) { load_sum<R, decltype(source)>(a.in, s, z); });
#pragma unroll
      for (int v = 0; v < R::kVectors; ++v)
        if (R::column(v) < columns) incoming[v].to_floats(dy + v * R::kWidth);
    });

    // u = dy mask, n = (z - mean) rstd, g = u weight; dz = rstd (g - mean(g) - n mean(g n))
    float of_g = 0.f, of_gn = 0.f;
#pragma unroll
    for (int v = 0; v < R::kVectors; ++v) {
      const int c = R::column(v);
      if (c >= columns) continue;
      float weight[R::kWidth];
      load_parameters<R::kWidth>(a.weight + c, weight);
      uint32_t kept = 0;
      if (a.in.threshold > 0) kept = row_dropout<R::kWidth>(key, token, c, a.in.threshold);
#pragma unroll
      for (int i = 0; i < R::kWidth; ++i) {
        const int e = v * R::kWidth + i;
        if (a.in.threshold > 0) dy[e] *= kept >> i & 1 ? scale : 0.f;
        z[e] = (z[e] - mean) * rstd;
        dweight[e] += dy[e] * z[e], dbias[e] += dy[e];
        dy[e] *= weight[i];
        of_g += dy[e], of_gn += dy[e] * z[e];
      }
    }
    // Two sums in turn, in two places: the barrier within each stands between the other's reads and its next writes.
    const float mean_g = block_sum<R::kWarps>(of_g, scratch) / static_cast<float>(columns);
    const float mean_gn = block_sum<R::kWarps>(of_gn, scratch + R::kWarps) / static_cast<float>(columns);
#pragma unroll
    for (int v = 0; v < R::kVectors; ++v) {
      const int c = R::column(v);
      if (c >= columns) continue;
      float dz[R::kWidth];
#pragma unroll
      for (int i = 0; i < R::kWidth; ++i) {
        const int e = v * R::kWidth + i;
        dz[i] = rstd * (dy[e] - mean_g - z[e] * mean_gn);
      }
      Wide<float, R::kWidth>::store(a.dz + token * columns + c, dz);
    }
  }

  float* partial = a.workspace + static_cast<int64_t>(blockIdx.x) * kSums * columns;
#pragma unroll
  for (int v = 0; v < R::kVectors; ++v) {
    if (R::column(v) >= columns) continue;
    Wide<float, R::kWidth>::store(partial + kWeight * columns + R::column(v), dweight + v * R::kWidth);
    Wide<float, R::kWidth>::store(partial + kBias * columns + R::column(v), dbias + v * R::kWidth);
  }
}

constexpr int kNoRow = -2;  // behind the last token

// One table of the three, and where in it a warp works.
template <int kWidth>
struct Piece {
  static constexpr int kColumns = 32 * kWidth;  // of a warp

  const EmbeddingSums& a;
  int table;
  int64_t piece, first, end, column;

  STACKBERT_DEVICE Piece(const EmbeddingSums& sums, int64_t unit) : a(sums) {
    const int64_t groups = (a.columns + kColumns - 1) / kColumns;
    table = static_cast<int>(unit / groups / a.pieces);
    piece = unit / groups % a.pieces;
    column = unit % groups * kColumns + ptx::lane() * kWidth;
    first = piece * kPieceTokens;
    end = min(first + kPieceTokens, a.tokens);
  }
  STACKBERT_DEVICE bool has_column() const { return column < a.columns; }
  // Of the table, that the token at this place in their order reads; -1 or table_rows where that is out of range.
  STACKBERT_DEVICE int row(int64_t place) const {
    if (a.narrow[table]) return ptx::load(static_cast<const int16_t*>(a.rows[table]) + place);
    return ptx::load(static_cast<const int32_t*>(a.rows[table]) + place);
  }
  // Whether the piece goes on with the row that the piece before it ended with.
  STACKBERT_DEVICE bool from_before() const { return piece > 0 && row(first) == row(first - 1); }
  STACKBERT_DEVICE bool in_table(int row) const { return row >= 0 && row < a.table_rows[table]; }
  // A piece's partial sums: of the row that began before it (head), of the one that goes on behind it (tail).
  STACKBERT_DEVICE float* part(int64_t of_piece, bool tail) const {
    return a.parts + ((table * a.pieces + of_piece) * 2 + (tail ? 1 : 0)) * a.columns + column;
  }
  STACKBERT_DEVICE void store(int row, const float* total) const {
    with_element(a.table_dtype, [&](auto element) {
      using T = decltype(element);
      T* to = static_cast<T*>(a.dtables[table]) + row * a.columns + column;
      if constexpr (kWidth == 1 || sizeof(T) == 4)
        Elements<T, kWidth>::from_floats(total).store(to);
      else
        ptx::store(reinterpret_cast<ptx::Vec<uint32_t, 2>*>(to),
                   ptx::Vec<uint32_t, 2>{{ptx::pack<T>(total[0], total[1]), ptx::pack<T>(total[2], total[3])}});
    });
  }
};

constexpr int kSumWarps = 4, kAhead = 8;  // of a block; loads that a lane has under way

// Five blocks of a multiprocessor leave 96 registers; unbound, the compiler stays below 81 and spills.
template <int kWidth>
__global__ void __launch_bounds__(32 * kSumWarps, 5) sum_pieces_kernel(const __grid_constant__ EmbeddingSums a) {
  using Vector = Elements<float, kWidth>;
  const Piece<kWidth> p(a, static_cast<int64_t>(blockIdx.x) * kSumWarps + ptx::warp());
  if (p.table >= kTables || !p.has_column()) return;
  const int64_t* const order = a.order[p.table];
  bool begins = true, in_head = p.from_before();
  int row = p.row(p.first);
  float total[kWidth] = {};
  for (int64_t start = p.first; start < p.end; start += kAhead) {
    Vector loaded[kAhead];
    int next[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (start + j < p.end) loaded[j] = Vector::load(a.dz + ptx::load(order + start + j) * a.columns + p.column);
      next[j] = start + j + 1 < a.tokens ? p.row(start + j + 1) : kNoRow;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t place = start + j;
      if (place >= p.end) break;
      float x[kWidth];
      loaded[j].to_floats(x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) total[i] = begins ? x[i] : total[i] + x[i];
      const bool goes_on = next[j] == row;
      if (!goes_on || place + 1 == p.end) {
        if (in_head || goes_on)
          Vector::from_floats(total).store(p.part(p.piece, !in_head));
        else if (p.in_table(row))
          p.store(row, total);
      }
      if (!goes_on) in_head = false;
      begins = !goes_on, row = next[j];
    }
  }
}

constexpr int kJoinWarps = 8;

// A block for every border between two pieces; those where no row begins that goes on over it have nothing to do.
template <int kWidth>
__global__ void __launch_bounds__(32 * kJoinWarps) join_pieces_kernel(const __grid_constant__ EmbeddingSums a) {
  using Vector = Elements<float, kWidth>;
  const Piece<kWidth> p(a, blockIdx.x);
  if (p.end == a.tokens) return;
  const int row = p.row(p.end - 1);
  if (row != p.row(p.end) || (p.from_before() && p.row(p.first) == row) || !p.in_table(row)) return;

  // Warp w adds up the heads of pieces w, w + kJoinWarps, ... behind this one, kAhead at a time.
  const auto scratch = ptx::shared_memory().as<ptx::Vec<float, kWidth>>();
  float total[kWidth] = {};
  bool more = true;
  for (int64_t behind = p.piece + 1 + ptx::warp() * kAhead; more; behind += kJoinWarps * kAhead) {
    Vector heads[kAhead];
    bool goes_on[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t first = (behind + j) * kPieceTokens;
      goes_on[j] = first < a.tokens && p.row(first) == row;
      if (goes_on[j] && p.has_column()) heads[j] = Vector::load(p.part(behind + j, false));
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (!goes_on[j] || !p.has_column()) continue;
      float x[kWidth];
      heads[j].to_floats(x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) total[i] += x[i];
    }
    more = goes_on[kAhead - 1];
  }
  scratch.store(static_cast<int>(threadIdx.x), Vector::from_floats(total).raw);
  ptx::block_sync();
  if (ptx::warp() != 0 || !p.has_column()) return;
  Vector::load(p.part(p.piece, true)).to_floats(total);
  for (int w = 0; w < kJoinWarps; ++w) {
    const auto other = scratch.load(32 * w + ptx::lane());
#pragma unroll
    for (int i = 0; i < kWidth; ++i) total[i] += other.v[i];
  }
  p.store(row, total);
}

// run(Row<...>{}) for the smallest row that holds `columns`.
template <typename Run>
void with_forward_row(int64_t columns, bool wide, const Run& run) {
  if (!wide || columns % 8 != 0) {
    if (columns <= 1024) return run(Row<1, 4, 8>{});
    return run(Row<1, 8, 16>{});
  }
  if (columns <= 768) return run(Row<8, 3, 1>{});
  if (columns <= 1024) return run(Row<8, 4, 1>{});
  return run(Row<8, 2, 8>{});
}
template <typename Run>
void with_backward_row(int64_t columns, bool wide, const Run& run) {
  if (!wide || columns % 8 != 0) {
    if (columns <= 1024) return run(Row<1, 4, 8>{});
    return run(Row<1, 8, 16>{});
  }
  if (columns <= 768) return run(Row<8, 1, 3>{});
  if (columns <= 1024) return run(Row<8, 1, 4>{});
  return run(Row<8, 1, 16>{});
}

bool tables_aligned(const EmbeddingInputs& a) { return aligned_16({a.tables[0], a.tables[1], a.tables[2]}); }

// As many as fit at once, about.
int64_t backward_blocks(int64_t tokens, int64_t columns, int processors) {
  return std::min<int64_t>(tokens, (columns <= 1024 ? 8 : 2) * processors);
}

template <int kWidth>
void sum_by_row(const EmbeddingSums& a, void* stream) {
  const int64_t groups = (a.columns + Piece<kWidth>::kColumns - 1) / Piece<kWidth>::kColumns;
  const int64_t units = kTables * a.pieces * groups;
  launch("embedding_sums", sum_pieces_kernel<kWidth>, (units + kSumWarps - 1) / kSumWarps, 32 * kSumWarps, 0, stream,
         a);
  if (a.tokens > kPieceTokens)
    launch("embedding_sums", join_pieces_kernel<kWidth>, units, 32 * kJoinWarps,
           32 * kJoinWarps * kWidth * static_cast<int>(sizeof(float)), stream, a);
}

}  // namespace

void embedding_fwd(const EmbeddingFwd& a, int device, void* stream) {
  if (a.in.tokens == 0) return;
  const OnDevice on_device("embedding_fwd", device);
  with_forward_row(a.in.columns, tables_aligned(a.in) && aligned_16({a.weight, a.bias, a.y}), [&](auto row) {
    using R = decltype(row);
    constexpr int kRows = kForwardWarps<R> / R::kWarps;
    launch("embedding_fwd", embedding_fwd_kernel<R>, (a.in.tokens + kRows - 1) / kRows, 32 * kForwardWarps<R>,
           R::kWarps > 1 ? 2 * R::kWarps * static_cast<int>(sizeof(float)) : 0, stream, a);
  });
}

int64_t embedding_rows_bwd_workspace(int64_t tokens, int64_t columns, int device) {
  return backward_blocks(tokens, columns, multiprocessors("embedding_bwd", device)) * kSums * columns;
}

void embedding_rows_bwd(const EmbeddingRowsBwd& a, int device, void* stream) {
  const OnDevice on_device("embedding_bwd", device);
  const int64_t blocks = backward_blocks(a.in.tokens, a.in.columns, multiprocessors("embedding_bwd", device));
  if (blocks > 0)
    with_backward_row(a.in.columns, tables_aligned(a.in) && aligned_16({a.dy, a.weight, a.dz, a.workspace}),
                      [&](auto row) {
                        using R = decltype(row);
                        launch("embedding_bwd", embedding_bwd_kernel<R>, blocks, R::kThreads,
                               2 * R::kWarps * static_cast<int>(sizeof(float)), stream, a);
                      });
  column_sums<kSums>("embedding_bwd", {a.workspace, blocks, a.in.columns, {a.dweight, a.dbias}}, stream);
}

void embedding_sums(const EmbeddingSums& a, int device, void* stream) {
  if (a.tokens == 0) return;
  const OnDevice on_device("embedding_sums", device);
  const bool wide = aligned_16({a.dz, a.parts, a.dtables[0], a.dtables[1], a.dtables[2]});
  wide&& a.columns % 4 == 0 ? sum_by_row<4>(a, stream) : sum_by_row<1>(a, stream);
}

}  // namespace cuda
}  // namespace stackbert
