// Turns what the CUDA runtime reports into exceptions that name the op. Only what the host knows is checked here: an
// error inside a running kernel shows up at the next call that waits for it.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/architectures.h"

namespace stackbert {
namespace cuda {

inline void check(cudaError_t status, const char* op, const char* call) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + call + " failed: " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

// After every <<<...>>>.
inline void check_launch(const char* op) { check(cudaGetLastError(), op, "the kernel launch"); }

// While it lives, `device` is the current one. Refuses a device that none of the embedded architectures runs on; every
// function that launches begins with it.
class OnDevice {
 public:
  OnDevice(const char* op, int device) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), op, "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), op, "cudaDeviceGetAttribute");
    const std::string why_not = why_none_runs_on(built_architectures(), major, minor);
    if (!why_not.empty()) throw std::runtime_error(std::string(op) + ": " + why_not);
    check(cudaGetDevice(&before_), op, "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), op, "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

}  // namespace cuda
}  // namespace stackbert
