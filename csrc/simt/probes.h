// Small kernels that show what each primitive does, and what the twin must stop: python_tests/simt/test_twin.py holds
// the first against the layout figures of the PTX ISA.
#pragma once

#include <string>

#include "common/launch.cuh"

namespace stackbert {
namespace simt {

struct Probe {
  const uint32_t* in;  // a word or more a lane
  uint32_t* out;
  int variant;
};

using ptx::Words4;

// One warp. in: [32, 4] words; out: [32, 4] words, of which a primitive may leave some as they are.
inline void probe_load_matrices(const Probe a) {
  const auto shared = ptx::shared_memory();
  shared.as<Words4>().store(ptx::lane(), ptx::load(reinterpret_cast<const Words4*>(a.in) + ptx::lane()));
  ptx::warp_sync();
  const Words4 r = a.variant ? ptx::load_matrices_transposed(shared + 16 * ptx::lane())
                             : ptx::load_matrices(shared + 16 * ptx::lane());
  ptx::store(reinterpret_cast<Words4*>(a.out) + ptx::lane(), r);
}

inline void probe_transpose_matrix(const Probe a) {
  ptx::store(a.out + 4 * ptx::lane(), ptx::transpose_matrix(ptx::load(a.in + 4 * ptx::lane())));
}

// in: a warp's fragments, [32] of a[4], then b[2] and two words unused, then c[4]
template <typename T>
void probe_multiply_add(const Probe a) {
  const Words4* in = reinterpret_cast<const Words4*>(a.in);
  const Words4 x = ptx::load(in + ptx::lane()), y = ptx::load(in + 32 + ptx::lane());
  const auto start = ptx::load(reinterpret_cast<const ptx::Vec<float, 4>*>(in + 64) + ptx::lane());
  ptx::Vec<float, 4> c = start;
  ptx::multiply_add<T>(c.v, x.v, y.v[0], y.v[1]);
  ptx::store(reinterpret_cast<ptx::Vec<float, 4>*>(a.out) + ptx::lane(), c);
}

inline void probe_shuffle(const Probe a) {
  const uint32_t value = ptx::load(a.in + 4 * ptx::lane());
  const Words4 r{{ptx::shuffle(value, a.variant), ptx::shuffle_xor(value, a.variant), ptx::ballot(value & 1),
                  ptx::any(value & 1) ? 1u : 0u}};
  ptx::store(reinterpret_cast<Words4*>(a.out) + ptx::lane(), r);
}

template <typename T>
void probe_pack(const Probe a) {
  const auto in = ptx::load(reinterpret_cast<const ptx::Vec<float, 4>*>(a.in) + ptx::lane());
  const uint32_t packed = ptx::pack<T>(in.v[0], in.v[1]);
  const ptx::Pair back = ptx::unpack<T>(packed);
  const Words4 r{{packed, ptx::bits_as<uint32_t>(back.low), ptx::bits_as<uint32_t>(back.high), 0}};
  ptx::store(reinterpret_cast<Words4*>(a.out) + ptx::lane(), r);
}

// One number a lane.
inline void probe_functions(const Probe a) {
  const float x = ptx::load(reinterpret_cast<const float*>(a.in) + ptx::lane());
  const ptx::Vec<float, 4> r{{ptx::exp2(x), ptx::log2(x), ptx::reciprocal(x), ptx::reciprocal_sqrt(x)}};
  ptx::store(reinterpret_cast<ptx::Vec<float, 4>*>(a.out) + ptx::lane(), r);
}

// in: [32] of two floats and a double; out: their square roots
inline void probe_square_root(const Probe a) {
  const Words4 in = ptx::load(reinterpret_cast<const Words4*>(a.in) + ptx::lane());
  const ptx::Vec<uint32_t, 2> high{{in.v[2], in.v[3]}};
  const auto root = ptx::bits_as<ptx::Vec<uint32_t, 2>>(ptx::square_root(ptx::bits_as<double>(high)));
  const Words4 r{{ptx::bits_as<uint32_t>(ptx::square_root(ptx::bits_as<float>(in.v[0]))),
                  ptx::bits_as<uint32_t>(ptx::square_root(ptx::bits_as<float>(in.v[1]))), root.v[0], root.v[1]}};
  ptx::store(reinterpret_cast<Words4*>(a.out) + ptx::lane(), r);
}

// Two warps that pass words on to each other through shared memory, right (variant 0) and in every wrong way.
enum Fault {
  kNone,
  kNoBarrier,       // reads what the other warp writes
  kNoBarrierReuse,  // the second round overwrites what the other warp may still read
  kNoWait,          // reads an asynchronous copy before its wait
  kWaitTooFew,      // waits for the older of two groups, reads the newer
  kNoBarrierAfterWait,
  kUnwritten,
  kPastShared,
  kPastGlobal,
  kWritesInput,
  kMisaligned,
  kHalfAWarp,    // at a collective
  kHalfABlock,   // at a barrier
  kTwoBarriers,  // a warp's halves at different ones
  kLeavesEarly,
  kSameAddress,  // two blocks write it
  kNoWarpSync,
  kPendingCopies,
};

inline void probe_fault(const Probe a) {
  const auto words = ptx::shared_memory().as<uint32_t>();
  const int t = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const auto is = [&](Fault fault) { return a.variant == fault; };
  if (is(kLeavesEarly) && t == 40) return;
  for (int round = 0; round < 2; ++round) {
    const uint32_t* from = a.in + 128 * block + 64 * round;
    if (is(kNoBarrierReuse) ? round == 0 : true) words.store(t, ptx::load(from + t));
    if (is(kNoBarrierReuse) && round == 1) words.store(t, 1);
    if (!is(kNoBarrier)) {
      if (is(kHalfABlock) && t >= 32)
        ptx::named_sync(1, 64);
      else if (is(kTwoBarriers) && t % 32 >= 16)
        ptx::named_sync(2, 64);
      else
        ptx::block_sync();
    }
    const uint32_t other = words.load(63 - t);
    if (!is(kSameAddress)) ptx::store(a.out + 128 * block + 64 * round + t, other);
    if (!is(kNoBarrierReuse)) ptx::block_sync();
  }
  if (is(kSameAddress)) ptx::store(a.out + t, static_cast<uint32_t>(block));

  // 16 bytes a thread of the first warp, in two groups.
  const auto bytes = ptx::shared_memory() + 512;
  if (t < 32) {
    ptx::copy_async_16(bytes + 16 * t, a.in + 4 * t, t < 24);
    ptx::commit_copies();
    ptx::copy_async_16(bytes + 512 + 16 * t, a.in + 4 * t, true);
    ptx::commit_copies();
  }
  if (is(kPendingCopies)) return;
  if (is(kWaitTooFew))
    ptx::wait_copies<1>();
  else if (!is(kNoWait))
    ptx::wait_copies<0>();
  if (!is(kNoBarrierAfterWait)) ptx::block_sync();
  const uint32_t first = bytes.as<uint32_t>().load(2 * t), second = bytes.as<uint32_t>().load(128 + 2 * t);
  ptx::store(a.out + 256 + 128 * block + 2 * t, first);
  ptx::store(a.out + 256 + 128 * block + 2 * t + 1, second);

  const auto last = (ptx::shared_memory() + 1536).as<uint32_t>();
  if (is(kUnwritten)) ptx::store(a.out, last.load(t));
  if (is(kPastShared)) last.store(t + 64, 0);
  if (is(kPastGlobal)) ptx::load(a.in + 256 + t);
  if (is(kWritesInput)) ptx::store(const_cast<uint32_t*>(a.in), 0u);
  if (is(kMisaligned)) ptx::load(reinterpret_cast<const Words4*>(a.in + 1));
  if (is(kHalfAWarp) && t % 32 < 16) ptx::shuffle(first, 0);
  last.store(t, first);
  if (!is(kNoWarpSync)) ptx::warp_sync();
  const uint32_t neighbour = last.load(t ^ 1);
  ptx::store(a.out + 512 + 64 * block + t, neighbour);
}

inline void probe(const std::string& name, const uint32_t* in, uint32_t* out, int variant) {
  const Probe a{in, out, variant};
  const auto run = [&](void (*kernel)(const Probe), int blocks, int threads) {
    cuda::launch(name.c_str(), kernel, blocks, threads, 2048 - 256, nullptr, a);
  };
  if (name == "load_matrices") return run(probe_load_matrices, 1, 32);
  if (name == "transpose_matrix") return run(probe_transpose_matrix, 1, 32);
  if (name == "multiply_add_bfloat16") return run(probe_multiply_add<bfloat16>, 1, 32);
  if (name == "multiply_add_float16") return run(probe_multiply_add<float16>, 1, 32);
  if (name == "shuffle") return run(probe_shuffle, 1, 32);
  if (name == "pack_bfloat16") return run(probe_pack<bfloat16>, 1, 32);
  if (name == "pack_float16") return run(probe_pack<float16>, 1, 32);
  if (name == "functions") return run(probe_functions, 1, 32);
  if (name == "square_root") return run(probe_square_root, 1, 32);
  if (name == "fault") return run(probe_fault, 2, 64);
  throw std::invalid_argument("probe: no such probe: " + name);
}

}  // namespace simt
}  // namespace stackbert
