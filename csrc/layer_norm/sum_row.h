// One row of z = residual + dropout(x + x_bias), in fp32, in cache.
#pragma once

#include "common/dropout_mask.h"
#include "layer_norm/layer_norm.h"

namespace stackbert {
namespace STACKBERT_ISA {

struct Mask {
  PhiloxKey key;
  int threshold;
  float scale;
};

inline Mask mask_of(const int64_t* rng, uint32_t site, int threshold) {
  return threshold ? Mask{dropout_key(rng, site), threshold, dropout_scale(threshold)} : Mask{};
}

// The random bytes of a row; `bytes` has room for whole calls of row_bytes.
inline void mask_row(const Mask& mask, int64_t row, int64_t columns, uint8_t* bytes) {
  for (int64_t c = 0; c < columns; c += kRowBytes) row_bytes(mask.key, row, c, bytes + c);
}

inline Floats keep(Floats x, const uint8_t* bytes, const Mask& mask) {
  return keep(x, bytes, mask.threshold, mask.scale);
}

// A chunk's part of the workspace.
struct ChunkSpace {
  float* extra;  // [extra, padded(C)]
  float* z;      // [C]
  uint8_t* bytes;
};

inline ChunkSpace chunk_space(float* workspace, int64_t chunk, int64_t columns, int64_t extra) {
  float* const begin = workspace + chunk * chunk_workspace(columns, extra);
  float* const z = begin + extra * padded(columns);
  return {begin, z, reinterpret_cast<uint8_t*>(z + padded(columns))};
}

template <typename T>
struct RowOf {
  const T *x, *residual;  // [C]; residual is x where there is none
};

template <typename T>
inline RowOf<T> row_of(const SumInputs& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.columns;
  return {x, a.residual ? static_cast<const T*>(a.residual) + row * a.columns : x};
}

template <typename T>
struct SumRow {
  // z[c] of row `row` for all columns; returns their sum lane by lane. Fills `bytes` if there is dropout.
  using Function = Floats (*)(const SumInputs& a, const Mask& mask, int64_t row, float* z, uint8_t* bytes);

  template <bool kResidual, bool kBias, bool kDropout>
  static Floats run(const SumInputs& a, const Mask& mask, int64_t row, float* z, uint8_t* bytes) {
    const RowOf<T> here = row_of<T>(a, row);
    if (kDropout) mask_row(mask, row, a.columns, bytes);
    Floats total = {};
    for_vectors(0, a.columns, [&](int64_t c, auto part) {
      Floats v = load(here.x + c, part);
      if (kBias) v += load(a.x_bias + c, part);
      if (kDropout) v = keep(v, bytes + c, mask);
      if (kResidual) v += load(here.residual + c, part);
      total += v;
      store(z + c, v, part);
    });
    return total;
  }

  static Function choose(const SumInputs& a) {
    if (!a.residual) return run<false, false, false>;
    if (a.x_bias) return a.threshold ? run<true, true, true> : run<true, true, false>;
    return a.threshold ? run<true, false, true> : run<true, false, false>;
  }
};

}  // namespace STACKBERT_ISA
}  // namespace stackbert
