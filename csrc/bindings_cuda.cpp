// Python's door to the CUDA kernels. csrc/simt makes a module of its own of this file, in which they run on the host.
#include <pybind11/stl.h>

#include "bindings.h"

#ifdef STACKBERT_SIMT
#include "simt/probes.h"
#include "simt/runtime.h"
#endif

namespace py = pybind11;

namespace stackbert {

void bind_cuda(py::module_& m) {
  m.def(
      "duplicate_layers_cuda",
      [](Address bank, int64_t row_bytes, int64_t row_stride, const std::vector<int64_t>& map, int device,
         Address stream) {
        const DuplicateLayers arguments = duplicate_layers_arguments(bank, row_bytes, row_stride, map, 1);
        const py::gil_scoped_release unlocked;
        cuda::duplicate_layers(arguments, device, pointer(stream));
      },
      py::arg("bank"), py::arg("row_bytes"), py::arg("row_stride"), py::arg("map"), py::arg("device"),
      py::arg("stream"));

  m.attr("LAYER_NORM_COLUMNS") = cuda::kMaxCudaColumns;
  m.def("layer_norm_bwd_workspace_cuda", &cuda::layer_norm_bwd_workspace, py::arg("rows"), py::arg("columns"),
        py::arg("device"), "Floats of workspace for layer_norm_bwd_cuda.");
  m.def(
      "layer_norm_fwd_cuda",
      [](Address x, Address residual, Address x_bias, Address weight, Address bias, Address y, Address mean,
         Address rstd, int64_t rows, int64_t columns, int dtype, Address rng, uint32_t site, int threshold, float eps,
         int device, Address stream) {
        const char* op = "layer_norm_fwd";
        const SumInputs sum =
            sum_inputs(op, x, residual, x_bias, rows, columns, cuda_dtype(op, dtype), rng, site, threshold);
        check_columns(op, columns, cuda::kMaxCudaColumns);
        if (rows == 0) return;
        check_addresses(op, {x, weight, bias, y});
        if ((mean == 0) != (rstd == 0)) throw std::invalid_argument("layer_norm_fwd: mean and rstd go together");
        cuda::layer_norm_fwd({sum, pointer<const float>(weight), pointer<const float>(bias), eps, pointer(y),
                              pointer<float>(mean), pointer<float>(rstd), nullptr, 0},
                             device, pointer(stream));
      },
      py::arg("x"), py::arg("residual"), py::arg("x_bias"), py::arg("weight"), py::arg("bias"), py::arg("y"),
      py::arg("mean"), py::arg("rstd"), py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("rng"),
      py::arg("site"), py::arg("threshold"), py::arg("eps"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "layer_norm_bwd_cuda",
      [](Address dy, Address x, Address residual, Address x_bias, Address weight, Address mean, Address rstd,
         Address dx, Address dresidual, Address dweight, Address dbias, Address dx_bias, Address workspace,
         int64_t rows, int64_t columns, int dtype, Address rng, uint32_t site, int threshold, int device,
         Address stream) {
        const char* op = "layer_norm_bwd";
        const SumInputs sum =
            sum_inputs(op, x, residual, x_bias, rows, columns, cuda_dtype(op, dtype), rng, site, threshold);
        check_columns(op, columns, cuda::kMaxCudaColumns);
        check_addresses(op, {dweight, dbias});
        if (rows > 0) check_addresses(op, {dy, x, weight, mean, rstd, dresidual, workspace});
        if (rows > 0 && (dx == 0) != (residual == 0))
          throw std::invalid_argument("layer_norm_bwd: dx is written if and only if there is a residual");
        cuda::layer_norm_bwd({sum, pointer(dy), pointer<const float>(weight), pointer<const float>(mean),
                              pointer<const float>(rstd), pointer(dx), pointer(dresidual), pointer<float>(dweight),
                              pointer<float>(dbias), pointer<float>(dx_bias), pointer<float>(workspace), 0},
                             device, pointer(stream));
      },
      py::arg("dy"), py::arg("x"), py::arg("residual"), py::arg("x_bias"), py::arg("weight"), py::arg("mean"),
      py::arg("rstd"), py::arg("dx"), py::arg("dresidual"), py::arg("dweight"), py::arg("dbias"), py::arg("dx_bias"),
      py::arg("workspace"), py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("rng"), py::arg("site"),
      py::arg("threshold"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace stackbert

#ifdef STACKBERT_SIMT
PYBIND11_MODULE(_simt, m) {
  using namespace stackbert;
  m.doc() = "The CUDA kernels on the host, a fiber a thread: for tests. csrc/simt/runtime.h says what is checked.";
  m.def(
      "allow",
      [](Address address, size_t bytes, bool writable, const std::string& name) {
        simt::allow(pointer(address), bytes, writable, name);
      },
      py::arg("address"), py::arg("bytes"), py::arg("writable"), py::arg("name"),
      "Global memory that kernels may touch, until forget().");
  m.def("forget", &simt::forget);
  m.def("set_seed", &simt::set_seed, py::arg("seed"), "Of the order in which threads and blocks run.");
  m.def(
      "probe",
      [](const std::string& name, Address in, Address out, int variant) {
        simt::probe(name, pointer<const uint32_t>(in), pointer<uint32_t>(out), variant);
      },
      py::arg("name"), py::arg("input"), py::arg("output"), py::arg("variant") = 0);
  bind_cuda(m);
}
#endif
