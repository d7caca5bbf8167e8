#include "attention/attention.h"
#include "attention/tiles.cuh"
#include "common/launch.cuh"
#include "common/rows.cuh"

// Scores are products of mma.sync.m16n8k16: a warp has 16 rows of a tile and all its columns, so that a softmax row
// lies in four lanes. Dropout is drawn again in backward: the accumulator's layout is the mask's (common/philox.h), so
// a lane draws 16 decisions in one call, some 30 instructions, where stored bits would cost their traffic twice.
//
// Forward: a block has 128 queries. Up to 128 keys there is one tile of keys and the softmax is exact at once; beyond,
// tiles of 64 keys with the running maximum, the next tile under way while one is worked on.
//
// Backward, without atomics and without a float32 dq in memory: one pass has 64 queries a block and gives dq (and
// delta = rowsum(out dout), fused), another has 64 keys a block and gives dk and dv. Scores and their gradients are
// computed twice, 7 products instead of 5. Up to 128 tokens one block owns all of a (sequence, head): a kernel of its
// own computes them once and reads and writes each tensor once.

namespace stackbert {
namespace cuda {
namespace {

constexpr int kQueries = 128;  // of a block: eight warps of 16
constexpr int kThreads = 256;

// Sequences of up to so many tokens have their backward in one block; at D = 128 its tiles leave no room for a second
// block on a multiprocessor, and the two passes do.
template <int D>
constexpr int kOneTileRows = D <= 64 ? kQueries : 0;

// Scales scores by `scale`, in units of log2, and takes out keys from `keys` on.
template <int kTiles>
STACKBERT_DEVICE void scale_and_mask(float (&s)[kTiles][4], float scale, int keys) {
  const int t = ptx::lane() % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = 8 * n + 2 * t + i % 2 < keys ? s[n][i] * scale : -INFINITY;
}

// Drops probabilities of 64 keys' tiles [first, first + 8) for rows g (bits of `low`) and g + 8.
template <int kTiles>
STACKBERT_DEVICE void drop(float (&p)[kTiles][4], int first, uint32_t low, uint32_t high) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!((i < 2 ? low : high) >> (2 * j + i % 2) & 1)) p[first + j][i] = 0.f;
}

template <typename T, int D, int kKeys, int kStages>
struct ForwardMemory {
  using Queries = Tile<T, kQueries, D>;
  using Keys = Tile<T, kKeys, D>;
  static constexpr int kBytes = Queries::kBytes + 2 * kStages * Keys::kBytes;
  static STACKBERT_DEVICE Queries queries() { return Queries(ptx::shared_memory()); }
  static STACKBERT_DEVICE Keys keys(int stage) {
    return Keys(ptx::shared_memory() + Queries::kBytes + 2 * stage * Keys::kBytes);
  }
  static STACKBERT_DEVICE Keys values(int stage) {
    return Keys(ptx::shared_memory() + Queries::kBytes + (2 * stage + 1) * Keys::kBytes);
  }
};

// Up to kKeys keys where kOneTile, any number otherwise.
template <typename T, int D, int kKeys, bool kOneTile>
__global__ void __launch_bounds__(kThreads) attention_forward_kernel(const __grid_constant__ Attention a) {
  constexpr int kTiles = kKeys / 8, kStages = kOneTile ? 1 : 2;
  using Memory = ForwardMemory<T, D, kKeys, kStages>;
  const Place place(a, static_cast<int>((a.max_seqlen + kQueries - 1) / kQueries));
  const int first = place.tile * kQueries, rows = place.length - first;
  const int own = 16 * ptx::warp(), g = ptx::lane() / 4;
  const auto queries = Memory::queries();

  if (rows <= 0) {  // past the sequence: nothing, or zeros where the tensor is padded
    if (a.packed) return;
  } else {
    queries.template copy_async<kThreads>(a.q, place.at(a.q, first), min(rows, kQueries));
  }
  const int key_tiles = rows <= 0 ? 0 : kOneTile ? 1 : (place.length + kKeys - 1) / kKeys;
  const auto fetch = [&](int tile) {
    if (tile < key_tiles) {
      const int from = tile * kKeys, count = min(place.length - from, kKeys);
      Memory::keys(tile % kStages).template copy_async<kThreads>(a.k, place.at(a.k, from), count);
      ptx::commit_copies();
      Memory::values(tile % kStages).template copy_async<kThreads>(a.v, place.at(a.v, from), count);
    } else {
      ptx::commit_copies();
    }
    ptx::commit_copies();  // two groups a tile, empty or not, so that waits count the same
  };
  fetch(0);

  PhiloxKey key{};
  if (a.threshold > 0) key = dropout_key(a.rng, a.site);
  const float scale = a.scale * kLog2e;
  float out[D / 8][4], maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
  clear(out);
  for (int tile = 0; tile < key_tiles; ++tile) {
    if constexpr (!kOneTile) fetch(tile + 1);
    ptx::wait_copies<kOneTile ? 1 : 3>();  // this tile's keys
    ptx::block_sync();
    float p[kTiles][4];
    const bool active = own < rows;
    if (active) {
      rows_by_rows<T>(p, queries, own, Memory::keys(tile % kStages), 0);
      scale_and_mask(p, scale, place.length - tile * kKeys);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = p[0][2 * half];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) largest = fmaxf(largest, fmaxf(p[n][2 * half], p[n][2 * half + 1]));
        largest = row_max(largest);
        if constexpr (!kOneTile) {
          largest = fmaxf(largest, maximum[half]);
          const float less = ptx::exp2(maximum[half] - largest);
          sum[half] *= less;
#pragma unroll
          for (int n = 0; n < D / 8; ++n) out[n][2 * half] *= less, out[n][2 * half + 1] *= less;
        }
        maximum[half] = largest;
        float own_sum = 0.f;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) own_sum += p[n][i] = ptx::exp2(p[n][i] - largest);
        sum[half] += own_sum;  // of this lane's keys; the other lanes' come at the end
      }
      if (a.threshold > 0) {
#pragma unroll
        for (int group = 0; group < kKeys / 64; ++group) {
          const int of_keys = tile * (kKeys / 64) + group, query = first + own + g;
          drop(p, 8 * group, kept_of_row(key, of_keys, query, place.head, place.sequence, a.threshold),
               kept_of_row(key, of_keys, query + 8, place.head, place.sequence, a.threshold));
        }
      }
    }
    ptx::wait_copies<kOneTile ? 0 : 2>();  // its values
    ptx::block_sync();
    if (active) {
      const auto values = Memory::values(tile % kStages);
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        const uint32_t probabilities[4] = {
            ptx::pack<T>(p[2 * i][0], p[2 * i][1]), ptx::pack<T>(p[2 * i][2], p[2 * i][3]),
            ptx::pack<T>(p[2 * i + 1][0], p[2 * i + 1][1]), ptx::pack<T>(p[2 * i + 1][2], p[2 * i + 1][3])};
        multiply<T>(out, probabilities, [&](int n) { return values.b_operands_of_columns(16 * i, 8 * n); });
      }
    }
    if constexpr (!kOneTile) ptx::block_sync();  // the next but one tile overwrites this one's place
  }
  ptx::wait_copies<0>();

  const float kept_scale = a.threshold > 0 ? dropout_scale(a.threshold) : 1.f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = row_sum(sum[half]);
    const float over = total > 0.f ? kept_scale / total : 0.f;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) out[n][2 * half] *= over, out[n][2 * half + 1] *= over;
    const int row = own + g + 8 * half;
    const bool written = a.packed ? row < rows : first + row < a.max_seqlen;
    if (a.lse && ptx::lane() % 4 == 0 && written)
      ptx::store(a.lse + place.lse_at(a, first + row), row < rows ? (maximum[half] + ptx::log2(total)) * kLn2 : 0.f);
  }
  // This warp's queries are read by no other, and not again.
  const int valid = a.packed ? rows - own : static_cast<int>(a.max_seqlen) - first - own;
  if (valid <= 0) return;
  if (own >= rows) clear(out);
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (own + g + 8 * half >= rows)
#pragma unroll
      for (int n = 0; n < D / 8; ++n) out[n][2 * half] = out[n][2 * half + 1] = 0.f;
  ptx::warp_sync();
  queries.store(own, 0, out);
  ptx::warp_sync();
  queries.write_rows(own, a.out, place.at(a.out, first + own), valid);
}

