#include <algorithm>
#include <limits>

#include "common/launch.cuh"
#include "common/rows.cuh"
#include "masked_lm_loss/masked_lm_loss.h"

// A row of 30,528 16-bit logits is 61 KB. Gradients come from cross_entropy_kernel, which reads a row once and writes
// it once: a block takes every blocks-th row; each thread copies its vectors of the next row to shared memory while it
// works on the present one, and keeps the column sums over all its rows in registers. No thread ever reads what another
// one copied, so that a row costs one barrier: that of its maximum and sum of exponentials.
//
// cross_entropy_row_kernel takes the rest: predictions, which read a row once and write nothing to it, and vocabularies
// that do not fit, whose rows are read twice.

namespace stackbert {
namespace cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -1e30f;  // where a maximum starts: -inf would give inf - inf
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Exponents count in z log2(e), which saves an operation a word, where 16 bits have rounded z more than that does;
// for fp32 in z.
template <typename T>
struct Exponent {
  static constexpr bool kExact = std::is_same<T, float>::value;
  static STACKBERT_DEVICE float of(float z) { return kExact ? z : z * kLog2E; }
  static STACKBERT_DEVICE float exp(float z, float top) {
    return ptx::exp2(kExact ? (z - top) * kLog2E : z * kLog2E - top);
  }
  static STACKBERT_DEVICE float ratio(float from, float top) {  // of exp, between two tops
    return ptx::exp2(kExact ? (from - top) * kLog2E : from - top);
  }
  static STACKBERT_DEVICE float log(float top, float total) {
    return kExact ? top + kLn2 * ptx::log2(total) : kLn2 * (top + ptx::log2(total));
  }
};

// Of some words of a row: the highest exponent, and the sum of exponentials relative to it.
struct Partial {
  float top, total;
};

template <typename T>
STACKBERT_DEVICE Partial of_warp(Partial p) {
  float top = p.top;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, ptx::shuffle_xor(top, lanes));
  return {top, warp_sum(p.total * Exponent<T>::ratio(p.top, top))};
}

// Of the block, in all of its threads. Two calls in a row need two places, as block_sum does.
template <typename T>
STACKBERT_DEVICE Partial of_block(Partial p, ptx::Shared<Partial> scratch) {
  p = of_warp<T>(p);
  const int warps = static_cast<int>(blockDim.x / 32);
  if (ptx::lane() == 0) scratch.store(ptx::warp(), p);
  ptx::block_sync();
  p = {kLowest, 0.f};
  if (ptx::lane() < warps) p = scratch.load(ptx::lane());
  return of_warp<T>(p);
}

// What a label says of its row.
struct Target {
  bool kept, known;
  float weight;  // of the row's gradient

  STACKBERT_DEVICE Target(const CrossEntropyRows& a, int64_t label, float count)
      : kept(label != a.ignore_index),
        known(label >= 0 && label < a.words),
        weight(!kept   ? 0.f
               : known ? 1.f / count
                       : kNaN) {}
  STACKBERT_DEVICE float loss(float log_total, float z_label) const {
    return !kept ? 0.f : known ? log_total - z_label : kNaN;
  }
};

// weight (softmax(z) - 1 at the label). A weight of 0 makes all of it 0, NaN makes it NaN.
template <typename T>
class Gradient {
 public:
  STACKBERT_DEVICE Gradient(Partial p, float weight)
      : top_(Exponent<T>::kExact ? p.top : p.top + ptx::log2(p.total) - ptx::log2(weight)),
        factor_(Exponent<T>::kExact ? weight / p.total : 1.f),
        weight_(weight) {}
  // label: its place in the vector, if it is there
  template <int kWidth>
  STACKBERT_DEVICE void apply(float (&z)[kWidth], int label) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      z[i] = Exponent<T>::exp(z[i], top_);
      if (Exponent<T>::kExact) z[i] *= factor_;
    }
    if (label >= 0 && label < kWidth)
#pragma unroll
      for (int i = 0; i < kWidth; ++i) z[i] -= i == label ? weight_ : 0.f;
  }

 private:
  float top_, factor_, weight_;
};

constexpr int kThreads = 512, kWords = 64;  // of a block; of a thread, whose sums are half of its registers

struct Turns {
  CrossEntropyRows rows;
  int buffer_bytes;  // from one row to the next one in shared memory; 0: one place for both
};

// The vectors of a row that a thread has: vector t, t + threads, ... of the row.
template <typename T>
struct Own {
  static constexpr int kWidth = kWide<T>, kVectors = kWords / kWidth;
  using Vector = Elements<T, kWidth>;

