#include "layer_norm/layer_norm.h"
#include "layer_norm/statistics.h"
#include "layer_norm/sum_row.h"

namespace stackbert {
namespace STACKBERT_ISA {
namespace {

// Results from here on are streamed. Measured with 2 MB of second-level cache a core: from 6 MB on it is faster, and
// what reads the result next is not slower.
constexpr int64_t kStreamFrom = 8 << 20;

bool streams(const SumInputs& a, const void* result, const void* other) {
  const int64_t row_bytes = a.columns * size_of(a.dtype);
  const uintptr_t all = row_bytes | reinterpret_cast<uintptr_t>(result) | reinterpret_cast<uintptr_t>(other);
  return a.rows * row_bytes >= kStreamFrom && all % 64 == 0;
}

// A place in a row of a result: asked for early where it will be written through the caches, and written.
template <bool kStream, typename T, typename Part>
inline void put(T* p, Floats v, Part part) {
  if (kStream)
    stream(p, v, part);
  else
    store(p, v, part);
}
template <bool kStream>
inline void expect(const void* p) {
  if (!kStream) prefetch(p);
}

template <typename T, bool kStream>
void forward(const LayerNormFwd& a) {
  const int64_t columns = a.sum.columns;
  const Mask mask = mask_of(a.sum.rng, a.sum.site, a.sum.threshold);
  const auto sum_row = SumRow<T>::choose(a.sum);
  parallel_row_chunks(a.threads, a.sum.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    const ChunkSpace space = chunk_space(a.workspace, chunk, columns, 0);
    for (int64_t row = begin; row < end; ++row) {
      const Floats total = sum_row(a.sum, mask, row, space.z, space.bytes);
      const RowOf<T> next = row_of<T>(a.sum, row + 1);
      T* y = static_cast<T*>(a.y) + row * columns;
      const Statistics s = statistics(space.z, columns, total, a.eps, [&](int64_t c) {
        prefetch(next.x + c);
        expect<kStream>(y + c);
      });
      for_vectors(0, columns, [&](int64_t c, auto part) {
        prefetch(next.residual + c);
        const Floats normed = (load(space.z + c, part) - s.mean) * s.rstd;
        put<kStream>(y + c, normed * load(a.weight + c, part) + load(a.bias + c, part), part);
      });
      if (a.mean) a.mean[row] = s.mean, a.rstd[row] = s.rstd;
    }
    if (kStream) streamed();
  });
}

template <typename T, bool kStream>
void backward(const LayerNormBwd& a) {
  const int64_t columns = a.sum.columns, stride = chunk_workspace(columns, 4), chunks = row_chunks(a.sum.rows).count;
  const Mask mask = mask_of(a.sum.rng, a.sum.site, a.sum.threshold);
  const auto sum_row = SumRow<T>::choose(a.sum);
  const float share = 1.f / static_cast<float>(columns);
  parallel_row_chunks(a.threads, a.sum.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    const ChunkSpace space = chunk_space(a.workspace, chunk, columns, 4);
    float* const dweight = space.extra;
    float* const dbias = dweight + padded(columns);
    float* const dx_bias = dbias + padded(columns);
    float* const g_row = dx_bias + padded(columns);
    std::memset(space.extra, 0, 3 * padded(columns) * sizeof(float));
    for (int64_t row = begin; row < end; ++row) {
      sum_row(a.sum, mask, row, space.z, space.bytes);

      const RowOf<T> next = row_of<T>(a.sum, row + 1);
      const T* dy = static_cast<const T*>(a.dy) + row * columns;
      T* dresidual = static_cast<T*>(a.dresidual) + row * columns;
      T* dx = a.dx ? static_cast<T*>(a.dx) + row * columns : dresidual;
      const float mean = a.mean[row], rstd = a.rstd[row];
      Floats sum_g = {}, sum_g_normed = {};
      for_vectors(0, columns, [&](int64_t c, auto part) {
        prefetch(next.x + c), prefetch(next.residual + c);
        expect<kStream>(dresidual + c), expect<kStream>(dx + c);
        const Floats up = load(dy + c, part), normed = (load(space.z + c, part) - mean) * rstd;
        const Floats g = up * load(a.weight + c, part);  // zero past the end, as both factors are
        sum_g += g;
        sum_g_normed += g * normed;
        store(dweight + c, load(dweight + c, part) + up * normed, part);
        store(dbias + c, load(dbias + c, part) + up, part);
        store(space.z + c, normed, part);
        store(g_row + c, g, part);
      });

      const float mean_g = sum(sum_g) * share, mean_g_normed = sum(sum_g_normed) * share;
      for_vectors(0, columns, [&](int64_t c, auto part) {
        prefetch(dy + columns + c);
        const Floats dz = (load(g_row + c, part) - mean_g - load(space.z + c, part) * mean_g_normed) * rstd;
        put<kStream>(dresidual + c, dz, part);
        const Floats dh = a.sum.threshold ? keep(dz, space.bytes + c, mask) : dz;
        if (a.dx) put<kStream>(dx + c, dh, part);
        if (a.dx_bias) store(dx_bias + c, load(dx_bias + c, part) + dh, part);
      });
    }
    if (kStream) streamed();
  });
  add_partial_sums(a.threads, a.workspace, stride, chunks, columns, a.dweight);
  add_partial_sums(a.threads, a.workspace + padded(columns), stride, chunks, columns, a.dbias);
  if (a.dx_bias) add_partial_sums(a.threads, a.workspace + 2 * padded(columns), stride, chunks, columns, a.dx_bias);
}

template <typename T>
void forward(const LayerNormFwd& a) {
  streams(a.sum, a.y, a.y) ? forward<T, true>(a) : forward<T, false>(a);
}

template <typename T>
void backward(const LayerNormBwd& a) {
  streams(a.sum, a.dx, a.dresidual) ? backward<T, true>(a) : backward<T, false>(a);
}

}  // namespace

void layer_norm_fwd(const LayerNormFwd& a) {
  a.sum.dtype == DType::kFloat32 ? forward<float>(a) : forward<bfloat16>(a);
}

void layer_norm_bwd(const LayerNormBwd& a) {
  a.sum.dtype == DType::kFloat32 ? backward<float>(a) : backward<bfloat16>(a);
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
