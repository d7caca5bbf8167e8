#include "layer_norm/layer_norm.h"
#include "layer_norm/sum_row.h"

namespace stackbert {
namespace STACKBERT_ISA {
namespace {

template <typename T>
void forward(const LayerNormFwd& a) {
  const int64_t columns = a.sum.columns;
  const Mask mask = mask_of(a.sum.rng, a.sum.site, a.sum.threshold);
  const auto sum_row = SumRow<T>::choose(a.sum);
  const float share = 1.f / static_cast<float>(columns);
  parallel_row_chunks(a.threads, a.sum.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    const ChunkSpace space = chunk_space(a.workspace, chunk, columns, 0);
    for (int64_t row = begin; row < end; ++row) {
      const float near_mean = sum(sum_row(a.sum, mask, row, space.z, space.bytes)) * share;

      // Second pass: E[(z - m)^2] keeps its digits when |m| >> std, E[z^2] - m^2 does not. The sum of z - m is what
      // rounding left out of m.
      Floats rest = {}, square = {};
      for_vectors(0, columns, [&](int64_t c, auto part) {
        const Floats centred = first(load(space.z + c, part) - near_mean, part);
        rest += centred;
        square += centred * centred;
      });
      const float correction = sum(rest) * share, mean = near_mean + correction;
      const float variance = sum(square) * share - correction * correction;
      const float rstd = 1.f / __builtin_sqrtf((variance < 0.f ? 0.f : variance) + a.eps);

      T* y = static_cast<T*>(a.y) + row * columns;
      for_vectors(0, columns, [&](int64_t c, auto part) {
        const Floats normed = (load(space.z + c, part) - mean) * rstd;
        store(y + c, normed * load(a.weight + c, part) + load(a.bias + c, part), part);
      });
      if (a.mean) a.mean[row] = mean, a.rstd[row] = rstd;
    }
  });
}

template <typename T>
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

      const T* dy = static_cast<const T*>(a.dy) + row * columns;
      const float mean = a.mean[row], rstd = a.rstd[row];
      Floats sum_g = {}, sum_g_normed = {};
      for_vectors(0, columns, [&](int64_t c, auto part) {
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
      T* dresidual = static_cast<T*>(a.dresidual) + row * columns;
      T* dx = static_cast<T*>(a.dx) + row * columns;
      for_vectors(0, columns, [&](int64_t c, auto part) {
        const Floats dz = (load(g_row + c, part) - mean_g - load(space.z + c, part) * mean_g_normed) * rstd;
        store(dresidual + c, dz, part);
        const Floats dh = a.sum.threshold ? keep(dz, space.bytes + c, mask) : dz;
        if (a.dx) store(dx + c, dh, part);
        if (a.dx_bias) store(dx_bias + c, load(dx_bias + c, part) + dh, part);
      });
    }
  });
  add_partial_sums(a.threads, a.workspace, stride, chunks, columns, a.dweight);
  add_partial_sums(a.threads, a.workspace + padded(columns), stride, chunks, columns, a.dbias);
  if (a.dx_bias) add_partial_sums(a.threads, a.workspace + 2 * padded(columns), stride, chunks, columns, a.dx_bias);
}

}  // namespace

void layer_norm_fwd(const LayerNormFwd& a) {
  if (a.sum.dtype == DType::kFloat32)
    forward<float>(a);
  else
    forward<bfloat16>(a);
}

void layer_norm_bwd(const LayerNormBwd& a) {
  if (a.sum.dtype == DType::kFloat32)
    backward<float>(a);
  else
    backward<bfloat16>(a);
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
