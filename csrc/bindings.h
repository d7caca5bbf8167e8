// What the doors to the CPU kernels (bindings.cpp) and to the CUDA kernels (bindings_cuda.cpp) share: addresses, and
// the checks without which a wrong argument would be undefined behaviour.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention/attention.h"
#include "common/dtype.h"
#include "dropout/dropout.h"
#include "duplicate_layers/duplicate_layers.h"
#include "embedding/embedding.h"
#include "gelu/gelu.h"
#include "layer_norm/layer_norm.h"
#include "masked_lm_loss/masked_lm_loss.h"
#include "optimizer/layerwise.h"
#include "optimizer/optimizer.h"

namespace stackbert {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void check_sizes(const char* op, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes)
    if (size < 0) throw std::invalid_argument(std::string(op) + ": a size must be >= 0, got " + std::to_string(size));
}

inline void check_addresses(const char* op, std::initializer_list<Address> addresses) {
  for (const Address address : addresses)
    if (address == 0) throw std::invalid_argument(std::string(op) + ": got a null address");
}

inline DType cpu_dtype(const char* op, int dtype) {
  if (dtype != static_cast<int>(DType::kFloat32) && dtype != static_cast<int>(DType::kBFloat16))
    throw std::invalid_argument(std::string(op) + ": dtype must be 0 (float32) or 1 (bfloat16), got " +
                                std::to_string(dtype));
  return static_cast<DType>(dtype);
}

inline DType cuda_dtype(const char* op, int dtype) {
  if (dtype < static_cast<int>(DType::kFloat32) || dtype > static_cast<int>(DType::kFloat16))
    throw std::invalid_argument(std::string(op) + ": dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                                std::to_string(dtype));
  return static_cast<DType>(dtype);
}

inline void check_threshold(const char* op, int threshold) {
  if (threshold < 0 || threshold > 255)
    throw std::invalid_argument(std::string(op) + ": threshold must be in 0..255, got " + std::to_string(threshold));
}

inline void check_columns(const char* op, int64_t columns, int64_t most) {
  if (columns < 1 || columns > most)
    throw std::invalid_argument(std::string(op) + ": columns must be 1.." + std::to_string(most) + ", got " +
                                std::to_string(columns));
}

inline void check_layer_map(const std::vector<int64_t>& map) {
  const int64_t n = static_cast<int64_t>(map.size());
  for (int64_t i = 0; i < n; ++i)
    if (map[i] < 0 || map[i] > i)
      throw std::invalid_argument("duplicate_layers_: map[" + std::to_string(i) + "] must be in 0.." +
                                  std::to_string(i) + ", got " + std::to_string(map[i]));
}

inline SumInputs sum_inputs(const char* op, Address x, Address residual, Address x_bias, int64_t rows, int64_t columns,
                            DType dtype, Address rng, uint32_t site, int threshold) {
  check_sizes(op, {rows, columns});
  check_threshold(op, threshold);
  if (threshold > 0) check_addresses(op, {rng});
  if (rows > 0 && residual == 0 && (x_bias != 0 || threshold > 0))
    throw std::invalid_argument(std::string(op) + ": without a residual there is neither x_bias nor dropout");
  return {
      pointer(x), pointer(residual), pointer<const float>(x_bias), rows, columns, dtype, pointer<const int64_t>(rng),
      site,       threshold};
}

using Rows = std::tuple<Address, int64_t, int64_t, int64_t>;  // address, strides of sequence, token, head

inline HeadRows head_rows(const Rows& x) {
  return {pointer(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

// The CUDA kernels' functions, named as the CPU's with _cuda behind: instead of threads they take device and stream.
void bind_cuda(pybind11::module_& m);

}  // namespace stackbert