template <typename T, int D>
void forward(const Attention& a, void* stream) {
  const int64_t tiles = (a.max_seqlen + kQueries - 1) / kQueries, blocks = tiles * a.heads * a.sequences;
  if (a.max_seqlen <= 64)
    launch("attention", attention_forward_kernel<T, D, 64, true>, blocks, kThreads, ForwardMemory<T, D, 64, 1>::kBytes,
           stream, a);
  else if (a.max_seqlen <= 128)
    launch("attention", attention_forward_kernel<T, D, 128, true>, blocks, kThreads,
           ForwardMemory<T, D, 128, 1>::kBytes, stream, a);
  else
    launch("attention", attention_forward_kernel<T, D, 64, false>, blocks, kThreads, ForwardMemory<T, D, 64, 2>::kBytes,
           stream, a);
}

// Backward. Scores are worked on 32 columns at a time: two products' accumulators and the sums fit 128 registers then.
constexpr int kColumns = 32, kColumnTiles = kColumns / 8;

constexpr int kHalfThreads = 128;  // of the two passes: 64 rows

struct Backward {
  AttentionBackward a;
  float* delta;
};

template <int kTiles>
STACKBERT_DEVICE void scale_all(float (&c)[kTiles][4], float scale) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] *= scale;
}

// Probabilities from scores and the rows' log-sum-exp (both in log2, by `scale`), with columns from `columns` on taken
// out, and from dp = dropout(dout v^T): ds = p (dp - delta), whose scale is left to the sums. Both packed, p after
// dropout; bit 2n + e of `kept` is that of column 8n + 2t + e.
template <typename T, int kTiles>
STACKBERT_DEVICE void score_gradients(const float (&s)[kTiles][4], const float (&dp)[kTiles][4], float scale,
                                      const float (&lse)[2], const float (&delta)[2], int columns, uint32_t kept_low,
                                      uint32_t kept_high, float kept_scale, uint32_t (*p_packed)[2],
                                      uint32_t (*ds_packed)[2]) {
  const int t = ptx::lane() % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float dropped[2], ds[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool inside = 8 * n + 2 * t + e < columns;
        const float p = inside ? ptx::exp2(s[n][2 * half + e] * scale - lse[half]) : 0.f;
        const float factor = (half ? kept_high : kept_low) >> (2 * n + e) & 1 ? kept_scale : 0.f;
        dropped[e] = p * factor;
        ds[e] = p * (dp[n][2 * half + e] * factor - delta[half]);
      }
      if (p_packed) p_packed[n][half] = ptx::pack<T>(dropped[0], dropped[1]);
      ds_packed[n][half] = ptx::pack<T>(ds[0], ds[1]);
    }
}

