// Python's door to the kernels: raw addresses and integers in, exceptions out. Shapes, dtypes and strides were checked
// by the op (stackbert_kernels/ops/<op>/op.py); what is checked here is what would otherwise be undefined behaviour.
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "common/architectures.h"
#include "common/device.h"
#include "common/huge_pages.h"
#include "common/isa.h"
#include "dropout/dropout.h"
#include "duplicate_layers/duplicate_layers.h"
#include "embedding/embedding.h"
#include "gelu/gelu.h"
#include "layer_norm/layer_norm.h"
#include "masked_lm_loss/masked_lm_loss.h"
#include "optimizer/optimizer.h"

namespace py = pybind11;
using namespace stackbert;

namespace {

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

// Checks and gathers attention's arguments; false where there is nothing to do.
bool attention_arguments(Attention& a, const Rows& q, const Rows& k, const Rows& v, const Rows& out, const Rows& lse,
                         Address seqlens, Address order, bool packed, int64_t tokens, int64_t sequences,
                         int64_t max_seqlen, int64_t heads, int64_t head_dim, int dtype, float scale, Address rng,
                         uint32_t site, int threshold, Address scratch, int threads) {
  check_sizes("attention", {tokens, sequences, max_seqlen, heads});
  check_threshold("attention", threshold);
  if (head_dim < 1 || head_dim > kMaxHeadDim)
    throw std::invalid_argument("attention: head_dim must be in 1.." + std::to_string(kMaxHeadDim) + ", got " +
                                std::to_string(head_dim));
  if (threads < 1) throw std::invalid_argument("attention: threads must be >= 1, got " + std::to_string(threads));
  const DType type = cpu_dtype("attention", dtype);
  if (sequences == 0 || heads == 0 || tokens == 0) return false;
  check_addresses("attention", {std::get<0>(q), std::get<0>(k), std::get<0>(v), std::get<0>(out), seqlens, order, rng});
  if (max_seqlen > 0) check_addresses("attention", {scratch});
  const int32_t *lengths = pointer<const int32_t>(seqlens), *turns = pointer<const int32_t>(order);
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t start = packed ? lengths[b] : 0, end = packed ? lengths[b + 1] : lengths[b];
    if (start < 0 || end < start || end > tokens || end - start > max_seqlen)
      throw std::invalid_argument("attention: sequence " + std::to_string(b) + " must lie in " +
                                  std::to_string(tokens) + " tokens and be no longer than " +
                                  std::to_string(max_seqlen) + ", got " + std::to_string(start) + " to " +
                                  std::to_string(end));
    if (turns[b] < 0 || turns[b] >= sequences)
      throw std::invalid_argument("attention: order must name sequences, got " + std::to_string(turns[b]));
  }
  a = {head_rows(q),
       head_rows(k),
       head_rows(v),
       head_rows(out),
       pointer<float>(std::get<0>(lse)),
       std::get<1>(lse),
       std::get<3>(lse),
       lengths,
       turns,
       packed,
       sequences,
       max_seqlen,
       heads,
       head_dim,
       type,
       scale,
       pointer<const int64_t>(rng),
       site,
       threshold,
       pointer<float>(scratch),
       threads};
  return true;
}

#define ATTENTION_ARGUMENTS                                                                                           \
  py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("seqlens"), py::arg("order"),     \
      py::arg("packed"), py::arg("tokens"), py::arg("sequences"), py::arg("max_seqlen"), py::arg("heads"),            \
      py::arg("head_dim"), py::arg("dtype"), py::arg("scale"), py::arg("rng"), py::arg("site"), py::arg("threshold"), \
      py::arg("scratch"), py::arg("threads"), py::arg("isa") = "best", py::call_guard<py::gil_scoped_release>()

using Triple = std::array<Address, kTables>;

