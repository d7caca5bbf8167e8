#include "common/parallel.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace stackbert {

void run_team(int threads, void (*work)(void*), void* context) {
  using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  // Looked up on every call (well under a microsecond): torch may be imported after this module.
  if (auto gomp_parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))) {
    gomp_parallel(work, context, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back(work, context);
  work(context);
  for (std::thread& member : team) member.join();
}

}  // namespace stackbert
