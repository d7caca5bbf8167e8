#include "common/launch.cuh"
#include "common/rows.cuh"
#include "optimizer/layerwise.h"
#include "optimizer/step.cuh"

// As adamw's kernel these are bound by memory: 16-byte accesses, a thread's loads under way before it uses the first.

namespace stackbert {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kVectors = kPartElements / (4 * kThreads);  // of a thread
static_assert(kVectors * 4 * kThreads == kPartElements, "whole vectors");
constexpr int kScratch = kWarps * static_cast<int>(sizeof(float));  // bytes of a sum

// Of a part, in factors[8 part]: prepare() stores the first four, add_up() the others.
struct Prepared {
  float gradient;  // what its elements are multiplied with
  float mean;      // 1 / (1 - beta1^t)
  float root;      // 1 / sqrt(1 - beta2^t)
  float skip;      // 0 or 1
};
struct Rates {
  float r, c;  // what these are subtracted times
  float unused[2];
};
template <typename T>
STACKBERT_DEVICE T load_factors(const float* factors, int64_t part, int which) {
  return ptx::bits_as<T>(ptx::load(reinterpret_cast<const ptx::Words4*>(factors) + 2 * part + which));
}
template <typename T>
STACKBERT_DEVICE void store_factors(float* factors, int64_t part, int which, T value) {
  ptx::store(reinterpret_cast<ptx::Words4*>(factors) + 2 * part + which, ptx::bits_as<ptx::Words4>(value));
}

STACKBERT_DEVICE int64_t blocks_of(const PartLine& line) { return (line.size + kPartElements - 1) / kPartElements; }

__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ Layerwise a) {
  const auto scratch = ptx::shared_memory().as<float>();
  const PartLine line = load_line(a.table + ptx::load(a.lines + blockIdx.x));
  const int64_t block = static_cast<int64_t>(blockIdx.x) - line.first;
  float sum = squares<kPartElements, kThreads>(line.grads, line.size, block * kPartElements, block < line.wide);
  sum = block_sum<kWarps>(sum, scratch);
  if (threadIdx.x == 0) ptx::store(a.partials + blockIdx.x, sum);
}

// A block a part. The row's step is counted by add_up(): here its parts read it.
template <bool kLans>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ Layerwise a) {
  const auto scratch = ptx::shared_memory().as<float>();
  const int64_t part = blockIdx.x;
  const Decision all = decide(a);
  if (part == 0 && threadIdx.x == 0) count(a.skipped, all.skip);
  if (part >= a.parts) return;  // without any, one block comes to count
  const PartLine line = load_line(a.table + part);
  float gradient = all.factor;
  if constexpr (kLans) {
    const float squares = total<kThreads>(a.partials + line.first, blocks_of(line), scratch);
    const float norm = ptx::square_root(squares) * gradient;
    if (norm > 0.f) gradient /= norm + static_cast<float>(a.eps);
  }
  if (threadIdx.x == 0) {
    const int64_t t = static_cast<int64_t>(ptx::load(line.step)) + 1;
    const double correction1 = 1.0 - power(a.beta1, t), correction2 = 1.0 - power(a.beta2, t);
    const Prepared prepared{gradient, static_cast<float>(1.0 / correction1),
                            static_cast<float>(1.0 / ptx::square_root(correction2)), all.skip ? 1.f : 0.f};
    store_factors(a.factors, part, 0, prepared);
  }
}

struct Update {
  const PartLine* table;
  const int32_t* lines;
  const float* factors;
  float* partials;
  int64_t blocks;
  float beta1, rest1, beta2, rest2, eps, weight_decay;
};

struct Sums {
  float weights = 0.f, r = 0.f, c = 0.f;
};

template <bool kLans, int kWidth>
struct Values {
  using Vector = ptx::Vec<float, kWidth>;
  Vector g, m, v, w;

