#include "common/dropout_mask.h"
#include "common/parallel.h"
#include "dropout/dropout.h"

namespace stackbert {
namespace STACKBERT_ISA {
namespace {

template <typename T>
void run(const Dropout& a) {
  const PhiloxKey key = dropout_key(a.rng, a.site);
  const float scale = dropout_scale(a.threshold);
  const int64_t rows_a_chunk = 1 + 65536 / (a.columns + 1);
  parallel_chunks(a.threads, a.rows, rows_a_chunk, [&](int64_t begin, int64_t end) {
    uint8_t bytes[kRowBytes];
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.columns;
      T* y = static_cast<T*>(a.y) + row * a.columns;
      for (int64_t c = 0; c < a.columns; c += kLanes) {
        if (c % kRowBytes == 0) row_bytes(key, row, c, bytes);
        const uint8_t* random = bytes + c % kRowBytes;
        if (c + kLanes <= a.columns) {
          store(y + c, keep(load(x + c), random, a.threshold, scale));
        } else {
          const int rest = static_cast<int>(a.columns - c);
          store_first(y + c, keep(load_first(x + c, rest), random, a.threshold, scale), rest);
        }
      }
    }
  });
}

}  // namespace

void dropout(const Dropout& a) {
  if (a.dtype == DType::kFloat32)
    run<float>(a);
  else
    run<bfloat16>(a);
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
