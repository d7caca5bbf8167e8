#include <math.h>

#include "common/parallel.h"
#include "common/simd.h"
#include "masked_lm_loss/masked_lm_loss.h"

namespace stackbert {
namespace STACKBERT_ISA {
namespace {

float get(const float* p) { return *p; }
float get(const bfloat16* p) { return bit_cast<float>(static_cast<uint32_t>(p->bits) << 16); }

// z = logits + bias of one row, kLanes words at a time; lanes past the last word are -inf, which adds to no maximum and
// no sum.
template <typename T>
struct Row {
  T* logits;
  const float* bias;
  int64_t vocabulary;

  Floats z(int64_t v) const {
    if (v + kLanes <= vocabulary) return load(logits + v) + load(bias + v);
    const int rest = static_cast<int>(vocabulary - v);
    Floats last = load_first(logits + v, rest) + load_first(bias + v, rest);
    for (int lane = rest; lane < kLanes; ++lane) last[lane] = -__builtin_inff();
    return last;
  }

  void put(int64_t v, Floats value) const {
    if (v + kLanes <= vocabulary)
      store(logits + v, value);
    else
      store_first(logits + v, value, static_cast<int>(vocabulary - v));
  }

  float highest() const {
    Floats top[4];  // four chains: one would wait for its own latency
    for (Floats& lane : top) lane = broadcast(-__builtin_inff());
    int64_t v = 0;
    for (; v + 4 * kLanes <= vocabulary; v += 4 * kLanes)
      for (int i = 0; i < 4; ++i) top[i] = maximum(top[i], load(logits + v + i * kLanes) + load(bias + v + i * kLanes));
    for (; v < vocabulary; v += kLanes) top[0] = maximum(top[0], z(v));
    return maximum(maximum(maximum(top[0], top[1]), maximum(top[2], top[3])));
  }

  bool first_at(int64_t label, float top) const {
    for (int64_t v = 0; v < label; ++v)
      if (get(logits + v) + bias[v] == top) return false;
    return get(logits + label) + bias[label] == top;
  }
};

template <typename T>
void one_row(const CrossEntropy& a, int64_t r, float* bias_part) {
  const Row<T> row{static_cast<T*>(a.logits) + r * a.vocabulary, a.bias, a.vocabulary};
  const int64_t label = a.labels[r];
  const float z_label = get(row.logits + label) + a.bias[label], top = row.highest();
  if (a.correct) a.correct[r] = z_label == top && row.first_at(label, top);

  // float32 has room for the exponentials; bfloat16 would round them once more, so there they are formed again below.
  constexpr bool kKeep = sizeof(T) == 4;
  Floats sums{};
  for (int64_t v = 0; v < a.vocabulary; v += kLanes) {
    const Floats e = exp(row.z(v) - top);
    if (kKeep && a.gradient) row.put(v, e);
    sums += e;
  }
  const float total = sum(sums);
  a.losses[r] = logf(total) + (top - z_label);
  if (!a.gradient) return;

  const float p_label = exp(broadcast(z_label - top))[0] / total, factor = a.scale / total;
  const int64_t whole = bias_part ? a.vocabulary / kLanes * kLanes : 0;
  for (int64_t v = 0; v < a.vocabulary; v += kLanes) {
    Floats dz;
    if constexpr (kKeep)
      dz = (v + kLanes <= a.vocabulary ? load(row.logits + v)
                                       : load_first(row.logits + v, static_cast<int>(a.vocabulary - v))) *
           factor;
    else
      dz = exp(row.z(v) - top) * factor;
    row.put(v, dz);
    if (v < whole)
      store(bias_part + v, load(bias_part + v) + dz);
    else if (bias_part)
      for (int64_t i = v; i < a.vocabulary; ++i) bias_part[i] += dz[i - v];
  }
  const float dz_label[kLanes] = {(p_label - 1.f) * a.scale};
  store_first(row.logits + label, load(dz_label), 1);
  if (bias_part) bias_part[label] -= a.scale;
}

template <typename T>
void run(const CrossEntropy& a) {
  parallel_chunks(a.threads, a.rows, kCrossEntropyRows, [&](int64_t begin, int64_t end) {
    float* bias_part = nullptr;
    if (a.bias_parts) {
      bias_part = a.bias_parts + begin / kCrossEntropyRows * a.vocabulary;
      std::memset(bias_part, 0, sizeof(float) * static_cast<size_t>(a.vocabulary));
    }
    for (int64_t r = begin; r < end; ++r) one_row<T>(a, r, bias_part);
  });
}

}  // namespace

void cross_entropy(const CrossEntropy& a) {
  if (a.dtype == DType::kFloat32)
    run<float>(a);
  else
    run<bfloat16>(a);
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