  STACKBERT_DEVICE void load(const PartLine& line, int64_t i, bool gradients) {
    if (gradients) g = ptx::load_once(reinterpret_cast<const Vector*>(line.grads + i));
    m = ptx::load_once(reinterpret_cast<const Vector*>(line.exp_avg + i));
    v = ptx::load_once(reinterpret_cast<const Vector*>(line.exp_avg_sq + i));
    w = ptx::load_once(reinterpret_cast<const Vector*>(line.weights + i));
  }
  STACKBERT_DEVICE float down(int k, const Update& a, const Prepared& f) const {
    return ptx::square_root(v.v[k]) * f.root + a.eps;
  }
  STACKBERT_DEVICE void move(const Update& a, const Prepared& f, float decay, Sums& sums) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float gradient = g.v[k] * f.gradient;
      m.v[k] = m.v[k] * a.beta1 + gradient * a.rest1;
      v.v[k] = v.v[k] * a.beta2 + gradient * gradient * a.rest2;
      const float divisor = down(k, a, f), r = m.v[k] * f.mean / divisor + w.v[k] * decay;
      sums.weights += w.v[k] * w.v[k], sums.r += r * r;
      if constexpr (kLans) {
        const float c = gradient / divisor + w.v[k] * decay;
        sums.c += c * c;
      }
    }
  }
  STACKBERT_DEVICE void store_moments(const PartLine& line, int64_t i) const {
    ptx::store_once(reinterpret_cast<Vector*>(line.exp_avg + i), m);
    ptx::store_once(reinterpret_cast<Vector*>(line.exp_avg_sq + i), v);
  }
  STACKBERT_DEVICE void apply(const Update& a, const Prepared& f, float decay, const Rates& rates) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float divisor = down(k, a, f), decayed = w.v[k] * decay;
      float change = (m.v[k] * f.mean / divisor + decayed) * rates.r;
      if constexpr (kLans) change += (g.v[k] * f.gradient / divisor + decayed) * rates.c;
      w.v[k] -= change;
    }
  }
  STACKBERT_DEVICE void store_weights(const PartLine& line, int64_t i) const {
    ptx::store_once(reinterpret_cast<Vector*>(line.weights + i), w);
    if (line.copies) store_copies(line.copies + i, w);
  }
};

// Calls run(values, place) for a thread's elements of a block, loaded.
template <bool kLans, typename Run>
STACKBERT_DEVICE void with_values(const PartLine& line, bool gradients, const Run& run) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) - line.first, first = block * kPartElements;
  const int t = static_cast<int>(threadIdx.x);
  if (block < line.wide) {
    Values<kLans, 4> values[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) values[v].load(line, first + 4 * (v * kThreads + t), gradients);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) run(values[v], first + 4 * (v * kThreads + t));
    return;
  }
  const int64_t left = line.size - first;
  const int elements = left < kPartElements ? static_cast<int>(left) : kPartElements;
#pragma unroll 1  // the ends of parts: few, and they should take no registers from the others
  for (int e = t; e < elements; e += kThreads) {
    Values<kLans, 1> values;
    values.load(line, first + e, gradients);
    run(values, first + e);
  }
}

template <bool kLans>
__global__ void __launch_bounds__(kThreads) moments_kernel(const __grid_constant__ Update a) {
  const auto scratch = ptx::shared_memory().as<float>();
  const int64_t part = ptx::load(a.lines + blockIdx.x);
  const Prepared f = load_factors<Prepared>(a.factors, part, 0);
  if (f.skip != 0.f) return;
  const PartLine line = load_line(a.table + part);
  const float decay = line.flags & kAdapted ? a.weight_decay : 0.f;
  Sums sums;
  with_values<kLans>(line, true, [&](auto& values, int64_t i) {
    values.move(a, f, decay, sums);
    values.store_moments(line, i);
  });
  const float weights = block_sum<kWarps>(sums.weights, scratch), r = block_sum<kWarps>(sums.r, scratch + kWarps);
  const float c = kLans ? block_sum<kWarps>(sums.c, scratch + 2 * kWarps) : 0.f;
  if (threadIdx.x == 0) {
    ptx::store(a.partials + blockIdx.x, weights);
    ptx::store(a.partials + a.blocks + blockIdx.x, r);
    if constexpr (kLans) ptx::store(a.partials + 2 * a.blocks + blockIdx.x, c);
  }
}

