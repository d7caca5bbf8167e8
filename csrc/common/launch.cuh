// Launches: a kernel takes one struct by value, `(const __grid_constant__ Arguments a)`. On the host, for csrc/simt,
// the same call runs the kernel's threads as fibers.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace stackbert {
namespace cuda {

// Bytes of shared memory of a multiprocessor that this code is compiled for, and those of a block that the system has.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ / 100 == 10
constexpr int kSharedOfMultiprocessor = 228 << 10;
#elif __CUDA_ARCH__ == 800
constexpr int kSharedOfMultiprocessor = 164 << 10;
#else  // 8.6, 8.9, 12.0
constexpr int kSharedOfMultiprocessor = 100 << 10;
#endif
constexpr int kSharedOfSystem = 1 << 10;
constexpr int kSharedOfEveryBlock = 99 << 10;  // that a block can have on each device

// For launch bounds: as many blocks as are wanted on a multiprocessor, if their shared memory fits. More would take
// registers from blocks that are alone there anyway.
constexpr int blocks_at_once(int wanted, int shared_bytes) {
  const int fit = kSharedOfMultiprocessor / (shared_bytes + kSharedOfSystem);
  return fit < 1 ? 1 : fit < wanted ? fit : wanted;
}

}  // namespace cuda
}  // namespace stackbert

#ifdef STACKBERT_SIMT

namespace stackbert {
namespace cuda {

class OnDevice {
 public:
  OnDevice(const char*, int) {}
};
inline int multiprocessors(const char*, int) { return 3; }  // an odd few, so that persistent blocks take several turns
inline int shared_memory_of_a_block(const char*, int) { return 227 << 10; }

template <typename Arguments>
void launch(const char* op, void (*kernel)(const Arguments), int64_t blocks, int threads, int shared_bytes, void*,
            const Arguments& arguments) {
  simt::launch(op, {static_cast<unsigned>(blocks), 1, 1}, threads, shared_bytes, [&] { kernel(arguments); });
}

}  // namespace cuda
}  // namespace stackbert

#else

#include "common/check.cuh"

namespace stackbert {
namespace cuda {

inline int multiprocessors(const char* op, int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), op, "cudaDeviceGetAttribute");
  return count;
}

inline int shared_memory_of_a_block(const char* op, int device) {  // bytes, at most
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), op, "cudaDeviceGetAttribute");
  return bytes;
}

constexpr int kSharedByDefault = 48 << 10;  // more has to be asked for

template <typename Arguments>
void launch(const char* op, void (*kernel)(const Arguments), int64_t blocks, int threads, int shared_bytes,
            void* stream, const Arguments& arguments) {
  if (shared_bytes > kSharedByDefault)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), op,
          "cudaFuncSetAttribute");
  const unsigned grid = static_cast<unsigned>(blocks);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  kernel<<<grid, threads, shared_bytes, on>>>(arguments);
  check_launch(op);
}

}  // namespace cuda
}  // namespace stackbert

#endif
