#include "attention/attention.h"
#include "attention/tiles.cuh"
#include "common/launch.cuh"

// A block has 128 queries. Up to 128 keys there is one tile of keys and the softmax is exact at once; beyond, tiles of
// 64 keys with the running maximum, the next tile under way while one is worked on. tiles.cuh says how a tile lies.

namespace stackbert {
namespace cuda {
namespace {

constexpr int kQueries = 128;  // of a block: eight warps of 16
constexpr int kThreads = 256;

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
  static_assert(Memory::kBytes <= kSharedOfEveryBlock, "runs everywhere");
  const int tiles = static_cast<int>((a.max_seqlen + kQueries - 1) / kQueries);
  const Place place(a, tiles);
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

  // Found again where the scores of 128 keys leave no registers to keep it in.
  const Place at_end = kKeys > 64 ? Place(a, tiles) : place;
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
      ptx::store(a.lse + at_end.lse_at(a, first + row), row < rows ? (maximum[half] + ptx::log2(total)) * kLn2 : 0.f);
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
  queries.write_rows(own, a.out, at_end.at(a.out, first + own), valid);
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

}  // namespace

void attention_forward(const Attention& a, int device, void* stream) {
  const OnDevice on_device("attention", device);
  with_kernel(a, [&](auto element, auto head_dim) { forward<decltype(element), head_dim.value>(a, stream); });
}

}  // namespace cuda
}  // namespace stackbert
