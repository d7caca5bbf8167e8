#include "common/launch.cuh"
#include "common/rows.cuh"
#include "optimizer/optimizer.h"
#include "optimizer/step.cuh"

// The kernel is bound by memory: 28 bytes an element (30 with a copy), all in 16-byte accesses but the copies', which
// are half as wide as the weights. A thread has the eight loads of its two vectors under way before it uses the first.
// Nothing is worth a place in the cache: all of it together is more than a cache holds.

namespace stackbert {
namespace cuda {
namespace {

// factors: what the gradients are multiplied with, 1 if the step is skipped else 0; of each row: its step size,
// 1 / sqrt(1 - beta2^t)
struct Pair {
  float first, second;
};
STACKBERT_DEVICE Pair load_pair(const float* factors, int64_t i) {
  const auto pair = ptx::load(reinterpret_cast<const ptx::Vec<float, 2>*>(factors) + i);
  return {pair.v[0], pair.v[1]};
}
STACKBERT_DEVICE void store_pair(float* factors, int64_t i, float first, float second) {
  ptx::store(reinterpret_cast<ptx::Vec<float, 2>*>(factors) + i, ptx::Vec<float, 2>{{first, second}});
}

constexpr int kPrepareThreads = 64;

// A thread a row.
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ AdamW a) {
  const Decision all = decide(a);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPrepareThreads + threadIdx.x;
  if (row < a.rows) {
    float* const at = reinterpret_cast<float*>(ptx::load(reinterpret_cast<const int64_t*>(&a.table[row].step)));
    const float step = ptx::load(at) + (all.skip ? 0.f : 1.f);
    if (!all.skip) ptx::store(at, step);
    const int64_t n = static_cast<int64_t>(step);
    const double correction1 = 1.0 - power(a.beta1, n), correction2 = 1.0 - power(a.beta2, n);
    store_pair(a.factors, 1 + row, static_cast<float>(a.lr / correction1),
               static_cast<float>(1.0 / ptx::square_root(correction2)));
  }
  if (row == 0) {
    store_pair(a.factors, 0, all.factor, all.skip ? 1.f : 0.f);
    count(a.skipped, all.skip);
  }
}

constexpr int kThreads = 256;
constexpr int kVectors = kAdamWElements / (4 * kThreads);  // of a thread
static_assert(kVectors * 4 * kThreads == kAdamWElements, "whole vectors");

struct Update {
  const AdamWLine* table;
  const int32_t* lines;
  const float* factors;
  float kept, beta1, rest1, beta2, rest2, eps;
};

template <int kWidth>
struct Values {
  using Vector = ptx::Vec<float, kWidth>;
  Vector g, m, v, w;

  STACKBERT_DEVICE void load(const AdamWLine& line, int64_t i) {
    g = ptx::load_once(reinterpret_cast<const Vector*>(line.grads + i));
    m = ptx::load_once(reinterpret_cast<const Vector*>(line.exp_avg + i));
    v = ptx::load_once(reinterpret_cast<const Vector*>(line.exp_avg_sq + i));
    w = ptx::load_once(reinterpret_cast<const Vector*>(line.weights + i));
  }
  // The first `decays` of the elements have weight decay.
  STACKBERT_DEVICE void step(const Update& a, float factor, Pair row, int decays) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float gradient = g.v[k] * factor;
      m.v[k] = m.v[k] * a.beta1 + gradient * a.rest1;
      v.v[k] = v.v[k] * a.beta2 + gradient * gradient * a.rest2;
      const float down = m.v[k] * row.first / (ptx::square_root(v.v[k]) * row.second + a.eps);
      w.v[k] = w.v[k] * (k < decays ? a.kept : 1.f) - down;
    }
  }
  STACKBERT_DEVICE void store(const AdamWLine& line, int64_t i) const {
    ptx::store_once(reinterpret_cast<Vector*>(line.exp_avg + i), m);
    ptx::store_once(reinterpret_cast<Vector*>(line.exp_avg_sq + i), v);
    ptx::store_once(reinterpret_cast<Vector*>(line.weights + i), w);
    if (line.copies) store_copies(line.copies + i, w);
  }
};