// rowsum(out dout) of rows g and g + 8 of this warp's 16, `valid` of which exist; dout's tile is in shared memory.
template <typename T, int D, typename Douts>
STACKBERT_DEVICE void row_delta(const Backward& b, const Place& place, int row, int valid, const Douts& douts, int own,
                                float (&delta)[2]) {
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  const T* out = static_cast<const T*>(b.a.forward.out.data);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = g + 8 * half;
    float sum = 0.f;
    if (r < valid)
#pragma unroll
      for (int c = t; c < D / 8; c += 4) {
        const Words4 x = ptx::load(reinterpret_cast<const Words4*>(out + place.at(b.a.forward.out, row + r) + 8 * c));
        const Words4 y = douts.chunk(own + r, c).template as<Words4>().load();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const ptx::Pair o = ptx::unpack<T>(x.v[i]), d = ptx::unpack<T>(y.v[i]);
          sum += o.low * d.low + o.high * d.high;
        }
      }
    delta[half] = row_sum(sum);
  }
}

// The log-sum-exp, in log2, of rows g and g + 8; rows that do not exist get probability 0.
STACKBERT_DEVICE void row_lse(const Attention& a, const Place& place, int row, int valid, float (&lse)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = ptx::lane() / 4 + 8 * half;
    lse[half] = r < valid ? ptx::load(a.lse + place.lse_at(a, row + r)) * kLog2e : INFINITY;
  }
}

