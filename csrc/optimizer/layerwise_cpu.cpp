#include "common/parallel.h"
#include "common/simd.h"
#include "optimizer/layerwise.h"
#include "optimizer/step.h"

namespace stackbert {
namespace STACKBERT_ISA {
namespace {

constexpr int64_t kAhead = 512;

// The elements [begin, end) of a part.
struct Place {
  int64_t part, begin, end;
};

Place place(const Layerwise& a, int64_t task) {
  int64_t part = 0;
  for (; task >= part_blocks(a.parts[part].size); ++part) task -= part_blocks(a.parts[part].size);
  const int64_t begin = task * kPartBlock, end = begin + kPartBlock, size = a.parts[part].size;
  return {part, begin, end < size ? end : size};
}

struct Constants {
  float beta1, rest1, beta2, rest2, eps;
};

template <bool kLans>
PartSums moments(const Part& p, const PartFactors& f, const Constants& k, int64_t begin, int64_t end) {
  PartSums sums{};
  for (int64_t i = begin; i < end; i += kSummed) {
    Floats weights{}, rs{}, cs{};
    for_vectors(i, i + kSummed < end ? i + kSummed : end, [&](int64_t e, auto part) {
      prefetch(p.weights + e + kAhead), prefetch(p.grads + e + kAhead);
      prefetch(p.exp_avg + e + kAhead), prefetch(p.exp_avg_sq + e + kAhead);
      const Floats gradient = load(p.grads + e, part) * f.gradient, weight = load(p.weights + e, part);
      const Floats mean = load(p.exp_avg + e, part) * k.beta1 + gradient * k.rest1;
      const Floats square = load(p.exp_avg_sq + e, part) * k.beta2 + gradient * gradient * k.rest2;
      store(p.exp_avg + e, mean, part);
      store(p.exp_avg_sq + e, square, part);
      const Floats down = square_root(square) * f.root + k.eps;
      const Floats r = mean * f.mean / down + weight * f.decay;
      weights = weights + weight * weight, rs = rs + r * r;
      if (kLans) {
        const Floats c = gradient / down + weight * f.decay;
        cs = cs + c * c;
      }
    });
    sums.weights += sum(weights), sums.r += sum(rs), sums.c += sum(cs);
  }
  return sums;
}

template <bool kLans>
void apply(const Part& p, const PartFactors& f, const Constants& k, int64_t begin, int64_t end) {
  for_vectors(begin, end, [&](int64_t e, auto part) {
    prefetch(p.weights + e + kAhead), prefetch(p.exp_avg + e + kAhead), prefetch(p.exp_avg_sq + e + kAhead);
    if (kLans) prefetch(p.grads + e + kAhead);
    const Floats down = square_root(load(p.exp_avg_sq + e, part)) * f.root + k.eps;
    Floats weight = load(p.weights + e, part);
    const Floats decayed = weight * f.decay;
    Floats change = (load(p.exp_avg + e, part) * f.mean / down + decayed) * f.r;
    if (kLans) change = change + (load(p.grads + e, part) * f.gradient / down + decayed) * f.c;
    weight = weight - change;
    store(p.weights + e, weight, part);
    if (p.copies) store(p.copies + e, weight, part);
  });
}

// |w| / |x| of their squares.
double ratio(bool adapted, double weights, double x) {
  return adapted && weights > 0.0 && x > 0.0 ? __builtin_sqrt(weights) / __builtin_sqrt(x) : 1.0;
}

template <bool kLans>
void step(const Layerwise& a) {
  const Decision all = decide(a);
  if (all.skip) return;
  int64_t tasks = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.parts[i].counts) *a.parts[i].step += 1.f;
    tasks += part_blocks(a.parts[i].size);
  }
  if (kLans)
    parallel_tasks(a.threads, tasks, [&](int64_t task) {
      const Place at = place(a, task);
      a.sums[task].weights = sum_of_squares(a.parts[at.part].grads, at.begin, at.end);
    });
  const PartSums* sums = a.sums;
  for (int64_t i = 0; i < a.count; ++i) {
    const Part& part = a.parts[i];
    const int64_t t = static_cast<int64_t>(*part.step);
    double gradient = all.factor;
    if (kLans) {
      double squares = 0.0;
      for (const PartSums* end = sums + part_blocks(part.size); sums < end; ++sums) squares += sums->weights;
      const double norm = __builtin_sqrt(squares) * gradient;
      if (norm > 0.0) gradient /= norm + a.eps;
    }
    a.factors[i] = {static_cast<float>(gradient),
                    static_cast<float>(1.0 / (1.0 - power(a.beta1, t))),
                    static_cast<float>(1.0 / __builtin_sqrt(1.0 - power(a.beta2, t))),
                    part.adapted ? static_cast<float>(a.weight_decay) : 0.f,
                    0.f,
                    0.f};
  }

  const Constants k{static_cast<float>(a.beta1), static_cast<float>(1.0 - a.beta1), static_cast<float>(a.beta2),
                    static_cast<float>(1.0 - a.beta2), static_cast<float>(a.eps)};
  parallel_tasks(a.threads, tasks, [&](int64_t task) {
    const Place at = place(a, task);
    a.sums[task] = moments<kLans>(a.parts[at.part], a.factors[at.part], k, at.begin, at.end);
  });
  sums = a.sums;
  for (int64_t i = 0; i < a.count; ++i) {
    const Part& part = a.parts[i];
    PartSums total{};
    for (const PartSums* end = sums + part_blocks(part.size); sums < end; ++sums)
      total.weights += sums->weights, total.r += sums->r, total.c += sums->c;
    const double of_mean = kLans ? a.lr * a.beta1 : a.lr, of_gradient = a.lr * (1.0 - a.beta1);
    a.factors[i].r = static_cast<float>(of_mean * ratio(part.adapted, total.weights, total.r));
    if (kLans) a.factors[i].c = static_cast<float>(of_gradient * ratio(part.adapted, total.weights, total.c));
  }
  parallel_tasks(a.threads, tasks, [&](int64_t task) {
    const Place at = place(a, task);
    apply<kLans>(a.parts[at.part], a.factors[at.part], k, at.begin, at.end);
  });
}

}  // namespace

void lamb(const Layerwise& a) { step<false>(a); }
void lans(const Layerwise& a) { step<true>(a); }

}  // namespace STACKBERT_ISA
}  // namespace stackbert
