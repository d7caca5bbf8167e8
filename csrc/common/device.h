// What the CUDA side knows of the machine, without a CUDA header. Compiled only where CUDA is.
#pragma once

namespace stackbert {
namespace cuda {

int device_count();  // 0 where there is no driver

}  // namespace cuda
}  // namespace stackbert