// Rows of a padded tensor past the sequence get zeros: this block's tile of `rows` rows of each given gradient.
template <typename T, int D>
STACKBERT_DEVICE void zero_rows(const Backward& b, const Place& place, const HeadRows& to, int first, int rows,
                                int threads) {
  const int end = min(first + rows, static_cast<int>(b.a.forward.max_seqlen));
  for (int i = static_cast<int>(threadIdx.x); i < rows * (D / 8); i += threads) {
    const int row = first + i / (D / 8), c = i % (D / 8);
    if (row >= place.length && row < end)
      ptx::store(reinterpret_cast<Words4*>(static_cast<T*>(to.data) + place.at(to, row) + 8 * c), Words4{});
  }
}

// dq and delta: a block has 64 queries and goes over tiles of 64 keys.
template <typename T, int D>
struct DqMemory {
  using Queries = Tile<T, 64, D>;
  using Keys = Tile<T, 64, D>;
  static constexpr int kBytes = 2 * Queries::kBytes + 4 * Keys::kBytes;
};

template <typename T, int D>
__global__ void __launch_bounds__(kHalfThreads, D <= 64 ? 3 : 2)
    attention_dq_kernel(const __grid_constant__ Backward b) {
  using Memory = DqMemory<T, D>;
  const Attention& a = b.a.forward;
  const Place place(a, static_cast<int>((a.max_seqlen + 63) / 64));
  const int first = 64 * place.tile, rows = place.length - first;
  if (!a.packed) zero_rows<T, D>(b, place, b.a.dq, first, 64, kHalfThreads);
  if (rows <= 0 || place.length <= kOneTileRows<D>) return;
  const auto memory = ptx::shared_memory();
  const typename Memory::Queries queries(memory), douts(memory + Memory::Queries::kBytes);
  const auto keys = [&](int tile) {
    return typename Memory::Keys(memory + 2 * Memory::Queries::kBytes + tile % 2 * 2 * Memory::Keys::kBytes);
  };
  const auto values = [&](int tile) { return typename Memory::Keys(keys(tile).memory + Memory::Keys::kBytes); };
  const int own = 16 * ptx::warp(), valid = rows - own, g = ptx::lane() / 4;
  const int tiles = (place.length + 63) / 64;
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      const int from = 64 * tile, count = min(place.length - from, 64);
      keys(tile).template copy_async<kHalfThreads>(a.k, place.at(a.k, from), count);
      values(tile).template copy_async<kHalfThreads>(a.v, place.at(a.v, from), count);
    }
    ptx::commit_copies();
  };
  queries.template copy_async<kHalfThreads>(a.q, place.at(a.q, first), min(rows, 64));
  douts.template copy_async<kHalfThreads>(b.a.dout, place.at(b.a.dout, first), min(rows, 64));
  fetch(0);

  PhiloxKey key{};
  if (a.threshold > 0) key = dropout_key(a.rng, a.site);
  const float kept_scale = a.threshold > 0 ? dropout_scale(a.threshold) : 1.f;
  float lse[2], delta[2], dq[D / 8][4];
  row_lse(a, place, first + own, valid, lse);
  clear(dq);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    ptx::wait_copies<1>();
    ptx::block_sync();
    if (valid > 0) {
      if (tile == 0) {
        row_delta<T, D>(b, place, first + own, valid, douts, own, delta);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (ptx::lane() % 4 == 0 && g + 8 * half < valid)
            ptx::store(b.delta + place.lse_at(a, first + own + g + 8 * half), delta[half]);
      }
      uint32_t kept[2] = {0xFFFF, 0xFFFF};
      if (a.threshold > 0)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          kept[half] = kept_of_row(key, tile, first + own + g + 8 * half, place.head, place.sequence, a.threshold);
#pragma unroll 1
      for (int from = 0; from < 64; from += kColumns) {
        float s[kColumnTiles][4], dp[kColumnTiles][4];
        uint32_t ds[kColumnTiles][2];
        rows_by_rows<T>(s, queries, own, keys(tile), from);
        rows_by_rows<T>(dp, douts, own, values(tile), from);
        score_gradients<T>(s, dp, a.scale * kLog2e, lse, delta, place.length - 64 * tile - from, kept[0] >> (from / 4),
                           kept[1] >> (from / 4), kept_scale, nullptr, ds);
#pragma unroll
        for (int i = 0; i < kColumns / 16; ++i)
          multiply<T>(dq, as_a_operand(ds, i).v,
                      [&](int n) { return keys(tile).b_operands_of_columns(from + 16 * i, 8 * n); });
      }
    }
    ptx::block_sync();
  }
  ptx::wait_copies<0>();
  if (valid <= 0) return;
  scale_all(dq, a.scale);
  queries.store(own, 0, dq);  // read by this warp alone, and not again
  ptx::warp_sync();
  queries.write_rows(own, b.a.dq, place.at(b.a.dq, first + own), valid);
}