__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Update a) {
  const int64_t row = ptx::load(a.lines + blockIdx.x);
  const Pair all = load_pair(a.factors, 0), own = load_pair(a.factors, 1 + row);
  if (all.second != 0.f) return;
  const AdamWLine line = load_line(a.table + row);
  const int64_t block = static_cast<int64_t>(blockIdx.x) - line.first, first = block * kAdamWElements;
  const int t = static_cast<int>(threadIdx.x);
  const int decays = static_cast<int>(line.decay <= first                   ? 0
                                      : line.decay - first < kAdamWElements ? line.decay - first
                                                                            : kAdamWElements);

  if (block < line.wide) {
    Values<4> values[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) values[v].load(line, first + 4 * (v * kThreads + t));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int e = 4 * (v * kThreads + t);
      values[v].step(a, all.first, own, decays - e);
      values[v].store(line, first + e);
    }
    return;
  }
  const int64_t left = line.size - first;
  const int elements = left < kAdamWElements ? static_cast<int>(left) : kAdamWElements;
#pragma unroll 1  // the ends of tensors: few, and they should take no registers from the others
  for (int e = t; e < elements; e += kThreads) {
    Values<1> values;
    values.load(line, first + e);
    values.step(a, all.first, own, decays - e);
    values.store(line, first + e);
  }
}

// The sum of squares of a block's elements.
__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ GlobalNorm a) {
  const auto scratch = ptx::shared_memory().as<float>();
  const NormLine line = load_line(a.table + ptx::load(a.lines + blockIdx.x));
  const int64_t block = static_cast<int64_t>(blockIdx.x) - line.first;
  float sum = squares<kNormElements, kThreads>(line.elements, line.size, block * kNormElements, block < line.wide);
  sum = block_sum<kThreads / 32>(sum, scratch);
  if (threadIdx.x == 0) ptx::store(a.partials + blockIdx.x, sum);
}

constexpr int kTotalThreads = 1024;

// One block: a thread has every kTotalThreads-th of the partial sums.
__global__ void __launch_bounds__(kTotalThreads) total_kernel(const __grid_constant__ GlobalNorm a) {
  const auto scratch = ptx::shared_memory().as<float>();
  const float sum = total<kTotalThreads>(a.partials, a.blocks, scratch);
  if (threadIdx.x == 0) ptx::store(a.norm, ptx::square_root(sum));
}

}  // namespace

void global_norm(const GlobalNorm& a, int device, void* stream) {
  const OnDevice on_device("global_norm", device);
  constexpr int kFloat = static_cast<int>(sizeof(float));
  if (a.blocks > 0) launch("global_norm", squares_kernel, a.blocks, kThreads, kThreads / 32 * kFloat, stream, a);
  launch("global_norm", total_kernel, 1, kTotalThreads, kTotalThreads / 32 * kFloat, stream, a);
}

void adamw(const AdamW& a, int device, void* stream) {
  const OnDevice on_device("adamw_", device);
  const int64_t prepared = a.rows > 0 ? (a.rows + kPrepareThreads - 1) / kPrepareThreads : 1;  // a step is counted
  launch("adamw_", prepare_kernel, prepared, kPrepareThreads, 0, stream, a);
  if (a.blocks == 0) return;
  const Update update{a.table,
                      a.lines,
                      a.factors,
                      static_cast<float>(1.0 - a.lr * a.weight_decay),
                      static_cast<float>(a.beta1),
                      static_cast<float>(1.0 - a.beta1),
                      static_cast<float>(a.beta2),
                      static_cast<float>(1.0 - a.beta2),
                      static_cast<float>(a.eps)};
  launch("adamw_", adamw_kernel, a.blocks, kThreads, 0, stream, update);
}

}  // namespace cuda
}  // namespace stackbert
