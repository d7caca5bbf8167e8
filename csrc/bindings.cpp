// Python's door to the kernels: raw addresses and integers in, exceptions out. Shapes, dtypes and strides were checked by the op
// (stackbert_kernels/ops/<op>/op.py); what is checked here is what would otherwise be undefined behaviour.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "dropout/dropout.h"
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of stackbert_kernels. Called through stackbert_kernels.ops.";
  m.def("isa", &isa_name, "The instruction set that the CPU kernels use on this machine.");

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
}