// dk and dv: a block has 64 keys, a warp 16 of them, and goes over tiles of 64 queries; scores are transposed, [16
// keys, 64 queries] a warp. The mask is drawn in its own layout, a row of 64 keys by four threads, and shared as bits.
template <typename T, int D>
struct DkvMemory {
  using Rows = Tile<T, 64, D>;
  static constexpr int kMask = 6 * Rows::kBytes, kStatistics = kMask + 64 * 4 * 2, kBytes = kStatistics + 64 * 2 * 4;
};

template <typename T, int D>
__global__ void __launch_bounds__(kHalfThreads, D <= 64 ? 3 : 2)
    attention_dkv_kernel(const __grid_constant__ Backward b) {
  using Memory = DkvMemory<T, D>;
  const Attention& a = b.a.forward;
  const Place place(a, static_cast<int>((a.max_seqlen + 63) / 64));
  const int first = 64 * place.tile, rows = place.length - first;
  if (!a.packed) {
    zero_rows<T, D>(b, place, b.a.dk, first, 64, kHalfThreads);
    zero_rows<T, D>(b, place, b.a.dv, first, 64, kHalfThreads);
  }
  if (rows <= 0 || place.length <= kOneTileRows<D>) return;
  const auto memory = ptx::shared_memory();
  using Rows = typename Memory::Rows;
  const Rows keys(memory), values(memory + Rows::kBytes);
  const auto queries = [&](int tile) { return Rows(memory + (2 + 2 * (tile % 2)) * Rows::kBytes); };
  const auto douts = [&](int tile) { return Rows(memory + (3 + 2 * (tile % 2)) * Rows::kBytes); };
  const auto mask = (memory + Memory::kMask).template as<uint16_t>();
  const auto statistics = (memory + Memory::kStatistics).template as<float>();  // lse in log2, then delta, by query
  const int own = 16 * ptx::warp(), g = ptx::lane() / 4, t = ptx::lane() % 4;
  const int tiles = (place.length + 63) / 64;
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      const int from = 64 * tile, count = min(place.length - from, 64);
      queries(tile).template copy_async<kHalfThreads>(a.q, place.at(a.q, from), count);
      douts(tile).template copy_async<kHalfThreads>(b.a.dout, place.at(b.a.dout, from), count);
    }
    ptx::commit_copies();
  };
  keys.template copy_async<kHalfThreads>(a.k, place.at(a.k, first), min(rows, 64));
  values.template copy_async<kHalfThreads>(a.v, place.at(a.v, first), min(rows, 64));
  fetch(0);

  PhiloxKey key{};
  if (a.threshold > 0) key = dropout_key(a.rng, a.site);
  const float kept_scale = a.threshold > 0 ? dropout_scale(a.threshold) : 1.f, scale = a.scale * kLog2e;
  float dk[D / 8][4], dv[D / 8][4];
  clear(dk), clear(dv);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    const int thread = static_cast<int>(threadIdx.x), from = 64 * tile;
    if (thread < 64) {
      const bool inside = from + thread < place.length;
      statistics.store(thread, inside ? ptx::load(a.lse + place.lse_at(a, from + thread)) * kLog2e : INFINITY);
      statistics.store(64 + thread, inside ? ptx::load(b.delta + place.lse_at(a, from + thread)) : 0.f);
    }
    if (a.threshold > 0)
#pragma unroll
      for (int i = thread; i < 256; i += kHalfThreads)
        mask.store(i, static_cast<uint16_t>(
                          kept_of_row(key, place.tile, from + i / 4, place.head, place.sequence, a.threshold)));
    ptx::wait_copies<1>();
    ptx::block_sync();
