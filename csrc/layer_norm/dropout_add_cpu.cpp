#include "layer_norm/layer_norm.h"
#include "layer_norm/sum_row.h"

namespace stackbert {
namespace STACKBERT_ISA {
namespace {

template <typename T>
void forward(const DropoutAddFwd& a) {
  const int64_t columns = a.sum.columns;
  const Mask mask = mask_of(a.sum.rng, a.sum.site, a.sum.threshold);
  const auto sum_row = SumRow<T>::choose(a.sum);
  parallel_row_chunks(a.threads, a.sum.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    const ChunkSpace space = chunk_space(a.workspace, chunk, columns, 0);
    for (int64_t row = begin; row < end; ++row) {
      sum_row(a.sum, mask, row, space.z, space.bytes);
      T* y = static_cast<T*>(a.y) + row * columns;
      for_vectors(0, columns, [&](int64_t c, auto part) { store(y + c, load(space.z + c, part), part); });
    }
  });
}

template <typename T>
void backward(const DropoutAddBwd& a) {
  const int64_t columns = a.columns;
  const Mask mask = mask_of(a.rng, a.site, a.threshold);
  parallel_row_chunks(a.threads, a.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    const ChunkSpace space = chunk_space(a.workspace, chunk, columns, 1);
    float* const dx_bias = space.extra;
    std::memset(dx_bias, 0, padded(columns) * sizeof(float));
    for (int64_t row = begin; row < end; ++row) {
      if (a.threshold) mask_row(mask, row, columns, space.bytes);
      const T* dy = static_cast<const T*>(a.dy) + row * columns;
      T* dx = static_cast<T*>(a.dx) + row * columns;
      for_vectors(0, columns, [&](int64_t c, auto part) {
        const Floats down = load(dy + c, part), dh = a.threshold ? keep(down, space.bytes + c, mask) : down;
        store(dx + c, dh, part);
        if (a.dx_bias) store(dx_bias + c, load(dx_bias + c, part) + dh, part);
      });
    }
  });
  if (a.dx_bias)
    add_partial_sums(a.threads, a.workspace, chunk_workspace(columns, 1), row_chunks(a.rows).count, columns, a.dx_bias);
}

}  // namespace

void dropout_add_fwd(const DropoutAddFwd& a) {
  if (a.sum.dtype == DType::kFloat32)
    forward<float>(a);
  else
    forward<bfloat16>(a);
}

void dropout_add_bwd(const DropoutAddBwd& a) {
  if (a.dtype == DType::kFloat32)
    backward<float>(a);
  else
    backward<bfloat16>(a);
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
