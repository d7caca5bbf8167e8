// Python's door to the kernels: raw addresses and integers in, exceptions out. Shapes, dtypes and strides were checked by the op
// (stackbert_kernels/ops/<op>/op.py); what is checked here is what would otherwise be undefined behaviour.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/architectures.h"
#include "common/device.h"
#include "common/isa.h"
#include "dropout/dropout.h"
#include "duplicate_layers/duplicate_layers.h"
#include "masked_lm_loss/masked_lm_loss.h"

namespace py = pybind11;
using namespace stackbert;

namespace {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check_sizes(const char* op, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes)
    if (size < 0) throw std::invalid_argument(std::string(op) + ": a size must be >= 0, got " + std::to_string(size));
}

void check_addresses(const char* op, std::initializer_list<Address> addresses) {
  for (const Address address : addresses)
    if (address == 0) throw std::invalid_argument(std::string(op) + ": got a null address");
}

DType cpu_dtype(const char* op, int dtype) {
  if (dtype != static_cast<int>(DType::kFloat32) && dtype != static_cast<int>(DType::kBFloat16))
    throw std::invalid_argument(std::string(op) + ": dtype must be 0 (float32) or 1 (bfloat16), got " + std::to_string(dtype));
  return static_cast<DType>(dtype);
}

void check_threshold(const char* op, int threshold) {
  if (threshold < 0 || threshold > 255)
    throw std::invalid_argument(std::string(op) + ": threshold must be in 0..255, got " + std::to_string(threshold));
}

DuplicateLayers duplicate_layers_arguments(Address bank, int64_t row_bytes, int64_t row_stride, const std::vector<int64_t>& map,
                                           int threads) {
  check_sizes("duplicate_layers_", {row_bytes, row_stride});
  check_addresses("duplicate_layers_", {bank});
  const int64_t n = static_cast<int64_t>(map.size());
  for (int64_t i = 0; i < n; ++i)
    if (map[i] < 0 || map[i] > i)
      throw std::invalid_argument("duplicate_layers_: map[" + std::to_string(i) + "] must be in 0.." + std::to_string(i) + ", got " +
                                  std::to_string(map[i]));
  return {pointer(bank), row_bytes, row_stride, map.data(), n, threads};
}

bool cuda_available() {
#ifdef STACKBERT_WITH_CUDA
  return cuda::device_count() > 0;
#else
  return false;
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = STACKBERT_CXX_COMPILER;
  info["build_type"] = STACKBERT_BUILD_TYPE;
  info["cuda"] = py::none();
  info["cuda_archs"] = built_architectures();
  info["why_no_cuda"] = py::none();
#ifdef STACKBERT_WITH_CUDA
  info["cuda"] = STACKBERT_CUDA_VERSION;
#else
  info["why_no_cuda"] = STACKBERT_WHY_NO_CUDA;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of stackbert_kernels. Called through stackbert_kernels.ops.";
  m.def("isa", &isa_name, "The instruction set that the CPU kernels use on this machine.");

  m.def("build_info", &build_info,
        "How this module was built: compiler, build_type, cuda (the toolkit's version or None), cuda_archs, why_no_cuda.");
  m.def("cuda_archs", &built_architectures, "The architectures that the CUDA kernels are built for; [] without CUDA.");
  m.def("cuda_available", &cuda_available, "Whether there are CUDA kernels here, a driver, and a device.");
  m.def("cuda_archs_run_on", &any_runs_on, py::arg("archs"), py::arg("major"), py::arg("minor"),
        "Whether code built for these architectures runs on a device of compute capability major.minor.");

  m.def(
      "dropout",
      [](Address x, Address y, int64_t rows, int64_t columns, int dtype, Address rng, uint32_t site, int threshold, int threads) {
        check_sizes("dropout", {rows, columns});
        check_threshold("dropout", threshold);
        const DType type = cpu_dtype("dropout", dtype);
        if (rows == 0 || columns == 0) return;
        check_addresses("dropout", {x, y, rng});
        dropout({pointer(x), pointer(y), rows, columns, type, pointer<const int64_t>(rng), site, threshold, threads});
      },
      py::arg("x"), py::arg("y"), py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("rng"), py::arg("site"),
      py::arg("threshold"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.attr("CROSS_ENTROPY_ROWS") = kCrossEntropyRows;
  m.def(
      "cross_entropy",
      [](Address logits, Address bias, Address labels, Address losses, Address bias_parts, Address correct,
         int64_t rows, int64_t vocabulary, int dtype, bool gradient, float scale, int threads) {
        check_sizes("cross_entropy", {rows, vocabulary});
        const DType type = cpu_dtype("cross_entropy", dtype);
        if (rows == 0 || vocabulary == 0) return;
        check_addresses("cross_entropy", {logits, bias, labels, losses});
        const int64_t* label = pointer<const int64_t>(labels);
        for (int64_t r = 0; r < rows; ++r)
          if (label[r] < 0 || label[r] >= vocabulary)
            throw std::invalid_argument("cross_entropy: labels must be in [0, " + std::to_string(vocabulary) +
                                        "), got " + std::to_string(label[r]));
        cross_entropy({pointer(logits), pointer<const float>(bias), label, pointer<float>(losses),
                       pointer<float>(bias_parts), pointer<bool>(correct), rows, vocabulary, type, gradient, scale,
                       threads});
      },
      py::arg("logits"), py::arg("bias"), py::arg("labels"), py::arg("losses"), py::arg("bias_parts"),
      py::arg("correct"), py::arg("rows"), py::arg("vocabulary"), py::arg("dtype"), py::arg("gradient"),
      py::arg("scale"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "duplicate_layers",
      [](Address bank, int64_t row_bytes, int64_t row_stride, const std::vector<int64_t>& map, int threads) {
        const DuplicateLayers arguments = duplicate_layers_arguments(bank, row_bytes, row_stride, map, threads);
        const py::gil_scoped_release unlocked;
        duplicate_layers(arguments);
      },
      py::arg("bank"), py::arg("row_bytes"), py::arg("row_stride"), py::arg("map"), py::arg("threads"));
#ifdef STACKBERT_WITH_CUDA
  m.def(
      "duplicate_layers_cuda",
      [](Address bank, int64_t row_bytes, int64_t row_stride, const std::vector<int64_t>& map, int device, Address stream) {
        const DuplicateLayers arguments = duplicate_layers_arguments(bank, row_bytes, row_stride, map, 1);
        const py::gil_scoped_release unlocked;
        cuda::duplicate_layers(arguments, device, pointer(stream));
      },
      py::arg("bank"), py::arg("row_bytes"), py::arg("row_stride"), py::arg("map"), py::arg("device"), py::arg("stream"));
#endif
}
