// Python's door to the CUDA kernels. csrc/simt makes a module of its own of this file, in which they run on the host.
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"

#ifdef STACKBERT_SIMT
#include "simt/probes.h"
#include "simt/runtime.h"
#endif

namespace py = pybind11;

namespace stackbert {

namespace {

constexpr int64_t kMaskColumns = (int64_t{1} << 31) - 1;  // of a row, for dropout

// 16-byte accesses: what the addresses and strides of `x` must be multiples of.
void check_aligned(const char* op, const char* name, const Rows& x) {
  const int64_t bytes = 2 * (std::get<1>(x) | std::get<2>(x) | std::get<3>(x)) | static_cast<int64_t>(std::get<0>(x));
  if (bytes % 16 != 0) throw std::invalid_argument(std::string(op) + ": rows of " + name + " must begin on 16 bytes");
}

// Lengths lie on the device, where nothing checks them but the op's caller.
Attention attention_cuda_arguments(const Rows& q, const Rows& k, const Rows& v, const Rows& out, const Rows& lse,
                                   Address seqlens, Address order, bool packed, int64_t tokens, int64_t sequences,
                                   int64_t max_seqlen, int64_t heads, int64_t head_dim, int dtype, float scale,
                                   Address rng, uint32_t site, int threshold) {
  const char* op = "attention";
  check_sizes(op, {tokens, sequences, max_seqlen, heads});
  check_threshold(op, threshold);
  if (head_dim != 32 && head_dim != 64 && head_dim != 128)
    throw std::invalid_argument("attention: head_dim must be 32, 64 or 128, got " + std::to_string(head_dim));
  const DType type = cuda_dtype(op, dtype);
  if (type == DType::kFloat32)
    throw std::invalid_argument("attention: dtype must be 1 (bfloat16) or 2 (float16), got 0");
  if (sequences > 0 && heads > 0 && tokens > 0 && max_seqlen > 0)
    check_addresses(op, {std::get<0>(q), std::get<0>(k), std::get<0>(v), std::get<0>(out), seqlens, order, rng});
  check_aligned(op, "q", q), check_aligned(op, "k", k), check_aligned(op, "v", v), check_aligned(op, "out", out);
  return {head_rows(q),
          head_rows(k),
          head_rows(v),
          head_rows(out),
          pointer<float>(std::get<0>(lse)),
          std::get<1>(lse),
          std::get<3>(lse),
          pointer<const int32_t>(seqlens),
          pointer<const int32_t>(order),
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
          nullptr,
          0};
}

using Triple = std::array<Address, kTables>;

// Indices lie on the device, where nothing checks them but the kernels.
EmbeddingInputs embedding_cuda_inputs(const Triple& ids, const Triple& tables,
                                      const std::array<int64_t, kTables>& table_rows, int64_t tokens, int64_t columns,
                                      int table_dtype, int dtype, Address rng, uint32_t site, int threshold) {
  const char* op = "embedding_layer_norm";
  check_sizes(op, {tokens, table_rows[0], table_rows[1], table_rows[2]});
  check_columns(op, columns, cuda::kMaxEmbeddingColumns);
  check_threshold(op, threshold);
  if (threshold > 0) check_addresses(op, {rng});
  EmbeddingInputs in;
  for (int i = 0; i < kTables; ++i) {
    if (tokens > 0) check_addresses(op, {ids[i], tables[i]});
    in.ids[i] = pointer<const int64_t>(ids[i]);
    in.tables[i] = pointer(tables[i]);
    in.table_rows[i] = table_rows[i];
  }
  in.tokens = tokens, in.columns = columns;
  in.table_dtype = cuda_dtype(op, table_dtype), in.dtype = cuda_dtype(op, dtype);
  in.rng = pointer<const int64_t>(rng), in.site = site, in.threshold = threshold;
  return in;
}

bool nothing_to_do(const Attention& a) { return a.sequences == 0 || a.heads == 0 || a.max_seqlen == 0; }

void bind_layerwise(py::module_& m, const char* name, const char* op,
                    void (*step)(const cuda::Layerwise&, int, void*)) {
  m.def(
      name,
      [op, step](Address table, Address lines, Address factors, Address partials, int64_t parts, int64_t blocks,
                 int elements, double lr, double beta1, double beta2, double eps, double weight_decay, double max_norm,
                 Address norm, Address scale, Address found_inf, Address skipped, int device, Address stream) {
        check_sizes(op, {parts, blocks});
        if (parts > 0) check_addresses(op, {table, factors});
        if (blocks > 0) check_addresses(op, {lines, partials});
        if ((table | lines | factors) % 16 != 0)
          throw std::invalid_argument(std::string(op) + ": table, lines and factors must begin on 16 bytes");
        if (elements != cuda::kPartElements)
          throw std::invalid_argument(std::string(op) + ": the table must be made for " +
                                      std::to_string(cuda::kPartElements) + " elements a block, got " +
                                      std::to_string(elements));
        step({pointer<const cuda::PartLine>(table), pointer<const int32_t>(lines), pointer<float>(factors),
              pointer<float>(partials), parts, blocks, lr, beta1, beta2, eps, weight_decay, max_norm,
              pointer<const float>(norm), pointer<const float>(scale), pointer<const float>(found_inf),
              pointer<float>(skipped)},
             device, pointer(stream));
      },
      py::arg("table"), py::arg("lines"), py::arg("factors"), py::arg("partials"), py::arg("parts"), py::arg("blocks"),
      py::arg("elements"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
      py::arg("max_norm"), py::arg("norm"), py::arg("scale"), py::arg("found_inf"), py::arg("skipped"),
      py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

#define ATTENTION_ARGUMENTS                                                                                           \
  py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("seqlens"), py::arg("order"),     \
      py::arg("packed"), py::arg("tokens"), py::arg("sequences"), py::arg("max_seqlen"), py::arg("heads"),            \
      py::arg("head_dim"), py::arg("dtype"), py::arg("scale"), py::arg("rng"), py::arg("site"), py::arg("threshold"), \
      py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>()

#define EMBEDDING_ARGUMENTS                                                                            \
  py::arg("ids"), py::arg("tables"), py::arg("table_rows"), py::arg("tokens"), py::arg("columns"),     \
      py::arg("table_dtype"), py::arg("dtype"), py::arg("rng"), py::arg("site"), py::arg("threshold"), \
      py::arg("weight")

void bind_cuda(py::module_& m) {
  m.def(
      "duplicate_layers_cuda",
      [](const std::vector<std::tuple<Address, int64_t, int64_t>>& banks, const std::vector<int64_t>& map, int device,
         Address stream) {
        std::vector<cuda::RowBank> list;
        for (const auto& [bank, row_bytes, row_stride] : banks) {
          check_sizes("duplicate_layers_", {row_bytes, row_stride});
          if (row_bytes > 0) check_addresses("duplicate_layers_", {bank});
          list.push_back({pointer(bank), row_bytes, row_stride});
        }
        check_layer_map(map);
        const py::gil_scoped_release unlocked;
        cuda::duplicate_layers(
            {list.data(), static_cast<int64_t>(list.size()), map.data(), static_cast<int64_t>(map.size())}, device,
            pointer(stream));
      },
      py::arg("banks"), py::arg("map"), py::arg("device"), py::arg("stream"));

  m.def(
      "attention_forward_cuda",
      [](const Rows& q, const Rows& k, const Rows& v, const Rows& out, const Rows& lse, Address seqlens, Address order,
         bool packed, int64_t tokens, int64_t sequences, int64_t max_seqlen, int64_t heads, int64_t head_dim, int dtype,
         float scale, Address rng, uint32_t site, int threshold, int device, Address stream) {
        const Attention a = attention_cuda_arguments(q, k, v, out, lse, seqlens, order, packed, tokens, sequences,
                                                     max_seqlen, heads, head_dim, dtype, scale, rng, site, threshold);
        if (!nothing_to_do(a)) cuda::attention_forward(a, device, pointer(stream));
      },
      ATTENTION_ARGUMENTS);
  m.def(
      "attention_backward_cuda",
      [](const Rows& dout, const Rows& dq, const Rows& dk, const Rows& dv, Address delta, const Rows& q, const Rows& k,
         const Rows& v, const Rows& out, const Rows& lse, Address seqlens, Address order, bool packed, int64_t tokens,
         int64_t sequences, int64_t max_seqlen, int64_t heads, int64_t head_dim, int dtype, float scale, Address rng,
         uint32_t site, int threshold, int device, Address stream) {
        const char* op = "attention";
        const Attention a = attention_cuda_arguments(q, k, v, out, lse, seqlens, order, packed, tokens, sequences,
                                                     max_seqlen, heads, head_dim, dtype, scale, rng, site, threshold);
        if (nothing_to_do(a)) return;
        if (tokens > 0)
          check_addresses(
              op, {std::get<0>(dout), std::get<0>(dq), std::get<0>(dk), std::get<0>(dv), std::get<0>(lse), delta});
        check_aligned(op, "dout", dout), check_aligned(op, "dq", dq), check_aligned(op, "dk", dk),
            check_aligned(op, "dv", dv);
        cuda::attention_backward({a, head_rows(dout), head_rows(dq), head_rows(dk), head_rows(dv)},
                                 pointer<float>(delta), device, pointer(stream));
      },
      py::arg("dout"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("delta"), ATTENTION_ARGUMENTS);

  m.def("bias_gelu_bwd_workspace_cuda", &cuda::bias_gelu_bwd_workspace, py::arg("rows"), py::arg("columns"),
        py::arg("device"), "Floats of workspace for bias_gelu_bwd_cuda.");
  m.def(
      "bias_gelu_fwd_cuda",
      [](Address x, Address bias, Address y, int64_t rows, int64_t columns, int dtype, bool tanh, int device,
         Address stream) {
        const char* op = "bias_gelu_fwd";
        check_sizes(op, {rows, columns});
        const DType type = cuda_dtype(op, dtype);
        if (rows == 0 || columns == 0) return;
        check_addresses(op, {x, bias, y});
        cuda::bias_gelu_fwd({pointer(x), pointer<const float>(bias), pointer(y), rows, columns, type, tanh, 0}, device,
                            pointer(stream));
      },
      py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("rows"), py::arg("columns"), py::arg("dtype"),
      py::arg("tanh"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "bias_gelu_bwd_cuda",
      [](Address dy, Address x, Address bias, Address dx, Address dbias, Address workspace, int64_t rows,
         int64_t columns, int dtype, bool tanh, int device, Address stream) {
        const char* op = "bias_gelu_bwd";
        check_sizes(op, {rows, columns});
        const DType type = cuda_dtype(op, dtype);
        if (columns == 0) return;
        check_addresses(op, {bias, dbias});
        if (rows > 0) check_addresses(op, {dy, x, dx, workspace});
        cuda::bias_gelu_bwd({pointer(dy), pointer(x), pointer<const float>(bias), pointer(dx), pointer<float>(dbias),
                             rows, columns, type, tanh, pointer<float>(workspace), 0},
                            device, pointer(stream));
      },
      py::arg("dy"), py::arg("x"), py::arg("bias"), py::arg("dx"), py::arg("dbias"), py::arg("workspace"),
      py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("tanh"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "dropout_cuda",
      [](Address x, Address y, int64_t rows, int64_t columns, int dtype, Address rng, uint32_t site, int threshold,
         int device, Address stream) {
        check_sizes("dropout", {rows, columns});
        check_threshold("dropout", threshold);
        const DType type = cuda_dtype("dropout", dtype);
        if (rows == 0 || columns == 0) return;
        check_columns("dropout", columns, kMaskColumns);
        check_addresses("dropout", {x, y, rng});
        cuda::dropout({pointer(x), pointer(y), rows, columns, type, pointer<const int64_t>(rng), site, threshold, 0},
                      device, pointer(stream));
      },
      py::arg("x"), py::arg("y"), py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("rng"),
      py::arg("site"), py::arg("threshold"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());

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

  m.def("dropout_add_bwd_workspace_cuda", &cuda::dropout_add_bwd_workspace, py::arg("rows"), py::arg("columns"),
        py::arg("device"), "Floats of workspace for dropout_add_bwd_cuda.");
  m.def(
      "dropout_add_fwd_cuda",
      [](Address x, Address residual, Address x_bias, Address y, int64_t rows, int64_t columns, int dtype, Address rng,
         uint32_t site, int threshold, int device, Address stream) {
        const char* op = "dropout_add_fwd";
        const SumInputs sum =
            sum_inputs(op, x, residual, x_bias, rows, columns, cuda_dtype(op, dtype), rng, site, threshold);
        if (rows == 0 || columns == 0) return;
        check_columns(op, columns, kMaskColumns);
        check_addresses(op, {x, residual, y});
        cuda::dropout_add_fwd({sum, pointer(y), nullptr, 0}, device, pointer(stream));
      },
      py::arg("x"), py::arg("residual"), py::arg("x_bias"), py::arg("y"), py::arg("rows"), py::arg("columns"),
      py::arg("dtype"), py::arg("rng"), py::arg("site"), py::arg("threshold"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "dropout_add_bwd_cuda",
      [](Address dy, Address dx, Address dx_bias, Address workspace, int64_t rows, int64_t columns, int dtype,
         Address rng, uint32_t site, int threshold, int device, Address stream) {
        const char* op = "dropout_add_bwd";
        check_sizes(op, {rows, columns});
        check_threshold(op, threshold);
        const DType type = cuda_dtype(op, dtype);
        if (columns == 0) return;
        check_columns(op, columns, kMaskColumns);
        if (threshold > 0) check_addresses(op, {rng});
        if (rows > 0) check_addresses(op, {dy, dx});
        if (rows > 0 && dx_bias != 0) check_addresses(op, {workspace});
        cuda::dropout_add_bwd({pointer(dy), pointer(dx), pointer<float>(dx_bias), rows, columns, type,
                               pointer<const int64_t>(rng), site, threshold, pointer<float>(workspace), 0},
                              device, pointer(stream));
      },
      py::arg("dy"), py::arg("dx"), py::arg("dx_bias"), py::arg("workspace"), py::arg("rows"), py::arg("columns"),
      py::arg("dtype"), py::arg("rng"), py::arg("site"), py::arg("threshold"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "global_norm_cuda",
      [](Address table, Address lines, Address partials, Address norm, int64_t blocks, int elements, int device,
         Address stream) {
        check_sizes("global_norm", {blocks});
        check_addresses("global_norm", {norm});
        if (blocks > 0) check_addresses("global_norm", {table, lines, partials});
        if (table % 16 != 0) throw std::invalid_argument("global_norm: table must begin on 16 bytes");
        if (elements != cuda::kNormElements)
          throw std::invalid_argument("global_norm: the table must be made for " + std::to_string(cuda::kNormElements) +
                                      " elements a block, got " + std::to_string(elements));
        cuda::global_norm({pointer<const cuda::NormLine>(table), pointer<const int32_t>(lines),
                           pointer<float>(partials), pointer<float>(norm), blocks},
                          device, pointer(stream));
      },
      py::arg("table"), py::arg("lines"), py::arg("partials"), py::arg("norm"), py::arg("blocks"), py::arg("elements"),
      py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "adamw_cuda",
      [](Address table, Address lines, Address factors, int64_t rows, int64_t blocks, int elements, double lr,
         double beta1, double beta2, double eps, double weight_decay, double max_norm, Address norm, Address scale,
         Address found_inf, Address skipped, int device, Address stream) {
        check_sizes("adamw_", {rows, blocks});
        check_addresses("adamw_", {factors});
        if (rows > 0) check_addresses("adamw_", {table});
        if (blocks > 0) check_addresses("adamw_", {lines});
        if ((table | lines | factors) % 16 != 0)
          throw std::invalid_argument("adamw_: table, lines and factors must begin on 16 bytes");
        if (elements != cuda::kAdamWElements)
          throw std::invalid_argument("adamw_: the table must be made for " + std::to_string(cuda::kAdamWElements) +
                                      " elements a block, got " + std::to_string(elements));
        cuda::adamw({pointer<const cuda::AdamWLine>(table), pointer<const int32_t>(lines), pointer<float>(factors),
                     rows, blocks, lr, beta1, beta2, eps, weight_decay, max_norm, pointer<const float>(norm),
                     pointer<const float>(scale), pointer<const float>(found_inf), pointer<float>(skipped)},
                    device, pointer(stream));
      },
      py::arg("table"), py::arg("lines"), py::arg("factors"), py::arg("rows"), py::arg("blocks"), py::arg("elements"),
      py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("max_norm"),
      py::arg("norm"), py::arg("scale"), py::arg("found_inf"), py::arg("skipped"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());

  bind_layerwise(m, "lamb_cuda", "lamb_", &cuda::lamb);
  bind_layerwise(m, "lans_cuda", "lans_", &cuda::lans);

  m.def(
      "cross_entropy_blocks_cuda",
      [](int64_t rows, int64_t vocabulary, int dtype, int device) {
        check_sizes("cross_entropy", {rows, vocabulary});
        return cuda::cross_entropy_blocks(rows, vocabulary, cuda_dtype("cross_entropy", dtype), device);
      },
      py::arg("rows"), py::arg("vocabulary"), py::arg("dtype"), py::arg("device"),
      "Rows of sums for cross_entropy_cuda; 0: it takes a row a block there, and no sums.");
  m.def(
      "cross_entropy_cuda",
      [](Address logits, Address labels, Address count, Address losses, Address correct, Address sums, int64_t rows,
         int64_t vocabulary, int64_t words, int64_t ignore_index, int64_t blocks, int dtype, bool gradient, bool add,
         int device, Address stream) {
        const char* op = "cross_entropy";
        check_sizes(op, {rows, vocabulary, words, vocabulary - words, blocks});
        const DType type = cuda_dtype(op, dtype);
        if (rows == 0) return;
        check_addresses(op, {logits, labels, count, losses});
        if (vocabulary == 0 || vocabulary % 16 != 0 || logits % 16 != 0)
          throw std::invalid_argument("cross_entropy: rows must be of 16, 32, ... words and begin on 16 bytes");
        if (blocks > 0 && (!gradient || correct != 0))
          throw std::invalid_argument("cross_entropy: blocks are for a gradient, and find no correct labels");
        if (blocks > 0 && cuda::cross_entropy_blocks(rows, vocabulary, type, device) == 0)
          throw std::invalid_argument("cross_entropy: a row of " + std::to_string(vocabulary) +
                                      " words does not fit into a block");
        if (blocks == 0 && sums != 0) throw std::invalid_argument("cross_entropy: sums are of blocks, got none");
        cuda::cross_entropy({pointer(logits), pointer<const int64_t>(labels), pointer<const float>(count),
                             pointer<float>(losses), pointer<bool>(correct), pointer<float>(sums), rows, vocabulary,
                             words, ignore_index, blocks, type, gradient, add},
                            device, pointer(stream));
      },
      py::arg("logits"), py::arg("labels"), py::arg("count"), py::arg("losses"), py::arg("correct"), py::arg("sums"),
      py::arg("rows"), py::arg("vocabulary"), py::arg("words"), py::arg("ignore_index"), py::arg("blocks"),
      py::arg("dtype"), py::arg("gradient"), py::arg("add"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());

  m.def("embedding_rows_bwd_workspace_cuda", &cuda::embedding_rows_bwd_workspace, py::arg("tokens"), py::arg("columns"),
        py::arg("device"), "Floats of workspace for embedding_rows_bwd_cuda.");
  m.def(
      "embedding_parts_cuda",
      [](int64_t tokens, int64_t columns, int) { return cuda::embedding_parts(tokens, columns); }, py::arg("tokens"),
      py::arg("columns"), py::arg("device"), "Floats of workspace for embedding_sums_cuda.");
  m.def(
      "embedding_fwd_cuda",
      [](const Triple& ids, const Triple& tables, const std::array<int64_t, kTables>& table_rows, int64_t tokens,
         int64_t columns, int table_dtype, int dtype, Address rng, uint32_t site, int threshold, Address weight,
         Address bias, Address y, Address mean, Address rstd, float eps, int device, Address stream) {
        const EmbeddingInputs in =
            embedding_cuda_inputs(ids, tables, table_rows, tokens, columns, table_dtype, dtype, rng, site, threshold);
        if (tokens == 0) return;
        check_addresses("embedding_layer_norm", {weight, bias, y});
        if ((mean == 0) != (rstd == 0)) throw std::invalid_argument("embedding_layer_norm: mean and rstd go together");
        cuda::embedding_fwd({in, pointer<const float>(weight), pointer<const float>(bias), eps, pointer(y),
                             pointer<float>(mean), pointer<float>(rstd), nullptr, 0},
                            device, pointer(stream));
      },
      EMBEDDING_ARGUMENTS, py::arg("bias"), py::arg("y"), py::arg("mean"), py::arg("rstd"), py::arg("eps"),
      py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "embedding_rows_bwd_cuda",
      [](const Triple& ids, const Triple& tables, const std::array<int64_t, kTables>& table_rows, int64_t tokens,
         int64_t columns, int table_dtype, int dtype, Address rng, uint32_t site, int threshold, Address weight,
         Address dy, Address mean, Address rstd, Address dz, Address dweight, Address dbias, Address workspace,
         int device, Address stream) {
        const EmbeddingInputs in =
            embedding_cuda_inputs(ids, tables, table_rows, tokens, columns, table_dtype, dtype, rng, site, threshold);
        check_addresses("embedding_layer_norm", {dweight, dbias});
        if (tokens > 0) check_addresses("embedding_layer_norm", {dy, weight, mean, rstd, dz, workspace});
        cuda::embedding_rows_bwd(
            {in, pointer(dy), pointer<const float>(weight), pointer<const float>(mean), pointer<const float>(rstd),
             pointer<float>(dz), pointer<float>(dweight), pointer<float>(dbias), pointer<float>(workspace)},
            device, pointer(stream));
      },
      EMBEDDING_ARGUMENTS, py::arg("dy"), py::arg("mean"), py::arg("rstd"), py::arg("dz"), py::arg("dweight"),
      py::arg("dbias"), py::arg("workspace"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "embedding_sums_cuda",
      [](const Triple& rows, const Triple& order, const std::array<bool, kTables>& narrow,
         const std::array<int64_t, kTables>& table_rows, const Triple& dtables, int64_t tokens, int64_t columns,
         int table_dtype, Address dz, Address parts, int device, Address stream) {
        const char* op = "embedding_layer_norm";
        check_sizes(op, {tokens, columns, table_rows[0], table_rows[1], table_rows[2]});
        if (tokens == 0 || columns == 0) return;
        check_addresses(op, {dz, parts});
        cuda::EmbeddingSums a;
        for (int i = 0; i < kTables; ++i) {
          check_addresses(op, {rows[i], order[i]});
          if (table_rows[i] > 0) check_addresses(op, {dtables[i]});
          a.rows[i] = pointer(rows[i]), a.order[i] = pointer<const int64_t>(order[i]), a.narrow[i] = narrow[i];
          a.table_rows[i] = table_rows[i], a.dtables[i] = pointer(dtables[i]);
        }
        a.table_dtype = cuda_dtype(op, table_dtype), a.tokens = tokens, a.columns = columns;
        a.pieces = embedding_pieces(tokens), a.dz = pointer<const float>(dz), a.parts = pointer<float>(parts);
        cuda::embedding_sums(a, device, pointer(stream));
      },
      py::arg("rows"), py::arg("order"), py::arg("narrow"), py::arg("table_rows"), py::arg("dtables"),
      py::arg("tokens"), py::arg("columns"), py::arg("table_dtype"), py::arg("dz"), py::arg("parts"), py::arg("device"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());
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
