// Threads for the CPU kernels. Work is cut into chunks whose borders depend only on the sizes given, never on how many
// threads turn up or which one takes a chunk: so results are the same for any thread count.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace stackbert {

// Runs work(context) on up to `threads` threads at once, the caller among them, and returns when all have returned.
// Uses the OpenMP team that torch already has in the process (GOMP_parallel): a second pool would fight with it for the
// cores. Without one, plain threads are started for the call.
void run_team(int threads, void (*work)(void*), void* context);

// body(task) for every task in [0, tasks), each once, taken in order by whichever thread is free.
template <typename Body>
void parallel_tasks(int threads, int64_t tasks, const Body& body) {
  struct Context {
    const Body* body;
    int64_t tasks;
    std::atomic<int64_t> next{0};
  } context;
  context.body = &body;
  context.tasks = tasks;
  const auto work = [](void* pointer) {
    Context& shared = *static_cast<Context*>(pointer);
    for (int64_t task; (task = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.tasks;)
      (*shared.body)(task);
  };
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads <= 1)
    work(&context);
  else
    run_team(threads, work, &context);
}

// body(begin, end) over chunks of `chunk` consecutive indices of [0, n).
template <typename Body>
void parallel_chunks(int threads, int64_t n, int64_t chunk, const Body& body) {
  parallel_tasks(threads, (n + chunk - 1) / chunk,
                 [&](int64_t task) { body(task * chunk, std::min(n, (task + 1) * chunk)); });
}

}  // namespace stackbert
