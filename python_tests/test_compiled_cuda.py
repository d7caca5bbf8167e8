"""The CUDA kernels as they were compiled: every one within its bounds, on every architecture that the module holds."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import compiled_cuda, machine_code
from benchmarks.gpu import build
from stackbert_kernels import _C

ROOT = Path(__file__).parents[1]
NVCC, WHY_NO_NVCC = build.setup_module(ROOT).find_nvcc(os.environ)
# Architectures that the module has machine code for, not PTX alone.
ARCHS = [entry.partition("-")[0] for entry in _C.cuda_archs() if not entry.endswith("-virtual")]
WHY_NOT = (
    _C.build_info()["why_no_cuda"]
    or (None if ARCHS else "built as PTX alone")
    or (None if machine_code.cuda_tool("cuobjdump") else "no cuobjdump on PATH or in Triton")
)
built = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture(scope="module")
def rows():
    """Of the module that was built; instructions of one architecture before sm_90 and of one from there on, where it has them."""
    before = [arch for arch in ARCHS if compiled_cuda.order(arch) < (90, "")]
    return compiled_cuda.table(Path(_C.__file__), [*before[:1], *[arch for arch in ARCHS if arch not in before][:1]])


@built
def test_every_kernel_is_within_its_bounds(rows):
    wrong = [f"{row['kernel']} sm_{row['arch']}: {reason}" for row in rows for reason in row["broken"]]
    assert not wrong, "\n".join(wrong)


@built
def test_every_kernel_is_there_for_every_architecture(rows):
    sources = "".join(file.read_text() for file in (ROOT / "csrc").rglob("*.cu*"))
    declared = set(re.findall(r"(\w+)\(const __grid_constant__", sources))
    assert declared == {row["kernel"].partition("<")[0] for row in rows}
    for arch in ARCHS:
        assert {row["kernel"] for row in rows if row["arch"] == arch} == {row["kernel"] for row in rows}, arch


@built
def test_every_bound_is_of_a_kernel_and_instructions_were_read(rows):
    names = {row["kernel"] for row in rows}
    assert [b.kernel for b in compiled_cuda.BOUNDS if not any(re.fullmatch(b.kernel, name) for name in names)] == []
    assert any("accesses" in row for row in rows)
    assert all(sum(row["accesses"].values()) and row["instructions"] > 20 for row in rows if "accesses" in row)


@pytest.mark.skipif(NVCC is None or WHY_NOT is not None, reason=str(WHY_NO_NVCC or WHY_NOT))
def test_what_too_few_registers_do_is_seen(tmp_path):
    """dropout, compiled for 16 registers less than it needs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NVCC_")}
    source = (ROOT / "csrc/dropout/dropout_cuda.cu").read_text().replace("__launch_bounds__(kTilingThreads, 2)", "")
    file = tmp_path / "dropout_cuda.cu"
    file.write_text(source)
    command = [NVCC, "-O3", "-std=c++17", "-arch=sm_80", "-maxrregcount=40", f"-I{ROOT / 'csrc'}", "-c", file]
    command += ['-DSTACKBERT_CUDA_ARCHS="80-real"', "-o", tmp_path / "x.o"]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    rows = compiled_cuda.table(tmp_path / "x.o", ["80"])
    found = {row["kernel"]: row["broken"] for row in rows}
    assert len(found) == 6 and all(row["registers"] <= 40 for row in rows)
    stack, local = found["dropout_kernel<bfloat16, 8>"]
    assert re.fullmatch(r"stack: \d+, at most 0", stack) and re.fullmatch(r"local: \d+, at most 0", local)


FINE = {
    "kernel": "attention_dq_kernel<bfloat16, 64>", "arch": "90a", "registers": 168, "stack": 0, "shared": 1024, "local": 0,
    "accesses": {"LDGSTS.E.BYPASS.LTC128B.128": 8, "LDG.E": 2, "STG.E.128": 4}, "products": {"HMMA": 64},
}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "messages"),
    [
        ({}, []),
        ({"registers": 169}, ["registers: 169, at most 168"]),
        ({"registers": 169, "arch": "120a"}, []),
        ({"stack": 8}, ["stack: 8, at most 0"]),
        ({"shared": 2048}, ["shared: 2048, at most 1024"]),
        ({"arch": "80"}, ["shared: 1024, at most 0"]),
        ({"local": 2}, ["local: 2, at most 0"]),
        ({"products": {}}, ["no products by matrix units"]),
        ({"accesses": {"LDG.E.128": 1, "STG.E.64": 1}}, ["no stores of 16 bytes"]),
        (
            {"accesses": FINE["accesses"] | {"LDG.E.U8": 16, "STG.E.U16": 1}},
            ["16 LDG.E.U8, 1 STG.E.U16: at least 32 bits"],
        ),
    ],
)
def test_what_breaks_a_bound_is_found(found, messages):
    assert compiled_cuda.broken(FINE | found) == messages


def test_a_new_kernel_is_held_to_something():
    new = FINE | {"kernel": "lamb_kernel", "registers": 129, "accesses": {"LDG.E.U8": 1}, "products": {}}
    assert compiled_cuda.broken(new) == ["registers: 129, at most 128", "1 LDG.E.U8: at least 16 bits"]
    wide = new | {"kernel": "lamb_kernel<float, 4>", "registers": 128, "accesses": {"LDG.E": 1}}
    assert compiled_cuda.broken(wide) == ["no loads of 16 bytes", "no stores of 16 bytes"]


@pytest.mark.parametrize(
    ("access", "bits"),
    [("LDG.E", 32), ("LDG.E.U16.CONSTANT", 16), ("STG.E.EF.128", 128), ("LDGSTS.E.BYPASS.LTC128B.128", 128), ("LD.E.S8", 8), ("STG.E.64", 64)],
)  # fmt: skip
def test_width_of_an_access(access, bits):
    assert machine_code.bits(access) == bits


def test_a_file_without_machine_code(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_cuda, "cuobjdump", lambda *arguments: "")
    with pytest.raises(compiled_cuda.Unreadable, match="holds no machine code"):
        compiled_cuda.table(tmp_path / "module.so")