#pragma unroll 1
    for (int begin = 0; begin < 64; begin += kColumns) {
      float s[kColumnTiles][4], dp[kColumnTiles][4];
      rows_by_rows<T>(s, keys, own, queries(tile), begin);
      rows_by_rows<T>(dp, values, own, douts(tile), begin);
      uint32_t p_packed[kColumnTiles][2], ds_packed[kColumnTiles][2];
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        float p[4], ds[4];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int query = begin + 8 * n + 2 * t + e;
          const float lse = statistics.load(query), delta = statistics.load(64 + query);
          // Of keys own + g and own + g + 8: bits own / 4 + g % 2, and two further, of the thread g / 2 of a row.
          const uint32_t kept =
              a.threshold > 0 ? static_cast<uint32_t>(mask.load(4 * query + g / 2)) >> (own / 4 + g % 2) : 0xFFFF;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = 2 * half + e;
            const float factor = kept >> (2 * half) & 1 ? kept_scale : 0.f;
            const float probability = ptx::exp2(s[n][i] * scale - lse);
            p[i] = probability * factor;
            ds[i] = probability * (dp[n][i] * factor - delta);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          p_packed[n][half] = ptx::pack<T>(p[2 * half], p[2 * half + 1]);
          ds_packed[n][half] = ptx::pack<T>(ds[2 * half], ds[2 * half + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < kColumns / 16; ++i) {
        multiply<T>(dv, as_a_operand(p_packed, i).v,
                    [&](int n) { return douts(tile).b_operands_of_columns(begin + 16 * i, 8 * n); });
        multiply<T>(dk, as_a_operand(ds_packed, i).v,
                    [&](int n) { return queries(tile).b_operands_of_columns(begin + 16 * i, 8 * n); });
      }
    }
    ptx::block_sync();
  }
  ptx::wait_copies<0>();
  if (own >= rows) return;
  scale_all(dk, a.scale);
  keys.store(own, 0, dk);  // this warp's rows, read by no other
  values.store(own, 0, dv);
  ptx::warp_sync();
  keys.write_rows(own, b.a.dk, place.at(b.a.dk, first + own), rows - own);
  values.write_rows(own, b.a.dv, place.at(b.a.dv, first + own), rows - own);
}

