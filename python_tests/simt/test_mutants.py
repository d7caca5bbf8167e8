"""Kernels with a planted fault, each of which the twin's tests must catch: otherwise the tests prove nothing.

A few run by default; `pytest --all-mutants` (`make test-all`) runs every one. A mutant is one edit of a copy of csrc/.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from simt import twin as host


class Mutant(NamedTuple):
    file: str  # in csrc/
    fault: str
    old: str  # occurs once
    new: str
    tests: str  # the file here that must fail
    quick: bool = False


COLUMN_SUMS = "common/column_sums.cuh"
LAYER_NORM = "layer_norm/layer_norm_cuda.cu"
FORWARD, BACKWARD = "attention/attention_forward_cuda.cu", "attention/attention_backward_cuda.cu"
ONE_TILE, GRADIENTS = "attention/attention_one_tile_backward_cuda.cu", "attention/backward.cuh"
TILES = "attention/tiles.cuh"
COLUMNS = "common/columns.cuh"
GELU = "gelu/gelu_cuda.cu"
DROPOUT = "dropout/dropout_cuda.cu"
DROPOUT_ADD = "layer_norm/dropout_add_cuda.cu"
EMBEDDING = "embedding/embedding_cuda.cu"
LOSS = "masked_lm_loss/masked_lm_loss_cuda.cu"
DUPLICATE = "duplicate_layers/duplicate_layers_cuda.cu"
OPTIMIZER, STEP, LAYERWISE = "optimizer/optimizer_cuda.cu", "optimizer/step.cuh", "optimizer/layerwise_cuda.cu"
MUTANTS = [
    Mutant("common/rows.cuh", "a sum over warps without its barrier", "    ptx::block_sync();\n    x = 0.f;", "    x = 0.f;",
           "test_layer_norm_cuda.py", quick=True),
    Mutant("common/rows.cuh", "a sum that misses a lane", "for (int lanes = 16; lanes > 0;", "for (int lanes = 8; lanes > 0;",
           "test_layer_norm_cuda.py"),
    Mutant("common/rows.cuh", "a mask shifted by a byte", "words.w[2 + i / 4]", "words.w[1 + i / 4]", "test_layer_norm_cuda.py"),
    Mutant("common/rows.cuh", "an element's halves swapped", "out[2 * i] = pair.low, out[2 * i + 1] = pair.high",
           "out[2 * i] = pair.high, out[2 * i + 1] = pair.low", "test_layer_norm_cuda.py"),
    Mutant(LAYER_NORM, "two sums in one scratch", "block_sum<R::kWarps>(square, scratch + R::kWarps)",
           "block_sum<R::kWarps>(square, scratch)", "test_layer_norm_cuda.py", quick=True),
    Mutant(LAYER_NORM, "partial sums without their barrier", "if (turn > 0) ptx::block_sync();", "", "test_layer_norm_cuda.py"),
    Mutant(LAYER_NORM, "a guard off by one row", "if (row >= a.sum.rows) return;", "if (row > a.sum.rows) return;",
           "test_layer_norm_cuda.py"),
    Mutant(LAYER_NORM, "a guard off by a vector", "if (tensor && R::column(v) < columns)", "if (tensor && R::column(v) <= columns)",
           "test_layer_norm_cuda.py"),
    Mutant(LAYER_NORM, "the longest rows of single elements cut off", "Row<T, 1, 22, 12>", "Row<T, 1, 21, 12>", "test_layer_norm_cuda.py"),
    Mutant(LAYER_NORM, "padding in the variance", "if (R::column(v) < a.sum.columns)\n#pragma unroll", "#pragma unroll",
           "test_layer_norm_cuda.py"),
    Mutant(LAYER_NORM, "a gradient without the mask", "kept >> e & 1 ? dz[i] * kept_scale : 0.f", "dz[i] * kept_scale",
           "test_layer_norm_cuda.py"),
    Mutant(COLUMN_SUMS, "the last partial sums left out", "b < a.blocks; b +=", "b < a.blocks - 1; b +=",
           "test_layer_norm_cuda.py"),
    Mutant(FORWARD, "keys read before their copies land", "ptx::wait_copies<kOneTile ? 1 : 3>();", "ptx::wait_copies<kOneTile ? 2 : 4>();",
           "test_attention_cuda.py", quick=True),
    Mutant(FORWARD, "a tile overwritten while it is read", "    if constexpr (!kOneTile) ptx::block_sync();", "    ",
           "test_attention_cuda.py"),
    Mutant(FORWARD, "the mask of the lower rows for the upper", "kept_of_row(key, of_keys, query + 8,", "kept_of_row(key, of_keys, query,",
           "test_attention_cuda.py"),
    Mutant(FORWARD, "a sum not rescaled", "sum[half] *= less;", "", "test_attention_cuda.py"),
    Mutant(FORWARD, "a key too many", "place.length - tile * kKeys);", "place.length - tile * kKeys + 1);", "test_attention_cuda.py"),
    Mutant(BACKWARD, "a mask bit shifted in dk and dv", ">> (own / 4 + g % 2)", ">> (own / 4)", "test_attention_cuda.py"),
    Mutant(GRADIENTS, "gradients without delta", " - delta[half]);", ");", "test_attention_cuda.py"),
    Mutant(GRADIENTS, "delta with the scale of what is kept", " * (static_cast<float>(256 - b.a.forward.threshold) / 256.f);", ";",
           "test_attention_cuda.py"),
    Mutant(ONE_TILE, "a gradient of values without the scale of what is kept", ", scale_all(dv, of_kept);", ";", "test_attention_cuda.py"),
    Mutant(BACKWARD, "a gradient of keys without the scale of what is kept", "scale_all(dk, a.scale * kept_scale(a))", "scale_all(dk, a.scale)",
           "test_attention_cuda.py"),
    Mutant(ONE_TILE, "scores written over keys that are still read", "  ptx::block_sync();  // keys and values are done with\n", "",
           "test_attention_cuda.py"),
    Mutant(BACKWARD, "padding left unwritten", "if (row >= place.length && row < end)", "if (row > place.length && row < end)",
           "test_attention_cuda.py"),
    Mutant(TILES, "a row too many copied", "row < rows ? data + row * from.token + c * 8 : data, row < rows)",
           "row <= rows ? data + row * from.token + c * 8 : data, row <= rows)", "test_attention_cuda.py", quick=True),
    Mutant(TILES, "a fragment's halves swapped", "return {{c[2 * i][0], c[2 * i][1], c[2 * i + 1][0], c[2 * i + 1][1]}};",
           "return {{c[2 * i][0], c[2 * i + 1][0], c[2 * i][1], c[2 * i + 1][1]}};", "test_attention_cuda.py"),
    Mutant(TILES, "a swizzle that reading does not know", "kChunks >= 8 ? row % 8 : row / 2 % 4", "ptx::lane() % 2", "test_attention_cuda.py"),
    Mutant(COLUMNS, "a block's sums without their barrier", "    ptx::block_sync();\n", "", "test_gelu_cuda.py", quick=True),
    Mutant(COLUMNS, "a block's last row left out of its sums", "below < tiling.down; ++below", "below < tiling.down - 1; ++below",
           "test_gelu_cuda.py"),
    Mutant(COLUMNS, "sums past the last column", "if (row > 0 || column >= columns) return;", "if (row > 0) return;",
           "test_gelu_cuda.py"),
    Mutant(COLUMNS, "partial sums on top of each other", "store_parameters<kWidth>(partials + static_cast<int64_t>(blockIdx.x / tiling.tiles)",
           "store_parameters<kWidth>(partials + static_cast<int64_t>(blockIdx.x / 2 / tiling.tiles)", "test_gelu_cuda.py"),
    Mutant(GELU, "a guard off by one row", "if (row < rows) in[r] = Vector::load(x + row * columns);",
           "if (row <= rows) in[r] = Vector::load(x + row * columns);", "test_gelu_cuda.py"),
    Mutant(GELU, "a row's gradient left out of the sum", "dbias[i] += down[i];", "if (r == 0) dbias[i] += down[i];", "test_gelu_cuda.py"),
    Mutant(GELU, "the slope without its bell", "return tail - a * (kBell * bell);", "return tail;", "test_gelu_cuda.py"),
    Mutant(GELU, "the tail in 16 bits a thousandth too large", "p = p * a - 0.999990463f;", "p = p * a - 0.998548464f;",
           "test_gelu_cuda.py", quick=True),
    Mutant(GELU, "the larger square first", "(a * (a * weighed))", "(a * a * weighed)", "test_gelu_cuda.py"),
    Mutant(DROPOUT, "the mask of the first row for all", "drop<kWidth>(key, row,", "drop<kWidth>(key, first,", "test_dropout_cuda.py",
           quick=True),
    Mutant(DROPOUT, "a guard off by one column", "if (c >= columns) return;", "if (c > columns) return;", "test_dropout_cuda.py"),
    Mutant(DROPOUT_ADD, "the bias past the mask", "out[i] += bias[i];", "other[i] += bias[i];", "test_dropout_cuda.py"),
    Mutant(DROPOUT_ADD, "a sum of what the mask takes out", "      if (a.op.threshold > 0) drop<kWidth>(key, row, static_cast<int>(c), a.op.threshold, scale, down);\n#pragma unroll\n      for (int i = 0; i < kWidth; ++i) dx_bias[i] += down[i];",
           "#pragma unroll\n      for (int i = 0; i < kWidth; ++i) dx_bias[i] += down[i];\n      if (a.op.threshold > 0) drop<kWidth>(key, row, static_cast<int>(c), a.op.threshold, scale, down);", "test_dropout_cuda.py"),
    Mutant(DROPOUT_ADD, "threads past the last column", "c < columns ? a.op.rows : 0", "a.op.rows", "test_dropout_cuda.py"),
    Mutant(DUPLICATE, "rows first to last", "for (int64_t i = a.n - 1; i >= 0; --i)", "for (int64_t i = 0; i < a.n; ++i)",
           "test_duplicate_layers_cuda.py", quick=True),
    Mutant(DUPLICATE, "a copy one element too long", "if (c < bank.columns) ptx::store", "if (c <= bank.columns) ptx::store",
           "test_duplicate_layers_cuda.py"),
    Mutant(DUPLICATE, "a vector left out", "const int64_t a_block = kThreads * kVectors;",
           "const int64_t a_block = kThreads * kVectors + 1;", "test_duplicate_layers_cuda.py"),
    Mutant(DUPLICATE, "a bank's first block taken by the one before", "blockIdx.x) >= a.banks[b + 1].first)",
           "blockIdx.x) > a.banks[b + 1].first)", "test_duplicate_layers_cuda.py"),
    Mutant(DUPLICATE, "units wider than a row's end", "(bank.row_bytes | bank.row_stride)", "(bank.row_stride)",
           "test_duplicate_layers_cuda.py"),
    Mutant(STEP, "a norm that misses the end of a tensor", "e < kElements && e < left;", "e < kElements && e < left - 1;",
           "test_optimizer_cuda.py"),
    Mutant(STEP, "a norm that misses the last block", "for (int64_t i = threadIdx.x; i < count;", "for (int64_t i = threadIdx.x; i < count - 1;",
           "test_optimizer_cuda.py"),
    Mutant(OPTIMIZER, "a partial sum by every thread", "if (threadIdx.x == 0) ptx::store(a.partials", "ptx::store(a.partials", "test_optimizer_cuda.py"),
    Mutant(OPTIMIZER, "decay off by one", "k < decays ? a.kept", "k <= decays ? a.kept", "test_optimizer_cuda.py"),
    Mutant(OPTIMIZER, "the correction of the next step", "n = static_cast<int64_t>(step);", "n = static_cast<int64_t>(step) + 1;",
           "test_optimizer_cuda.py"),
    Mutant(OPTIMIZER, "whole blocks at any address", "  if (block < line.wide) {\n    Values<4> values[kVectors];", "  if (line.size - first >= kAdamWElements) {\n    Values<4> values[kVectors];",
           "test_optimizer_cuda.py", quick=True),
    Mutant(OPTIMIZER, "the end of a tensor off by one", "? static_cast<int>(left) :", "? static_cast<int>(left) + 1 :",
           "test_optimizer_cuda.py"),
    Mutant(OPTIMIZER, "a skipped step taken", "if (all.second != 0.f) return;", "", "test_optimizer_cuda.py"),
    Mutant(STEP, "NaN taken for finite", "norm > -kInfinity && norm < kInfinity", "!(norm <= -kInfinity) && !(norm >= kInfinity)",
           "test_optimizer_cuda.py"),
    Mutant(STEP, "a copy's elements swapped", "ptx::pack<bfloat16>(w.v[0], w.v[1])", "ptx::pack<bfloat16>(w.v[1], w.v[0])",
           "test_optimizer_cuda.py"),
    Mutant(OPTIMIZER, "blocks counted from the beginning of the table", "static_cast<int64_t>(blockIdx.x) - line.first, first = block * kAdamWElements;",
           "static_cast<int64_t>(blockIdx.x), first = block * kAdamWElements;", "test_optimizer_cuda.py"),
    Mutant(LAYERWISE, "two sums in one scratch", "block_sum<kWarps>(sums.r, scratch + kWarps)", "block_sum<kWarps>(sums.r, scratch)",
           "test_layerwise_cuda.py", quick=True),
    Mutant(LAYERWISE, "the directions' squares over the weights'", "ptx::store(a.partials + a.blocks + blockIdx.x, r);", "ptx::store(a.partials + blockIdx.x, r);",
           "test_layerwise_cuda.py"),
    Mutant(LAYERWISE, "a step counted by every part of a row", "if (line.flags & kCounts) ptx::store(line.step,", "ptx::store(line.step,",
           "test_layerwise_cuda.py"),
    Mutant(LAYERWISE, "the sums of the first part for all", "const partials = a.partials + line.first;", "const partials = a.partials;",
           "test_layerwise_cuda.py"),
    Mutant(LAYERWISE, "a ratio for biases and norms", "defined = adapted && weights > 0.f", "defined = weights > 0.f", "test_layerwise_cuda.py"),
    Mutant(LAYERWISE, "a gradient's norm without its scale", "ptx::square_root(squares) * gradient;", "ptx::square_root(squares);",
           "test_layerwise_cuda.py"),
    Mutant(LAYERWISE, "whole blocks at any address", "  if (block < line.wide) {", "  if (line.size - first >= kPartElements) {",
           "test_layerwise_cuda.py"),
    Mutant(LAYERWISE, "the end of a part off by one", "? static_cast<int>(left) :", "? static_cast<int>(left) + 1 :", "test_layerwise_cuda.py"),
    Mutant(LAYERWISE, "moments of a skipped step", "if (f.skip != 0.f) return;\n  const PartLine line", "const PartLine line",
           "test_layerwise_cuda.py"),
    Mutant(LAYERWISE, "the gradient as it was read", "change += (g.v[k] * f.gradient / divisor", "change += (g.v[k] / divisor",
           "test_layerwise_cuda.py"),
    Mutant(LAYERWISE, "the correction of the next step", "(ptx::load(line.step)) + 1;", "(ptx::load(line.step)) + 2;", "test_layerwise_cuda.py"),
    Mutant(LOSS, "copies not waited for", "    ptx::wait_copies<0>();\n", "", "test_masked_lm_loss_cuda.py", quick=True),
    Mutant(LOSS, "a block's sum without its barrier", "scratch.store(ptx::warp(), p);\n  ptx::block_sync();",
           "scratch.store(ptx::warp(), p);", "test_masked_lm_loss_cuda.py"),
    Mutant(LOSS, "two rows in one scratch", "scratch + turn * kWarps", "scratch", "test_masked_lm_loss_cuda.py"),
    Mutant(LOSS, "the next row copied over the present one", "(turn ^ 1) * t.buffer_bytes", "turn * t.buffer_bytes",
           "test_masked_lm_loss_cuda.py"),
    Mutant(LOSS, "a label in the padding", "label < a.words", "label < a.vocabulary", "test_masked_lm_loss_cuda.py"),
    Mutant(LOSS, "a guard off by a vector", "if (c >= vocabulary) continue;", "if (c > vocabulary) continue;",
           "test_masked_lm_loss_cuda.py"),
    Mutant(LOSS, "the label's gradient one word late", "i == label ? weight_", "i == label + 1 ? weight_",
           "test_masked_lm_loss_cuda.py"),
    Mutant(LOSS, "sums of earlier chunks forgotten", "if (a.add && sums", "if (!a.add && sums", "test_masked_lm_loss_cuda.py"),
    Mutant(LOSS, "sums relative to different maxima", "warp_sum(p.total * Exponent<T>::ratio(p.top, top))", "warp_sum(p.total)",
           "test_masked_lm_loss_cuda.py"),
    Mutant(LOSS, "an equal word ahead of itself", "c + i < label", "c + i <= label", "test_masked_lm_loss_cuda.py"),
    Mutant(EMBEDDING, "an index past the table", "rows[i] < a.table_rows[i]", "rows[i] <= a.table_rows[i]", "test_embedding_cuda.py"),
    Mutant(EMBEDDING, "a row past the table gets a gradient", "row < a.table_rows[table]", "row <= a.table_rows[table]", "test_embedding_cuda.py"),
    Mutant(EMBEDDING, "a gradient without the mask", "if (a.in.threshold > 0) dy[e] *= kept >> i & 1 ? scale : 0.f;", "", "test_embedding_cuda.py"),
    Mutant(EMBEDDING, "two sums in one scratch", "block_sum<R::kWarps>(of_gn, scratch + R::kWarps)",
           "block_sum<R::kWarps>(of_gn, scratch)", "test_embedding_cuda.py"),
    Mutant(EMBEDDING, "a head taken for a whole row", "if (in_head || goes_on)", "if (goes_on)", "test_embedding_cuda.py", quick=True),
    Mutant(EMBEDDING, "a tail taken for a head", "store(p.part(p.piece, !in_head))", "store(p.part(p.piece, false))", "test_embedding_cuda.py"),
    Mutant(EMBEDDING, "a row that never begins", "total[i] = begins ? x[i] : total[i] + x[i]", "total[i] += x[i]", "test_embedding_cuda.py"),
    Mutant(EMBEDDING, "a row joined by every piece that it crosses", "(p.from_before() && p.row(p.first) == row) || ", "", "test_embedding_cuda.py"),
    Mutant(EMBEDDING, "heads joined without a barrier", "Vector::from_floats(total).raw);\n  ptx::block_sync();",
           "Vector::from_floats(total).raw);", "test_embedding_cuda.py"),
    Mutant(EMBEDDING, "heads beyond the first turn forgotten", "more = goes_on[kAhead - 1];", "more = false;", "test_embedding_cuda.py"),
    Mutant(EMBEDDING, "padding in the variance", "if (R::column(v) < a.in.columns)\n#pragma unroll", "#pragma unroll", "test_embedding_cuda.py"),
]  # fmt: skip


def caught(folder: Path, mutant: Mutant) -> subprocess.CompletedProcess:
    """The mutant built from the copy in `folder`, and its tests run on it. The copy is whole again afterwards."""
    file = folder / "csrc" / mutant.file
    whole = file.read_text()
    assert whole.count(mutant.old) == 1, (
        f"{mutant.file}: wanted once, found {whole.count(mutant.old)} times: {mutant.old}"
    )
    file.write_text(whole.replace(mutant.old, mutant.new))
    try:
        built = host.build(folder / "build", folder / "csrc")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--twin={built}"]
        return subprocess.run(
            [*command, host.ROOT / "python_tests/simt" / mutant.tests], capture_output=True, text=True, cwd=host.ROOT
        )
    finally:
        file.write_text(whole)


@pytest.fixture(scope="module")
def folder(twin):
    """A copy of the sources, with the build of the whole ones to start from."""
    folder = host.ROOT / "build" / "simt-mutants"
    shutil.rmtree(folder / "csrc", ignore_errors=True)
    shutil.copytree(
        host.ROOT / "csrc", folder / "csrc"
    )  # with the files' times: what did not change is not compiled again
    return folder


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{Path(mutant.file).stem}: {mutant.fault}")
def test_caught(folder, mutant, request):
    if not mutant.quick and not request.config.getoption("--all-mutants"):
        pytest.skip("one of a few by default; --all-mutants runs them all")
    ran = caught(folder, mutant)
    assert ran.returncode == 1, f"not caught:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}"