// |w| / |x| of their squares.
STACKBERT_DEVICE double ratio(bool adapted, float weights, float x) {
  const bool defined = adapted && weights > 0.f && x > 0.f;
  return defined ? ptx::square_root(static_cast<double>(weights)) / ptx::square_root(static_cast<double>(x)) : 1.0;
}

// A block a part.
template <bool kLans>
__global__ void __launch_bounds__(kThreads) add_up_kernel(const __grid_constant__ Layerwise a) {
  const auto scratch = ptx::shared_memory().as<float>();
  const int64_t part = blockIdx.x;
  if (load_factors<Prepared>(a.factors, part, 0).skip != 0.f) return;
  const PartLine line = load_line(a.table + part);
  const int64_t blocks = blocks_of(line);
  const float* const partials = a.partials + line.first;
  const float weights = total<kThreads>(partials, blocks, scratch);
  const float r = total<kThreads>(partials + a.blocks, blocks, scratch + kWarps);
  const float c = kLans ? total<kThreads>(partials + 2 * a.blocks, blocks, scratch + 2 * kWarps) : 0.f;
  if (threadIdx.x == 0) {
    const bool adapted = line.flags & kAdapted;
    const double of_mean = kLans ? a.lr * a.beta1 : a.lr, of_gradient = a.lr * (1.0 - a.beta1);
    Rates rates{};
    rates.r = static_cast<float>(of_mean * ratio(adapted, weights, r));
    if constexpr (kLans) rates.c = static_cast<float>(of_gradient * ratio(adapted, weights, c));
    store_factors(a.factors, part, 1, rates);
    if (line.flags & kCounts) ptx::store(line.step, ptx::load(line.step) + 1.f);
  }
}

template <bool kLans>
__global__ void __launch_bounds__(kThreads) apply_kernel(const __grid_constant__ Update a) {
  const int64_t part = ptx::load(a.lines + blockIdx.x);
  const Prepared f = load_factors<Prepared>(a.factors, part, 0);
  if (f.skip != 0.f) return;
  const Rates rates = load_factors<Rates>(a.factors, part, 1);
  const PartLine line = load_line(a.table + part);
  const float decay = line.flags & kAdapted ? a.weight_decay : 0.f;
  with_values<kLans>(line, kLans, [&](auto& values, int64_t i) {
    values.apply(a, f, decay, rates);
    values.store_weights(line, i);
  });
}

template <bool kLans>
void step(const char* op, const Layerwise& a, int device, void* stream) {
  const OnDevice on_device(op, device);
  const bool elements = a.blocks > 0;
  if (kLans && elements) launch(op, squares_kernel, a.blocks, kThreads, kScratch, stream, a);
  launch(op, prepare_kernel<kLans>, a.parts > 0 ? a.parts : 1, kThreads, kScratch, stream, a);
  if (a.parts == 0) return;
  const Update update{a.table,
                      a.lines,
                      a.factors,
                      a.partials,
                      a.blocks,
                      static_cast<float>(a.beta1),
                      static_cast<float>(1.0 - a.beta1),
                      static_cast<float>(a.beta2),
                      static_cast<float>(1.0 - a.beta2),
                      static_cast<float>(a.eps),
                      static_cast<float>(a.weight_decay)};
  constexpr int kSums = kLans ? 3 : 2;
  if (elements) launch(op, moments_kernel<kLans>, a.blocks, kThreads, kSums * kScratch, stream, update);
  launch(op, add_up_kernel<kLans>, a.parts, kThreads, kSums * kScratch, stream, a);
  if (elements) launch(op, apply_kernel<kLans>, a.blocks, kThreads, 0, stream, update);
}

}  // namespace

void lamb(const Layerwise& a, int device, void* stream) { step<false>("lamb_", a, device, stream); }
void lans(const Layerwise& a, int device, void* stream) { step<true>("lans_", a, device, stream); }

}  // namespace cuda
}  // namespace stackbert
