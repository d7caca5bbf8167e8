// One source, several instruction sets. Every <op>_cpu.cpp is compiled once per instruction set with STACKBERT_ISA set
// to the namespace its code goes to; the best one that the machine runs is chosen at run time, so a wheel built
// anywhere uses AVX-512 where it exists and still runs where it does not.
#pragma once

#include <string>

namespace stackbert {

enum class Isa { kGeneric, kAvx2, kAvx512 };

Isa isa();               // the best of the three that this machine and its operating system support
const char* isa_name();  // "generic", "avx2" or "avx512", for `stackbert doctor`

// The named one, for tests of what other machines run; "best" is isa(). Throws where this machine lacks it.
Isa isa_named(const std::string& name);

}  // namespace stackbert

// Declares the kernel `name(const Arguments&)`: one body per instruction set, and stackbert::name, which picks the best
// unless told.
#if defined(__x86_64__)
#define STACKBERT_CPU_KERNEL(name, Arguments)                        \
  namespace generic {                                                \
  void name(const Arguments&);                                       \
  }                                                                  \
  namespace avx2 {                                                   \
  void name(const Arguments&);                                       \
  }                                                                  \
  namespace avx512 {                                                 \
  void name(const Arguments&);                                       \
  }                                                                  \
  inline void name(const Arguments& arguments, Isa wanted = isa()) { \
    switch (wanted) {                                                \
      case Isa::kAvx512:                                             \
        return avx512::name(arguments);                              \
      case Isa::kAvx2:                                               \
        return avx2::name(arguments);                                \
      default:                                                       \
        return generic::name(arguments);                             \
    }                                                                \
  }
#else
#define STACKBERT_CPU_KERNEL(name, Arguments) \
  namespace generic {                         \
  void name(const Arguments&);                \
  }                                           \
  inline void name(const Arguments& arguments, Isa = Isa::kGeneric) { return generic::name(arguments); }
#endif
