// Which devices the CUDA code in this module runs on. The entries are CMake's, "80-real 90a-real 120", each machine
// code (-real), PTX (-virtual) or, with neither word, both.
#pragma once

#include <cstdlib>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#ifndef STACKBERT_CUDA_ARCHS
#error "compile with -DSTACKBERT_CUDA_ARCHS: the architectures that the CUDA code is built for"
#endif

namespace stackbert {

inline std::vector<std::string> built_architectures() {
  std::istringstream list(STACKBERT_CUDA_ARCHS);
  return {std::istream_iterator<std::string>(list), std::istream_iterator<std::string>()};
}

// Whether code built for one entry runs on compute capability major.minor. Machine code runs on the same major version
// from its minor version on, PTX on everything newer; code for "90a" uses what only that one device has, "100f" what
// its family has.
inline bool runs_on(const std::string& entry, int major, int minor) {
  char* suffix = nullptr;
  const long number = std::strtol(entry.c_str(), &suffix, 10);
  const long device = 10L * major + minor;
  if (*suffix == 'a') return device == number;
  const bool same_major = number / 10 == major && device >= number;
  if (*suffix == 'f') return same_major;
  const std::string kind = suffix;
  return (kind != "-virtual" && same_major) || (kind != "-real" && device >= number);
}

inline bool any_runs_on(const std::vector<std::string>& entries, int major, int minor) {
  for (const std::string& entry : entries)
    if (runs_on(entry, major, minor)) return true;
  return false;
}

// Why none of the entries runs on compute capability major.minor, naming both; empty where one does. The driver's own
// words, "no kernel image is available", name neither.
inline std::string why_none_runs_on(const std::vector<std::string>& entries, int major, int minor) {
  if (any_runs_on(entries, major, minor)) return "";
  std::string built;
  for (const std::string& entry : entries) built += (built.empty() ? "" : " ") + entry;
  const std::string number = std::to_string(10 * major + minor);
  return "the device is sm_" + number + ", this module was built for " + built +
         "; build it again with STACKBERT_CUDA_ARCHS=" + number;
}

}  // namespace stackbert