  static STACKBERT_DEVICE int column(int vector) {
    return (vector * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kWidth;
  }
  static STACKBERT_DEVICE bool has_column(int c) {
    return static_cast<unsigned>(c / kWidth) % blockDim.x == threadIdx.x;
  }
  static STACKBERT_DEVICE void copy(ptx::Shared<T> to, const T* row, int vector, int64_t vocabulary) {
    const int c = column(vector);
    if (c < vocabulary) ptx::copy_async_16((to + c).template as<unsigned char>(), row + c, true);
  }
  static STACKBERT_DEVICE void load(ptx::Shared<T> from, int vector, float (&z)[kWidth]) {
    Vector{(from + column(vector)).template as<ptx::Vec<T, kWidth>>().load()}.to_floats(z);
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(const __grid_constant__ Turns t) {
  constexpr int kWidth = Own<T>::kWidth, kVectors = Own<T>::kVectors, kWarps = kThreads / 32;
  const CrossEntropyRows& a = t.rows;
  const auto scratch = ptx::shared_memory().as<Partial>();
  const auto places = (ptx::shared_memory() + 2 * kWarps * static_cast<int>(sizeof(Partial))).template as<T>();
  const float count = ptx::load(a.count);
  const int64_t step = gridDim.x, vocabulary = a.vocabulary;
  T* const logits = static_cast<T*>(a.logits);
  float* const sums = a.sums ? a.sums + blockIdx.x * vocabulary : nullptr;

  int64_t row = blockIdx.x, label = 0;
  if (row < a.rows) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) Own<T>::copy(places, logits + row * vocabulary, v, vocabulary);
    ptx::commit_copies();
    label = ptx::load(a.labels + row);
  }
  float total[kVectors][kWidth];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) total[v][i] = 0.f;
    if (a.add && sums && Own<T>::column(v) < vocabulary) load_parameters<kWidth>(sums + Own<T>::column(v), total[v]);
  }

  for (int turn = 0; row < a.rows; row += step, turn ^= 1) {
    ptx::wait_copies<0>();
    const auto here = (places.template as<unsigned char>() + turn * t.buffer_bytes).template as<T>();
    const auto there = (places.template as<unsigned char>() + (turn ^ 1) * t.buffer_bytes).template as<T>();
    const Target target(a, label, count);
    const int at = target.known ? static_cast<int>(label) : -1;
    const bool has_label = at >= 0 && Own<T>::has_column(at), more = row + step < a.rows;
    float z_label[1] = {0.f};
    if (has_label) Elements<T, 1>{(here + at).template as<ptx::Vec<T, 1>>().load()}.to_floats(z_label);
    T* const now = logits + row * vocabulary;
    const T* const next = now + step * vocabulary;
    if (more) label = ptx::load(a.labels + row + step);
    if (more && t.buffer_bytes) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) Own<T>::copy(there, next, v, vocabulary);
      ptx::commit_copies();
    }

    float high = kLowest;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (Own<T>::column(v) >= vocabulary) continue;
      float z[kWidth];
      Own<T>::load(here, v, z);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) high = fmaxf(high, z[i]);
    }
    Partial partial{Exponent<T>::of(high), 0.f};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (Own<T>::column(v) >= vocabulary) continue;
      float z[kWidth], sum = 0.f;
      Own<T>::load(here, v, z);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += Exponent<T>::exp(z[i], partial.top);
      partial.total += sum;
    }
    partial = of_block<T>(partial, scratch + turn * kWarps);
    if (target.known ? has_label : threadIdx.x == 0)
      ptx::store(a.losses + row, target.loss(Exponent<T>::log(partial.top, partial.total), z_label[0]));

    const Gradient<T> gradient(partial, target.weight);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int c = Own<T>::column(v);
      if (c >= vocabulary) continue;
      float z[kWidth];
      Own<T>::load(here, v, z);
      if (more && !t.buffer_bytes) Own<T>::copy(there, next, v, vocabulary);
      gradient.apply(z, at - c);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) total[v][i] += z[i];
      Own<T>::Vector::from_floats(z).store(now + c);
    }
    if (more && !t.buffer_bytes) ptx::commit_copies();
  }

  if (!sums) return;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    if (Own<T>::column(v) < vocabulary)
#pragma unroll
      for (int i = 0; i < kWidth; i += 4)
        Elements<float, 4>::from_floats(total[v] + i).store(sums + Own<T>::column(v) + i);
}

constexpr int kRowThreads = 256, kTogether = 4;  // vectors that a thread reads at once

