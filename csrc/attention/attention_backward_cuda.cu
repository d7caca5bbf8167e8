#include "attention/attention.h"
#include "attention/backward.cuh"
#include "common/launch.cuh"

namespace stackbert {
namespace cuda {
namespace {

// Scores are worked on 32 columns at a time: two products' accumulators and the sums fit 128 registers then.
constexpr int kColumns = 32, kColumnTiles = kColumns / 8;

constexpr int kThreads = 128;  // 64 rows of a block

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
__global__ void __launch_bounds__(kThreads, blocks_at_once(D <= 64 ? 3 : 2, DqMemory<T, D>::kBytes))
    attention_dq_kernel(const __grid_constant__ Backward b) {
  using Memory = DqMemory<T, D>;
  static_assert(Memory::kBytes <= kSharedOfEveryBlock, "runs everywhere");
  const Attention& a = b.a.forward;
  const Place place(a, static_cast<int>((a.max_seqlen + 63) / 64));
  const int first = 64 * place.tile, rows = place.length - first;
  if (!a.packed) zero_rows<T, D>(b, place, b.a.dq, first, 64, kThreads);
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
      keys(tile).template copy_async<kThreads>(a.k, place.at(a.k, from), count);
      values(tile).template copy_async<kThreads>(a.v, place.at(a.v, from), count);
    }
    ptx::commit_copies();
  };
  queries.template copy_async<kThreads>(a.q, place.at(a.q, first), min(rows, 64));
  douts.template copy_async<kThreads>(b.a.dout, place.at(b.a.dout, first), min(rows, 64));
  fetch(0);

  PhiloxKey key{};
  if (a.threshold > 0) key = dropout_key(a.rng, a.site);
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
                           kept[1] >> (from / 4), nullptr, ds);
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
  scale_all(dq, a.scale * kept_scale(a));
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
__global__ void __launch_bounds__(kThreads, blocks_at_once(D <= 64 ? 3 : 2, DkvMemory<T, D>::kBytes))
    attention_dkv_kernel(const __grid_constant__ Backward b) {
  using Memory = DkvMemory<T, D>;
  static_assert(Memory::kBytes <= kSharedOfEveryBlock, "runs everywhere");
  const Attention& a = b.a.forward;
  const Place place(a, static_cast<int>((a.max_seqlen + 63) / 64));
  const int first = 64 * place.tile, rows = place.length - first;
  if (!a.packed) {
    zero_rows<T, D>(b, place, b.a.dk, first, 64, kThreads);
    zero_rows<T, D>(b, place, b.a.dv, first, 64, kThreads);
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
      queries(tile).template copy_async<kThreads>(a.q, place.at(a.q, from), count);
      douts(tile).template copy_async<kThreads>(b.a.dout, place.at(b.a.dout, from), count);
    }
    ptx::commit_copies();
  };
  keys.template copy_async<kThreads>(a.k, place.at(a.k, first), min(rows, 64));
  values.template copy_async<kThreads>(a.v, place.at(a.v, first), min(rows, 64));
  fetch(0);

  PhiloxKey key{};
  if (a.threshold > 0) key = dropout_key(a.rng, a.site);
  const float scale = a.scale * kLog2e;
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
      for (int i = thread; i < 256; i += kThreads)
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
            const bool own_kept = kept >> (2 * half) & 1;
            const float probability = ptx::exp2(s[n][i] * scale - lse);
            p[i] = own_kept ? probability : 0.f;
            ds[i] = probability * ((own_kept ? dp[n][i] : 0.f) - delta);
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
  scale_all(dk, a.scale * kept_scale(a)), scale_all(dv, kept_scale(a));
  keys.store(own, 0, dk);  // this warp's rows, read by no other
  values.store(own, 0, dv);
  ptx::warp_sync();
  keys.write_rows(own, b.a.dk, place.at(b.a.dk, first + own), rows - own);
  values.write_rows(own, b.a.dv, place.at(b.a.dv, first + own), rows - own);
}

template <typename T, int D>
void backward(const Backward& b, void* stream) {
  const Attention& a = b.a.forward;
  const int64_t heads = a.heads * a.sequences;
  if (kOneTileRows<D> > 0) attention_one_tile_backward(b, stream);
  if (a.packed && a.max_seqlen <= kOneTileRows<D>) return;
  launch("attention", attention_dq_kernel<T, D>, (a.max_seqlen + 63) / 64 * heads, kThreads, DqMemory<T, D>::kBytes,
         stream, b);
  launch("attention", attention_dkv_kernel<T, D>, (a.max_seqlen + 63) / 64 * heads, kThreads, DkvMemory<T, D>::kBytes,
         stream, b);
}

}  // namespace

void attention_backward(const AttentionBackward& a, float* delta, int device, void* stream) {
  const OnDevice on_device("attention", device);
  with_kernel(a.forward,
              [&](auto element, auto head_dim) { backward<decltype(element), head_dim.value>({a, delta}, stream); });
}

}  // namespace cuda
}  // namespace stackbert
