#include "common/parallel.h"
#include "common/simd.h"
#include "optimizer/optimizer.h"
#include "optimizer/step.h"

namespace stackbert {
namespace STACKBERT_ISA {
namespace {

constexpr int64_t kAhead = 512;
constexpr int64_t kBlock = 8192;  // elements of a task: enough work for a thread, enough tasks for many

int64_t blocks_of_row(const AdamWRegion& region) { return (region.size + kBlock - 1) / kBlock; }

// What all elements [begin, end) of a row share. All are rounded once, from double.
struct Factors {
  float gradient, weight, beta1, rest1, beta2, rest2, step_size, root, eps;
};

void update(const AdamWRegion& a, int64_t row, int64_t begin, int64_t end, const Factors& f) {
  const int64_t offset = row * a.size;
  float* const w = a.weights + offset;
  float* const m = a.exp_avg + offset;
  float* const v = a.exp_avg_sq + offset;
  const float* const g = a.grads + offset;
  bfloat16* const copy = a.copies ? a.copies + offset : nullptr;
  for_vectors(begin, end, [&](int64_t c, auto part) {
    prefetch(w + c + kAhead), prefetch(m + c + kAhead), prefetch(v + c + kAhead), prefetch(g + c + kAhead);
    const Floats gradient = load(g + c, part) * f.gradient;
    const Floats mean = load(m + c, part) * f.beta1 + gradient * f.rest1;
    const Floats square = load(v + c, part) * f.beta2 + gradient * gradient * f.rest2;
    const Floats down = mean * f.step_size / (square_root(square) * f.root + f.eps);
    const Floats weight = load(w + c, part) * f.weight - down;
    store(m + c, mean, part);
    store(v + c, square, part);
    store(w + c, weight, part);
    if (copy) store(copy + c, weight, part);
  });
}

}  // namespace

void global_norm(const GlobalNorm& a) {
  int64_t tasks = 0;
  for (int64_t i = 0; i < a.count; ++i) tasks += norm_blocks(a.tensors[i].size);
  parallel_tasks(a.threads, tasks, [&](int64_t task) {
    const NormTensor* tensor = a.tensors;
    int64_t block = task;
    for (; block >= norm_blocks(tensor->size); ++tensor) block -= norm_blocks(tensor->size);
    const int64_t begin = block * kNormBlock, end = begin + kNormBlock;
    a.partials[task] = sum_of_squares(tensor->elements, begin, end < tensor->size ? end : tensor->size);
  });
  double total = 0.0;
  for (int64_t task = 0; task < tasks; ++task) total += a.partials[task];
  *a.norm = static_cast<float>(__builtin_sqrt(total));
}

void adamw(const AdamW& a) {
  const Decision all = decide(a);
  if (all.skip) return;
  int64_t tasks = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const AdamWRegion& region = a.regions[i];
    for (int64_t row = 0; row < region.rows; ++row) region.steps[row] += 1.f;
    tasks += region.rows * blocks_of_row(region);
  }
  parallel_tasks(a.threads, tasks, [&](int64_t task) {
    const AdamWRegion* region = a.regions;
    for (; task >= region->rows * blocks_of_row(*region); ++region) task -= region->rows * blocks_of_row(*region);
    const int64_t row = task / blocks_of_row(*region), begin = task % blocks_of_row(*region) * kBlock;
    const int64_t end = begin + kBlock < region->size ? begin + kBlock : region->size;

    const int64_t steps = static_cast<int64_t>(region->steps[row]);
    const double correction1 = 1.0 - power(a.beta1, steps), correction2 = 1.0 - power(a.beta2, steps);
    Factors f;
    f.gradient = all.factor;
    f.beta1 = static_cast<float>(a.beta1), f.rest1 = static_cast<float>(1.0 - a.beta1);
    f.beta2 = static_cast<float>(a.beta2), f.rest2 = static_cast<float>(1.0 - a.beta2);
    f.step_size = static_cast<float>(a.lr / correction1);
    f.root = static_cast<float>(1.0 / __builtin_sqrt(correction2));
    f.eps = static_cast<float>(a.eps);

    const int64_t cut = region->decay < begin ? begin : region->decay < end ? region->decay : end;
    f.weight = static_cast<float>(1.0 - a.lr * a.weight_decay);
    update(*region, row, begin, cut, f);
    f.weight = 1.f;
    update(*region, row, cut, end, f);
  });
}

}  // namespace STACKBERT_ISA
}  // namespace stackbert