// Calls body(first column, kWidth words of it as floats) for the vectors of a thread.
template <typename T, typename Body>
STACKBERT_DEVICE void for_words(const T* row, int64_t vocabulary, const Body& body) {
  constexpr int kWidth = kWide<T>;
  const int64_t step = kRowThreads * kWidth;
  for (int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth; first < vocabulary; first += kTogether * step) {
    Elements<T, kWidth> raw[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (first + j * step < vocabulary) raw[j] = Elements<T, kWidth>::load(row + first + j * step);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (first + j * step >= vocabulary) break;
      float z[kWidth];
      raw[j].to_floats(z);
      body(first + j * step, z);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) cross_entropy_row_kernel(const __grid_constant__ CrossEntropyRows a) {
  constexpr int kWidth = kWide<T>, kWarps = kRowThreads / 32;
  const auto scratch = ptx::shared_memory().as<Partial>();
  const auto ahead_of_label = scratch.template as<uint32_t>() + 2 * kWarps;
  const int64_t row = blockIdx.x, label = ptx::load(a.labels + row);
  T* const logits = static_cast<T*>(a.logits) + row * a.vocabulary;
  const Target target(a, label, ptx::load(a.count));
  float z_label = kNaN;
  if (target.known) Elements<T, 1>::load(logits + label).to_floats(&z_label);

  Partial partial{kLowest, 0.f};
  bool ahead = false;  // whether a word comes before the label
  for_words(logits, a.vocabulary, [&](int64_t c, const float (&z)[kWidth]) {
    float high = z[0];
#pragma unroll
    for (int i = 1; i < kWidth; ++i) high = fmaxf(high, z[i]);
    const float top = fmaxf(partial.top, Exponent<T>::of(high));
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum += Exponent<T>::exp(z[i], top);
      ahead |= z[i] > z_label || (z[i] == z_label && c + i < label);
    }
    partial = {top, partial.total * Exponent<T>::ratio(partial.top, top) + sum};
  });
  ahead = ptx::any(ahead);
  if (ptx::lane() == 0) ahead_of_label.store(ptx::warp(), ahead ? 1u : 0u);
  partial = of_block<T>(partial, scratch);
  if (threadIdx.x == 0) {
    ptx::store(a.losses + row, target.loss(Exponent<T>::log(partial.top, partial.total), z_label));
    uint32_t before = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) before |= ahead_of_label.load(w);
    if (a.correct) ptx::store(a.correct + row, target.kept && z_label == z_label && before == 0);
  }
  if (!a.gradient) return;

  const Gradient<T> gradient(partial, target.weight);
  for_words(logits, a.vocabulary, [&](int64_t c, float (&z)[kWidth]) {
    const int64_t at = target.known ? label - c : -1;
    gradient.apply(z, at < kWidth ? static_cast<int>(at < 0 ? -1 : at) : -1);
    Elements<T, kWidth>::from_floats(z).store(logits + c);
  });
}

// Few, so that more blocks fit where the vocabulary is small.
int threads_of(int64_t vocabulary) { return static_cast<int>((vocabulary + 32 * kWords - 1) / (32 * kWords) * 32); }

// Bytes of shared memory for `buffers` rows at a time.
int64_t shared_of(int64_t vocabulary, DType dtype, int buffers) {
  return buffers * vocabulary * size_of(dtype) + 2 * (kThreads / 32) * static_cast<int64_t>(sizeof(Partial));
}

}  // namespace

int64_t cross_entropy_blocks(int64_t rows, int64_t vocabulary, DType dtype, int device) {
  const char* op = "cross_entropy";
  if (vocabulary > kThreads * kWords || shared_of(vocabulary, dtype, 1) > shared_memory_of_a_block(op, device))
    return 0;
  // No more than the registers of a multiprocessor hold at a time.
  return std::min<int64_t>(rows, multiprocessors(op, device) * (kThreads / threads_of(vocabulary)));
}

void cross_entropy(const CrossEntropyRows& a, int device, void* stream) {
  const char* op = "cross_entropy";
  if (a.rows == 0) return;
  const OnDevice on_device(op, device);
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (a.blocks > 0) {
      const bool two = shared_of(a.vocabulary, a.dtype, 2) <= shared_memory_of_a_block(op, device);
      const Turns turns{a, two ? static_cast<int>(a.vocabulary * size_of(a.dtype)) : 0};
      launch(op, cross_entropy_kernel<T>, a.blocks, threads_of(a.vocabulary),
             static_cast<int>(shared_of(a.vocabulary, a.dtype, two ? 2 : 1)), stream, turns);
    } else {
      launch(op, cross_entropy_row_kernel<T>, a.rows, kRowThreads,
             kRowThreads / 32 * static_cast<int>(sizeof(Partial) + sizeof(uint32_t)), stream, a);
    }
  });
}

}  // namespace cuda
}  // namespace stackbert