// Checks and gathers what both passes of embedding_layer_norm read.
EmbeddingInputs embedding_inputs(const Triple& ids, const Triple& tables,
                                 const std::array<int64_t, kTables>& table_rows, int64_t tokens, int64_t columns,
                                 int table_dtype, int dtype, Address rng, uint32_t site, int threshold) {
  static constexpr const char* kNames[kTables] = {"ids", "positions", "token_types"};
  check_sizes("embedding_layer_norm", {tokens, columns, table_rows[0], table_rows[1], table_rows[2]});
  check_threshold("embedding_layer_norm", threshold);
  if (threshold > 0) check_addresses("embedding_layer_norm", {rng});
  EmbeddingInputs in;
  for (int i = 0; i < kTables; ++i) {
    in.ids[i] = pointer<const int64_t>(ids[i]);
    in.tables[i] = pointer(tables[i]);
    in.table_rows[i] = table_rows[i];
    if (tokens > 0 && columns > 0) check_addresses("embedding_layer_norm", {ids[i], tables[i]});
    for (int64_t t = 0; t < tokens; ++t)
      if (in.ids[i][t] < 0 || in.ids[i][t] >= table_rows[i])
        throw std::invalid_argument(std::string("embedding_layer_norm: ") + kNames[i] + " must be in [0, " +
                                    std::to_string(table_rows[i]) + "), got " + std::to_string(in.ids[i][t]));
  }
  in.tokens = tokens, in.columns = columns;
  in.table_dtype = cpu_dtype("embedding_layer_norm", table_dtype);
  in.dtype = cpu_dtype("embedding_layer_norm", dtype);
  in.rng = pointer<const int64_t>(rng), in.site = site, in.threshold = threshold;
  return in;
}

// weights, grads, exp_avg, exp_avg_sq, steps, copies; rows, size, decay
using Region = std::tuple<Address, Address, Address, Address, Address, Address, int64_t, int64_t, int64_t>;

AdamWRegion adamw_region(const Region& region) {
  const auto& [weights, grads, exp_avg, exp_avg_sq, steps, copies, rows, size, decay] = region;
  check_sizes("adamw_", {rows, size, decay, size - decay});
  if (rows > 0) check_addresses("adamw_", {steps});
  if (rows > 0 && size > 0) check_addresses("adamw_", {weights, grads, exp_avg, exp_avg_sq});
  return {pointer<float>(weights),
          pointer<const float>(grads),
          pointer<float>(exp_avg),
          pointer<float>(exp_avg_sq),
          pointer<float>(steps),
          pointer<bfloat16>(copies),
          rows,
          size,
          decay};
}

// The parts of the regions: parts[i] are the sizes of those of a row of regions[i].
std::vector<Part> parts_of(const char* op, const std::vector<Region>& regions,
                           const std::vector<std::vector<int64_t>>& parts) {
  if (parts.size() != regions.size())
    throw std::invalid_argument(std::string(op) + ": parts must be as many as regions");
  std::vector<Part> list;
  for (size_t i = 0; i < regions.size(); ++i) {
    const AdamWRegion region = adamw_region(regions[i]);
    int64_t sum = 0;
    for (const int64_t size : parts[i]) check_sizes(op, {size}), sum += size;
    if (sum != region.size)
      throw std::invalid_argument(std::string(op) + ": the parts of a row must sum to " + std::to_string(region.size) +
                                  ", got " + std::to_string(sum));
    for (int64_t row = 0; row < region.rows; ++row) {
      int64_t at = row * region.size;
      for (size_t k = 0; k < parts[i].size(); at += parts[i][k++])
        list.push_back({region.weights + at, region.grads + at, region.exp_avg + at, region.exp_avg_sq + at,
                        region.copies ? region.copies + at : nullptr, region.steps + row, parts[i][k],
                        at - row * region.size < region.decay, k == 0});
    }
  }
  return list;
}

