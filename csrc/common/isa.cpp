#include "common/isa.h"

#include <stdexcept>

namespace stackbert {

Isa isa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
      return Isa::kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
    return Isa::kGeneric;
  }();
  return best;
#else
  return Isa::kGeneric;
#endif
}

namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

}  // namespace

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

Isa isa_named(const std::string& name) {
  if (name == "best") return isa();
  for (int i = 0; i <= static_cast<int>(isa()); ++i)  // each machine that runs one runs those before it
    if (name == kNames[i]) return static_cast<Isa>(i);
  throw std::invalid_argument("isa must be best, generic, avx2 or avx512, and one that this machine (" +
                              std::string(isa_name()) + ") runs, got " + name);
}

}  // namespace stackbert
