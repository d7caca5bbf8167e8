"""Every Triton kernel at BERT's shapes, compiled ahead of time for sm_80, sm_90 and sm_100: what its Compilation declares holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
from benchmarks import compiled  # noqa: E402

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_some_ops_have_kernels():
    assert "dropout" in compiled.stems()


@pytest.mark.slow
@pytest.mark.parametrize("stem", compiled.stems())
def test_machine_code(stem, tmp_path):
    done = run("--op", stem, "--json", str(tmp_path / "table.json"))
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["arch"] for row in rows} == set(compiled.ARCHITECTURES)
    assert all(row["accesses"] for row in rows)


def test_one_kernel(tmp_path):
    """The quick one, of those that are not marked slow."""
    done = run("--op", "dropout", "--arch", "90", "--json", str(tmp_path / "table.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert len(rows) == 3 and all(row["spills"] == 0 and 0 < row["registers"] <= 64 for row in rows)
    assert "dropout 768 bf16" in done.stdout and "LDG.E.128" in done.stdout


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"registers": 65}, "registers: 65, at most 64"),
        ({"spills": 1}, "spills: 1, at most 0"),
        ({"narrow": 3}, "narrow: 3, at most 2"),
        ({"shared": 300 << 10}, "shared: 307200, at most 232448"),
        ({"HGMMA": 0}, "no HGMMA"),
        ({"STSM": 2}, "STSM, not wanted"),
    ],
)
def test_what_breaks_a_declaration_is_found(found, message):
    from stackbert_kernels.ops._triton import Compilation

    declared = Compilation(
        "k", None, {}, {}, max_registers=64, max_narrow=2, sass={90: ("HGMMA",)}, without={90: ("STSM",)}
    )
    fine = {"arch": 90, "registers": 64, "spills": 0, "narrow": 2, "shared": 0}
    assert compiled.broken(declared, fine, Counter(HGMMA=1)) == []
    counts = Counter(HGMMA=found.get("HGMMA", 1), STSM=found.get("STSM", 0))
    assert compiled.broken(declared, fine | found, counts) == [message]


def test_an_argument_without_type_is_an_error():
    code = (
        "from dataclasses import replace; from benchmarks import compiled;"
        "from stackbert_kernels.ops.dropout.triton_kernel import compilations;"
        "compiled.compiled(replace(compilations(90)[0], signature={}), 90)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "dropout 768 bf16: neither type nor constant for rng_ptr, rows" in done.stderr