void bind_layerwise(py::module_& m, const char* name, const char* op, void (*step)(const Layerwise&, Isa)) {
  m.def(
      name,
      [op, step](const std::vector<Region>& regions, const std::vector<std::vector<int64_t>>& parts, double lr,
                 double beta1, double beta2, double eps, double weight_decay, double max_norm, Address norm,
                 Address scale, Address found_inf, Address skipped, int threads, const std::string& isa) {
        const std::vector<Part> list = parts_of(op, regions, parts);
        int64_t blocks = 0;
        for (const Part& part : list) blocks += part_blocks(part.size);
        std::vector<PartFactors> factors(list.size());
        std::vector<PartSums> sums(static_cast<size_t>(blocks));
        step({list.data(), static_cast<int64_t>(list.size()), factors.data(), sums.data(), lr, beta1, beta2, eps,
              weight_decay, max_norm, pointer<const float>(norm), pointer<const float>(scale),
              pointer<const float>(found_inf), pointer<float>(skipped), threads},
             isa_named(isa));
      },
      py::arg("regions"), py::arg("parts"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
      py::arg("weight_decay"), py::arg("max_norm"), py::arg("norm"), py::arg("scale"), py::arg("found_inf"),
      py::arg("skipped"), py::arg("threads"), py::arg("isa") = "best", py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of stackbert_kernels. Called through stackbert_kernels.ops.";
  m.def("isa", &isa_name, "The instruction set that the CPU kernels use on this machine.");
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"),
        "Hints that a fresh buffer be put on 2 MB pages where the system has them.");

  m.def("build_info", &build_info,
        "How this module was built: compiler, build_type, cuda (the toolkit's version or None), cuda_archs, "
        "why_no_cuda.");
  m.def("cuda_archs", &built_architectures, "The architectures that the CUDA kernels are built for; [] without CUDA.");
  m.def("cuda_available", &cuda_available, "Whether there are CUDA kernels here, a driver, and a device.");
  m.def("cuda_archs_why_not", &why_none_runs_on, py::arg("archs"), py::arg("major"), py::arg("minor"),
        "Why code built for these architectures does not run on a device of compute capability major.minor; '' if it "
        "does.");

  m.def(
      "dropout",
      [](Address x, Address y, int64_t rows, int64_t columns, int dtype, Address rng, uint32_t site, int threshold,
         int threads) {
        check_sizes("dropout", {rows, columns});
        check_threshold("dropout", threshold);
        const DType type = cpu_dtype("dropout", dtype);
        if (rows == 0 || columns == 0) return;
        check_addresses("dropout", {x, y, rng});
        dropout({pointer(x), pointer(y), rows, columns, type, pointer<const int64_t>(rng), site, threshold, threads});
      },
      py::arg("x"), py::arg("y"), py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("rng"),
      py::arg("site"), py::arg("threshold"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

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
        check_sizes("duplicate_layers_", {row_bytes, row_stride});
        check_addresses("duplicate_layers_", {bank});
        check_layer_map(map);
        const py::gil_scoped_release unlocked;
        duplicate_layers({pointer(bank), row_bytes, row_stride, map.data(), static_cast<int64_t>(map.size()), threads});
      },
      py::arg("bank"), py::arg("row_bytes"), py::arg("row_stride"), py::arg("map"), py::arg("threads"));
#ifdef STACKBERT_WITH_CUDA
  bind_cuda(m);
#endif

  m.def("attention_scratch", &attention_scratch, "Floats of scratch each thread needs.", py::arg("max_seqlen"),
        py::arg("head_dim"), py::arg("backward"));
  m.def(
      "attention_forward",
      [](const Rows& q, const Rows& k, const Rows& v, const Rows& out, const Rows& lse, Address seqlens, Address order,
         bool packed, int64_t tokens, int64_t sequences, int64_t max_seqlen, int64_t heads, int64_t head_dim, int dtype,
         float scale, Address rng, uint32_t site, int threshold, Address scratch, int threads, const std::string& isa) {
        Attention a;
        if (attention_arguments(a, q, k, v, out, lse, seqlens, order, packed, tokens, sequences, max_seqlen, heads,
                                head_dim, dtype, scale, rng, site, threshold, scratch, threads))
          attention_forward(a, isa_named(isa));
      },
      ATTENTION_ARGUMENTS);
  m.def(
      "attention_backward",
      [](const Rows& dout, const Rows& dq, const Rows& dk, const Rows& dv, const Rows& q, const Rows& k, const Rows& v,
         const Rows& out, const Rows& lse, Address seqlens, Address order, bool packed, int64_t tokens,
         int64_t sequences, int64_t max_seqlen, int64_t heads, int64_t head_dim, int dtype, float scale, Address rng,
         uint32_t site, int threshold, Address scratch, int threads, const std::string& isa) {
        Attention a;
        if (!attention_arguments(a, q, k, v, out, lse, seqlens, order, packed, tokens, sequences, max_seqlen, heads,
                                 head_dim, dtype, scale, rng, site, threshold, scratch, threads))
          return;
        check_addresses("attention",
                        {std::get<0>(dout), std::get<0>(dq), std::get<0>(dk), std::get<0>(dv), std::get<0>(lse)});
        attention_backward({a, head_rows(dout), head_rows(dq), head_rows(dk), head_rows(dv)}, isa_named(isa));
      },
      py::arg("dout"), py::arg("dq"), py::arg("dk"), py::arg("dv"), ATTENTION_ARGUMENTS);

  m.def("row_workspace", &row_workspace, py::arg("rows"), py::arg("columns"), py::arg("extra"),
        "Floats of workspace for the layer_norm and dropout_add kernels.");
  m.def(
      "layer_norm_fwd",
      [](Address x, Address residual, Address x_bias, Address weight, Address bias, Address y, Address mean,
         Address rstd, Address workspace, int64_t rows, int64_t columns, int dtype, Address rng, uint32_t site,
         int threshold, float eps, int threads, const std::string& isa) {
        const SumInputs sum = sum_inputs("layer_norm_fwd", x, residual, x_bias, rows, columns,
                                         cpu_dtype("layer_norm_fwd", dtype), rng, site, threshold);
        if (rows == 0 || columns == 0) return;
        check_addresses("layer_norm_fwd", {x, weight, bias, y, workspace});
        if ((mean == 0) != (rstd == 0)) throw std::invalid_argument("layer_norm_fwd: mean and rstd go together");
        layer_norm_fwd({sum, pointer<const float>(weight), pointer<const float>(bias), eps, pointer(y),
                        pointer<float>(mean), pointer<float>(rstd), pointer<float>(workspace), threads},
                       isa_named(isa));
      },
      py::arg("x"), py::arg("residual"), py::arg("x_bias"), py::arg("weight"), py::arg("bias"), py::arg("y"),
      py::arg("mean"), py::arg("rstd"), py::arg("workspace"), py::arg("rows"), py::arg("columns"), py::arg("dtype"),
      py::arg("rng"), py::arg("site"), py::arg("threshold"), py::arg("eps"), py::arg("threads"),
      py::arg("isa") = "best", py::call_guard<py::gil_scoped_release>());
  m.def(
      "layer_norm_bwd",
      [](Address dy, Address x, Address residual, Address x_bias, Address weight, Address mean, Address rstd,
         Address dx, Address dresidual, Address dweight, Address dbias, Address dx_bias, Address workspace,
         int64_t rows, int64_t columns, int dtype, Address rng, uint32_t site, int threshold, int threads,
         const std::string& isa) {
        const SumInputs sum = sum_inputs("layer_norm_bwd", x, residual, x_bias, rows, columns,
                                         cpu_dtype("layer_norm_bwd", dtype), rng, site, threshold);
        if (columns == 0) return;
        check_addresses("layer_norm_bwd", {dweight, dbias});
        if (rows > 0) check_addresses("layer_norm_bwd", {dy, x, weight, mean, rstd, dresidual, workspace});
        if (rows > 0 && (dx == 0) != (residual == 0))
          throw std::invalid_argument("layer_norm_bwd: dx is written if and only if there is a residual");
        layer_norm_bwd({sum, pointer(dy), pointer<const float>(weight), pointer<const float>(mean),
                        pointer<const float>(rstd), pointer(dx), pointer(dresidual), pointer<float>(dweight),
                        pointer<float>(dbias), pointer<float>(dx_bias), pointer<float>(workspace), threads},
                       isa_named(isa));
      },
      py::arg("dy"), py::arg("x"), py::arg("residual"), py::arg("x_bias"), py::arg("weight"), py::arg("mean"),
      py::arg("rstd"), py::arg("dx"), py::arg("dresidual"), py::arg("dweight"), py::arg("dbias"), py::arg("dx_bias"),
      py::arg("workspace"), py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("rng"), py::arg("site"),
      py::arg("threshold"), py::arg("threads"), py::arg("isa") = "best", py::call_guard<py::gil_scoped_release>());
  m.def(
      "dropout_add_fwd",
      [](Address x, Address residual, Address x_bias, Address y, Address workspace, int64_t rows, int64_t columns,
         int dtype, Address rng, uint32_t site, int threshold, int threads, const std::string& isa) {
        const SumInputs sum = sum_inputs("dropout_add_fwd", x, residual, x_bias, rows, columns,
                                         cpu_dtype("dropout_add_fwd", dtype), rng, site, threshold);
        if (rows == 0 || columns == 0) return;
        check_addresses("dropout_add_fwd", {x, residual, y, workspace});
        dropout_add_fwd({sum, pointer(y), pointer<float>(workspace), threads}, isa_named(isa));
      },
      py::arg("x"), py::arg("residual"), py::arg("x_bias"), py::arg("y"), py::arg("workspace"), py::arg("rows"),
      py::arg("columns"), py::arg("dtype"), py::arg("rng"), py::arg("site"), py::arg("threshold"), py::arg("threads"),
      py::arg("isa") = "best", py::call_guard<py::gil_scoped_release>());
  m.def(
      "dropout_add_bwd",
      [](Address dy, Address dx, Address dx_bias, Address workspace, int64_t rows, int64_t columns, int dtype,
         Address rng, uint32_t site, int threshold, int threads, const std::string& isa) {
        check_sizes("dropout_add_bwd", {rows, columns});
        check_threshold("dropout_add_bwd", threshold);
        const DType type = cpu_dtype("dropout_add_bwd", dtype);
        if (columns == 0) return;
        if (rows > 0) check_addresses("dropout_add_bwd", {dy, dx, workspace});
        if (threshold > 0) check_addresses("dropout_add_bwd", {rng});
        dropout_add_bwd({pointer(dy), pointer(dx), pointer<float>(dx_bias), rows, columns, type,
                         pointer<const int64_t>(rng), site, threshold, pointer<float>(workspace), threads},
                        isa_named(isa));
      },
      py::arg("dy"), py::arg("dx"), py::arg("dx_bias"), py::arg("workspace"), py::arg("rows"), py::arg("columns"),
      py::arg("dtype"), py::arg("rng"), py::arg("site"), py::arg("threshold"), py::arg("threads"),
      py::arg("isa") = "best", py::call_guard<py::gil_scoped_release>());

  m.def("bias_gelu_workspace", &bias_gelu_workspace, py::arg("rows"), py::arg("columns"),
        "Floats of workspace for bias_gelu_bwd.");
  m.def(
      "bias_gelu_fwd",
      [](Address x, Address bias, Address y, int64_t rows, int64_t columns, int dtype, bool tanh, int threads,
         const std::string& isa) {
        check_sizes("bias_gelu_fwd", {rows, columns});
        const DType type = cpu_dtype("bias_gelu_fwd", dtype);
        if (rows == 0 || columns == 0) return;
        check_addresses("bias_gelu_fwd", {x, bias, y});
        bias_gelu_fwd({pointer(x), pointer<const float>(bias), pointer(y), rows, columns, type, tanh, threads},
                      isa_named(isa));
      },
      py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("rows"), py::arg("columns"), py::arg("dtype"),
      py::arg("tanh"), py::arg("threads"), py::arg("isa") = "best", py::call_guard<py::gil_scoped_release>());
  m.def(
      "bias_gelu_bwd",
      [](Address dy, Address x, Address bias, Address dx, Address dbias, Address workspace, int64_t rows,
         int64_t columns, int dtype, bool tanh, int threads, const std::string& isa) {
        check_sizes("bias_gelu_bwd", {rows, columns});
        const DType type = cpu_dtype("bias_gelu_bwd", dtype);
        if (columns == 0) return;
        check_addresses("bias_gelu_bwd", {bias, dbias});
        if (rows > 0) check_addresses("bias_gelu_bwd", {dy, x, dx, workspace});
        bias_gelu_bwd({pointer(dy), pointer(x), pointer<const float>(bias), pointer(dx), pointer<float>(dbias), rows,
                       columns, type, tanh, pointer<float>(workspace), threads},
                      isa_named(isa));
      },
      py::arg("dy"), py::arg("x"), py::arg("bias"), py::arg("dx"), py::arg("dbias"), py::arg("workspace"),
      py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("tanh"), py::arg("threads"),
      py::arg("isa") = "best", py::call_guard<py::gil_scoped_release>());

  m.def("embedding_workspace", &embedding_workspace, py::arg("tokens"), py::arg("columns"),
        "Floats of workspace for embedding_bwd.");
  m.def("embedding_order", &embedding_order, py::arg("tokens"), py::arg("all_table_rows"),
        "Integers of workspace for embedding_bwd.");
  m.def(
      "embedding_fwd",
      [](const Triple& ids, const Triple& tables, const std::array<int64_t, kTables>& table_rows, Address weight,
         Address bias, Address y, Address mean, Address rstd, Address workspace, int64_t tokens, int64_t columns,
         int table_dtype, int dtype, Address rng, uint32_t site, int threshold, float eps, int threads,
         const std::string& isa) {
        const EmbeddingInputs in =
            embedding_inputs(ids, tables, table_rows, tokens, columns, table_dtype, dtype, rng, site, threshold);
        if (tokens == 0 || columns == 0) return;
        check_addresses("embedding_layer_norm", {weight, bias, y, workspace});
        if ((mean == 0) != (rstd == 0)) throw std::invalid_argument("embedding_fwd: mean and rstd go together");
        embedding_fwd({in, pointer<const float>(weight), pointer<const float>(bias), eps, pointer(y),
                       pointer<float>(mean), pointer<float>(rstd), pointer<float>(workspace), threads},
                      isa_named(isa));
      },
      py::arg("ids"), py::arg("tables"), py::arg("table_rows"), py::arg("weight"), py::arg("bias"), py::arg("y"),
      py::arg("mean"), py::arg("rstd"), py::arg("workspace"), py::arg("tokens"), py::arg("columns"),
      py::arg("table_dtype"), py::arg("dtype"), py::arg("rng"), py::arg("site"), py::arg("threshold"), py::arg("eps"),
      py::arg("threads"), py::arg("isa") = "best", py::call_guard<py::gil_scoped_release>());
  m.def(
      "embedding_bwd",
      [](Address dy, const Triple& ids, const Triple& tables, const std::array<int64_t, kTables>& table_rows,
         Address weight, Address mean, Address rstd, const Triple& dtables, Address dweight, Address dbias, Address dz,
         Address order, Address workspace, int64_t tokens, int64_t columns, int table_dtype, int dtype, Address rng,
         uint32_t site, int threshold, int threads, const std::string& isa) {
        const EmbeddingInputs in =
            embedding_inputs(ids, tables, table_rows, tokens, columns, table_dtype, dtype, rng, site, threshold);
        if (columns == 0) return;
        check_addresses("embedding_layer_norm", {dweight, dbias, order, dtables[0], dtables[1], dtables[2]});
        if (tokens > 0) check_addresses("embedding_layer_norm", {dy, weight, mean, rstd, dz, workspace});
        embedding_bwd({in,
                       pointer(dy),
                       pointer<const float>(weight),
                       pointer<const float>(mean),
                       pointer<const float>(rstd),
                       {pointer(dtables[0]), pointer(dtables[1]), pointer(dtables[2])},
                       pointer<float>(dweight),
                       pointer<float>(dbias),
                       pointer<float>(dz),
                       pointer<int64_t>(order),
                       pointer<float>(workspace),
                       threads},
                      isa_named(isa));
      },
      py::arg("dy"), py::arg("ids"), py::arg("tables"), py::arg("table_rows"), py::arg("weight"), py::arg("mean"),
      py::arg("rstd"), py::arg("dtables"), py::arg("dweight"), py::arg("dbias"), py::arg("dz"), py::arg("order"),
      py::arg("workspace"), py::arg("tokens"), py::arg("columns"), py::arg("table_dtype"), py::arg("dtype"),
      py::arg("rng"), py::arg("site"), py::arg("threshold"), py::arg("threads"), py::arg("isa") = "best",
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "global_norm",
      [](const std::vector<std::tuple<Address, int64_t>>& tensors, Address norm, int threads, const std::string& isa) {
        std::vector<NormTensor> list;
        int64_t blocks = 0;
        for (const auto& [elements, size] : tensors) {
          check_sizes("global_norm", {size});
          if (size > 0) check_addresses("global_norm", {elements});
          list.push_back({pointer<const float>(elements), size});
          blocks += norm_blocks(size);
        }
        check_addresses("global_norm", {norm});
        std::vector<double> partials(static_cast<size_t>(blocks));
        global_norm({list.data(), static_cast<int64_t>(list.size()), partials.data(), pointer<float>(norm), threads},
                    isa_named(isa));
      },
      py::arg("tensors"), py::arg("norm"), py::arg("threads"), py::arg("isa") = "best",
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "adamw",
      [](const std::vector<Region>& regions, double lr, double beta1, double beta2, double eps, double weight_decay,
         double max_norm, Address norm, Address scale, Address found_inf, Address skipped, int threads,
         const std::string& isa) {
        std::vector<AdamWRegion> list;
        for (const Region& region : regions) list.push_back(adamw_region(region));
        adamw({list.data(), static_cast<int64_t>(list.size()), lr, beta1, beta2, eps, weight_decay, max_norm,
               pointer<const float>(norm), pointer<const float>(scale), pointer<const float>(found_inf),
               pointer<float>(skipped), threads},
              isa_named(isa));
      },
      py::arg("regions"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
      py::arg("max_norm"), py::arg("norm"), py::arg("scale"), py::arg("found_inf"), py::arg("skipped"),
      py::arg("threads"), py::arg("isa") = "best", py::call_guard<py::gil_scoped_release>());
  bind_layerwise(m, "lamb", "lamb_", &lamb);
  bind_layerwise(m, "lans", "lans_", &lans);
}
