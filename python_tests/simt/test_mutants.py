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
ATTENTION, TILES = "attention/attention_cuda.cu", "attention/tiles.cuh"
DUPLICATE = "duplicate_layers/duplicate_layers_cuda.cu"
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
    Mutant(LAYER_NORM, "padding in the variance", "if (R::column(v) < a.sum.columns)\n#pragma unroll", "#pragma unroll",
           "test_layer_norm_cuda.py"),
    Mutant(LAYER_NORM, "a gradient without the mask", "kept >> e & 1 ? dz[i] * kept_scale : 0.f", "dz[i] * kept_scale",
           "test_layer_norm_cuda.py"),
    Mutant(COLUMN_SUMS, "the last partial sums left out", "b < a.blocks; b +=", "b < a.blocks - 1; b +=",
           "test_layer_norm_cuda.py"),
    Mutant(ATTENTION, "keys read before their copies land", "ptx::wait_copies<kOneTile ? 1 : 3>();", "ptx::wait_copies<kOneTile ? 2 : 4>();",
           "test_attention_cuda.py", quick=True),
    Mutant(ATTENTION, "a tile overwritten while it is read", "    if constexpr (!kOneTile) ptx::block_sync();", "    ",
           "test_attention_cuda.py"),
    Mutant(ATTENTION, "the mask of the lower rows for the upper", "kept_of_row(key, of_keys, query + 8,", "kept_of_row(key, of_keys, query,",
           "test_attention_cuda.py"),
    Mutant(ATTENTION, "a sum not rescaled", "sum[half] *= less;", "", "test_attention_cuda.py"),
    Mutant(ATTENTION, "a key too many", "place.length - tile * kKeys);", "place.length - tile * kKeys + 1);", "test_attention_cuda.py"),
    Mutant(ATTENTION, "a mask bit shifted in dk and dv", ">> (own / 4 + g % 2)", ">> (own / 4)", "test_attention_cuda.py"),
    Mutant(ATTENTION, "gradients without delta", "factor - delta[half])", "factor)", "test_attention_cuda.py"),
    Mutant(ATTENTION, "scores written over keys that are still read", "  ptx::block_sync();  // keys and values are done with\n", "",
           "test_attention_cuda.py"),
    Mutant(ATTENTION, "padding left unwritten", "if (row >= place.length && row < end)", "if (row > place.length && row < end)",
           "test_attention_cuda.py"),
    Mutant(TILES, "a row too many copied", "row < rows ? data + row * from.token + c * 8 : data, row < rows)",
           "row <= rows ? data + row * from.token + c * 8 : data, row <= rows)", "test_attention_cuda.py", quick=True),
    Mutant(TILES, "a fragment's halves swapped", "return {{c[2 * i][0], c[2 * i][1], c[2 * i + 1][0], c[2 * i + 1][1]}};",
           "return {{c[2 * i][0], c[2 * i + 1][0], c[2 * i][1], c[2 * i + 1][1]}};", "test_attention_cuda.py"),
    Mutant(TILES, "a swizzle that reading does not know", "kChunks >= 8 ? row % 8 : row / 2 % 4", "ptx::lane() % 2", "test_attention_cuda.py"),
    Mutant(DUPLICATE, "rows first to last", "for (int64_t i = a.n - 1; i >= 0; --i)", "for (int64_t i = 0; i < a.n; ++i)",
           "test_duplicate_layers_cuda.py", quick=True),
    Mutant(DUPLICATE, "a copy one element too long", "if (c < a.columns) ptx::store", "if (c <= a.columns) ptx::store",
           "test_duplicate_layers_cuda.py"),
    Mutant(DUPLICATE, "a vector left out", "const int64_t a_block = kThreads * kVectors;",
           "const int64_t a_block = kThreads * kVectors + 1;", "test_duplicate_layers_cuda.py"),
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
