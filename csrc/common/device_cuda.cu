#include <cuda_runtime.h>

#include "common/device.h"

namespace stackbert {
namespace cuda {

int device_count() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) return devices;
  cudaGetLastError();  // no driver, or none that fits: an answer, not an error for the next launch to report
  return 0;
}

}  // namespace cuda
}  // namespace stackbert
