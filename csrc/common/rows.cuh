// What kernels over rows of [R, C] tensors share: vectors of elements as floats, sums over a warp or several, and the
// dropout decisions of a vector.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "common/dtype.h"
#include "common/philox.h"
#include "common/ptx.cuh"

namespace stackbert {
namespace cuda {

// Elements in 16 bytes.
template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

// kWidth consecutive elements: as many as 16 bytes hold, or one.
template <typename T, int kWidth>
struct Elements {
  static_assert(kWidth == 1 || kWidth == kWide<T>, "one access");
  ptx::Vec<T, kWidth> raw;

  STACKBERT_DEVICE void to_floats(float* out) const {
    if constexpr (std::is_same<T, float>::value) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out[i] = raw.v[i];
    } else if constexpr (kWidth == 1) {
      out[0] = ptx::unpack<T>(raw.v[0].bits).low;
    } else {
      const ptx::Words4 words = ptx::bits_as<ptx::Words4>(raw);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const ptx::Pair pair = ptx::unpack<T>(words.v[i]);
        out[2 * i] = pair.low, out[2 * i + 1] = pair.high;
      }
    }
  }
  static STACKBERT_DEVICE Elements from_floats(const float* in) {
    Elements e;
    if constexpr (std::is_same<T, float>::value) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) e.raw.v[i] = in[i];
    } else if constexpr (kWidth == 1) {
      e.raw.v[0].bits = static_cast<uint16_t>(ptx::pack<T>(in[0], 0.f));
    } else {
      ptx::Words4 words;
#pragma unroll
      for (int i = 0; i < 4; ++i) words.v[i] = ptx::pack<T>(in[2 * i], in[2 * i + 1]);
      e.raw = ptx::bits_as<ptx::Vec<T, kWidth>>(words);
    }
    return e;
  }
  static STACKBERT_DEVICE Elements load(const T* p) {
    return {ptx::load(reinterpret_cast<const ptx::Vec<T, kWidth>*>(p))};
  }
  STACKBERT_DEVICE void store(T* p) const { ptx::store(reinterpret_cast<ptx::Vec<T, kWidth>*>(p), raw); }
};

// fp32 parameters of a row's columns, as many as the elements of a vector.
template <int kWidth>
STACKBERT_DEVICE void load_parameters(const float* p, float* out) {
  if constexpr (kWidth == 1) {
    out[0] = ptx::load(p);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) Elements<float, 4>::load(p + i).to_floats(out + i);
  }
}

template <int kWidth>
STACKBERT_DEVICE void store_parameters(float* p, const float* in) {
  if constexpr (kWidth == 1) {
    ptx::store(p, in[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) Elements<float, 4>::from_floats(in + i).store(p + i);
  }
}

// Which of kWidth elements of a row are kept, a bit each, from `column` on, which is a multiple of kWidth.
template <int kWidth>
STACKBERT_DEVICE uint32_t row_dropout(PhiloxKey key, int64_t token, int column, int threshold) {
  const uint64_t row = static_cast<uint64_t>(token);
  const PhiloxWords words =
      philox(key, static_cast<uint32_t>(column / 16), static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0);
  const int first = column % 16;
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    uint32_t word;
    if constexpr (kWidth == 8)
      word = first ? words.w[2 + i / 4] : words.w[i / 4];
    else
      word = first / 4 == 0 ? words.w[0] : first / 4 == 1 ? words.w[1] : first / 4 == 2 ? words.w[2] : words.w[3];
    const int byte = static_cast<int>(word >> (8 * ((kWidth == 1 ? first : i) % 4)) & 255);
    kept |= (byte >= threshold ? 1u : 0u) << i;
  }
  return kept;
}

// x = dropout(x), kWidth elements of a row. Returns which are kept.
template <int kWidth>
STACKBERT_DEVICE uint32_t drop(PhiloxKey key, int64_t token, int column, int threshold, float scale, float* x) {
  const uint32_t kept = row_dropout<kWidth>(key, token, column, threshold);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = kept >> i & 1 ? x[i] * scale : 0.f;
  return kept;
}

STACKBERT_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += ptx::shuffle_xor(x, lanes);
  return x;
}

// Over all kWarps warps of a block, in the same order in each of them. Two calls in a row need two places: a barrier of
// the block has to come between one call's reads of `scratch` and the next one's writes to it.
template <int kWarps>
STACKBERT_DEVICE float block_sum(float x, ptx::Shared<float> scratch) {
  x = warp_sum(x);
  if constexpr (kWarps > 1) {
    if (ptx::lane() == 0) scratch.store(ptx::warp(), x);
    ptx::block_sync();
    x = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x += scratch.load(w);
  }
  return x;
}

// Calls `run` with the element type that `dtype` names.
template <typename Run>
void with_dtype(DType dtype, const Run& run) {
  if (dtype == DType::kFloat32)
    run(float{});
  else if (dtype == DType::kBFloat16)
    run(bfloat16{});
  else
    run(float16{});
}

inline bool aligned_16(std::initializer_list<const void*> addresses) {
  uintptr_t bits = 0;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return bits % 16 == 0;
}

}  // namespace cuda
}  // namespace stackbert