// Up to 128 tokens: a block has all of a (sequence, head). Each warp first has 16 queries: scores, their gradients, dq;
// then, with both written to shared memory over keys and values, 16 keys: dk and dv.
template <typename T, int D>
struct OneTileMemory {
  using Rows = Tile<T, kQueries, D>;
  using Scores = Tile<T, kQueries, kQueries>;
  static constexpr int kKeysAndValues = 2 * Rows::kBytes > Scores::kBytes ? 2 * Rows::kBytes : Scores::kBytes;
  static constexpr int kBytes = 2 * Rows::kBytes + kKeysAndValues + Scores::kBytes;
};

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 2) attention_one_tile_backward_kernel(const __grid_constant__ Backward b) {
  using Memory = OneTileMemory<T, D>;
  using Rows = typename Memory::Rows;
  using Scores = typename Memory::Scores;
  const Attention& a = b.a.forward;
  const Place place(a, 1);
  const int rows = place.length;
  if (rows > kQueries) return;
  if (rows == 0) return;  // a padded tensor's zeros come from the other kernels
  const auto memory = ptx::shared_memory();
  const Rows queries(memory), douts(memory + Rows::kBytes), keys(memory + 2 * Rows::kBytes),
      values(memory + 3 * Rows::kBytes);
  const Scores probabilities(memory + 2 * Rows::kBytes), gradients(memory + 2 * Rows::kBytes + Memory::kKeysAndValues);
  keys.template copy_async<kThreads>(a.k, place.at(a.k, 0), rows);
  queries.template copy_async<kThreads>(a.q, place.at(a.q, 0), rows);
  ptx::commit_copies();
  values.template copy_async<kThreads>(a.v, place.at(a.v, 0), rows);
  douts.template copy_async<kThreads>(b.a.dout, place.at(b.a.dout, 0), rows);
  ptx::commit_copies();

  PhiloxKey key{};
  if (a.threshold > 0) key = dropout_key(a.rng, a.site);
  const float kept_scale = a.threshold > 0 ? dropout_scale(a.threshold) : 1.f;
  const int own = 16 * ptx::warp(), valid = rows - own, g = ptx::lane() / 4;
  float lse[2], delta[2] = {};
  row_lse(a, place, own, valid, lse);
  ptx::wait_copies<0>();
  ptx::block_sync();
  if (valid > 0) row_delta<T, D>(b, place, own, valid, douts, own, delta);

  constexpr int kFew = 16;  // columns at a time: the probabilities of all stay in registers until keys are done with
  uint32_t p[16][2];
  float dq[D / 8][4];
  clear(dq);
#pragma unroll
  for (int from = 0; from < kQueries; from += kFew) {
    uint32_t ds[kFew / 8][2] = {};
    if (valid > 0 && from < rows) {
      uint32_t kept[2] = {0xFFFF, 0xFFFF};
      if (a.threshold > 0)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          kept[half] = kept_of_row(key, from / 64, own + g + 8 * half, place.head, place.sequence, a.threshold) >>
                       (from % 64 / 4);
      float s[kFew / 8][4], dp[kFew / 8][4];
      rows_by_rows<T>(s, queries, own, keys, from);
      rows_by_rows<T>(dp, douts, own, values, from);
      score_gradients<T>(s, dp, a.scale * kLog2e, lse, delta, rows - from, kept[0], kept[1], kept_scale, p + from / 8,
                         ds);
#pragma unroll
      for (int i = 0; i < kFew / 16; ++i)
        multiply<T>(dq, as_a_operand(ds, i).v, [&](int n) { return keys.b_operands_of_columns(from + 16 * i, 8 * n); });
    } else {
#pragma unroll
      for (int n = from / 8; n < (from + kFew) / 8; ++n) p[n][0] = p[n][1] = 0;
    }
    gradients.store_packed(own, from, ds);
  }
  ptx::block_sync();  // keys and values are done with
  probabilities.store_packed(own, 0, p);
  ptx::block_sync();

  // The products over queries stop at the sequence's end, in steps of 16.
  float dk[D / 8][4], dv[D / 8][4];
  clear(dk), clear(dv);
  if (valid > 0)
    for (int from = 0; from < rows; from += 16) {
      multiply<T>(dv, probabilities.a_operand_transposed(from, own).v,
                  [&](int n) { return douts.b_operands_of_columns(from, 8 * n); });
      multiply<T>(dk, gradients.a_operand_transposed(from, own).v,
                  [&](int n) { return queries.b_operands_of_columns(from, 8 * n); });
    }
  ptx::block_sync();  // queries and douts are done with
  if (valid <= 0) return;
  scale_all(dq, a.scale), scale_all(dk, a.scale);
  queries.store(own, 0, dq);
  douts.store(own, 0, dk);
  ptx::warp_sync();
  const Place at_end(a, 1);  // found again: to keep it would cost the registers that everything above is short of
  queries.write_rows(own, b.a.dq, at_end.at(b.a.dq, own), valid);
  douts.write_rows(own, b.a.dk, at_end.at(b.a.dk, own), valid);
  ptx::warp_sync();
  queries.store(own, 0, dv);
  ptx::warp_sync();
  queries.write_rows(own, b.a.dv, at_end.at(b.a.dv, own), valid);
}

template <typename T, int D>
void backward(const Backward& b, void* stream) {
  const Attention& a = b.a.forward;
  const int64_t heads = a.heads * a.sequences;
  if constexpr (kOneTileRows<D> > 0)
    launch("attention", attention_one_tile_backward_kernel<T, D>, heads, kThreads, OneTileMemory<T, D>::kBytes, stream,
           b);
  if (kOneTileRows<D> > 0 && a.max_seqlen <= kOneTileRows<D> && a.packed) return;
  launch("attention", attention_dq_kernel<T, D>, (a.max_seqlen + 63) / 64 * heads, kHalfThreads, DqMemory<T, D>::kBytes,
         stream, b);
  launch("attention", attention_dkv_kernel<T, D>, (a.max_seqlen + 63) / 64 * heads, kHalfThreads,
         DkvMemory<T, D>::kBytes, stream, b);
}

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

}  // namespace

void attention_forward(const Attention& a, int device, void* stream) {
  const OnDevice on_device("attention", device);
  with_kernel(a, [&](auto element, auto head_dim) { forward<decltype(element), head_dim.value>(a, stream); });
}

void attention_backward(const AttentionBackward& a, float* delta, int device, void* stream) {
  const OnDevice on_device("attention", device);
  with_kernel(a.forward,
              [&](auto element, auto head_dim) { backward<decltype(element), head_dim.value>({a, delta}, stream); });
}

}  // namespace cuda
}  // namespace stackbert
