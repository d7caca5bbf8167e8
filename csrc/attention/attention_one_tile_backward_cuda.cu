#include "attention/attention.h"
#include "attention/backward.cuh"
#include "common/launch.cuh"

// Up to 128 tokens: a block has all of a (sequence, head). Each warp first has 16 queries: scores, their gradients, dq;
// then, with both written to shared memory over keys and values, 16 keys: dk and dv.

namespace stackbert {
namespace cuda {
namespace {

constexpr int kRows = 128;  // of a block: eight warps of 16
constexpr int kThreads = 256;

template <typename T, int D>
struct OneTileMemory {
  using Rows = Tile<T, kRows, D>;
  using Scores = Tile<T, kRows, kRows>;
  static constexpr int kKeysAndValues = 2 * Rows::kBytes > Scores::kBytes ? 2 * Rows::kBytes : Scores::kBytes;
  static constexpr int kBytes = 2 * Rows::kBytes + kKeysAndValues + Scores::kBytes;
};

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, blocks_at_once(2, OneTileMemory<T, D>::kBytes))
    attention_one_tile_backward_kernel(const __grid_constant__ Backward b) {
  using Memory = OneTileMemory<T, D>;
  static_assert(Memory::kBytes <= kSharedOfEveryBlock, "runs everywhere");
  using Rows = typename Memory::Rows;
  using Scores = typename Memory::Scores;
  const Attention& a = b.a.forward;
  const Place place(a, 1);
  const int rows = place.length;
  if (rows > kRows) return;
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
  for (int from = 0; from < kRows; from += kFew) {
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
      score_gradients<T>(s, dp, a.scale * kLog2e, lse, delta, rows - from, kept[0], kept[1], p + from / 8, ds);
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
  const float of_kept = kept_scale(a);
  scale_all(dq, a.scale * of_kept), scale_all(dk, a.scale * of_kept), scale_all(dv, of_kept);
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

}  // namespace

void attention_one_tile_backward(const Backward& b, void* stream) {
  with_kernel(b.a.forward, [&](auto element, auto head_dim) {
    using T = decltype(element);
    constexpr int D = decltype(head_dim)::value;
    if constexpr (kOneTileRows<D> > 0)
      launch("attention", attention_one_tile_backward_kernel<T, D>, b.a.forward.heads * b.a.forward.sequences, kThreads,
             OneTileMemory<T, D>::kBytes, stream, b);
  });
}

}  // namespace cuda
}  // namespace stackbert
