"""An op is found by one stem: ops/<op>/, csrc/<op>/, python_tests/ops/test_<op>.py. And what may stand where in csrc."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
OPS = ROOT / "stackbert_kernels" / "ops"
STEMS = sorted(folder.name for folder in OPS.iterdir() if (folder / "op.py").exists())
SOURCES = sorted(file for file in CSRC.rglob("*") if file.suffix in {".h", ".cuh", ".cpp", ".cu"})


def code(file: Path) -> str:
    """Without comments: they may name what code may not use."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", file.read_text(), flags=re.DOTALL)


def test_there_are_ops_and_sources():
    assert "duplicate_layers" in STEMS and len(SOURCES) > 10


@pytest.mark.parametrize("stem", STEMS)
def test_files_of_an_op(stem):
    wanted = [
        *(OPS / stem / name for name in ("__init__.py", "op.py", "reference.py", "native.py")),
        *(CSRC / stem / name for name in (f"{stem}.h", f"{stem}_cpu.cpp")),
        ROOT / "python_tests" / "ops" / f"test_{stem}.py",
    ]
    missing = [str(file.relative_to(ROOT)) for file in wanted if not file.exists()]
    assert not missing, f"{stem}: wanted {', '.join(missing)}"


def test_nothing_in_ops_or_csrc_belongs_to_no_op():
    folders = {path.name for path in OPS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(STEMS)
    assert {path.name for path in CSRC.iterdir() if path.is_dir()} - set(STEMS) <= {"common", "simt"}
    doors = {"bindings.cpp", "bindings.h", "bindings_cuda.cpp"}
    assert {path.name for path in CSRC.iterdir() if path.is_file()} == doors


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(CSRC)))
def test_what_a_source_may_use(file):
    text = code(file)
    includes = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', text)
    assert not [name for name in includes if re.match(r"(torch|ATen|c10|caffe2)/", name)], "csrc knows no torch"
    if not file.name.startswith("bindings"):
        assert not [name for name in includes if name.startswith(("pybind11", "Python.h"))], (
            "Python stays in the bindings"
        )
    if file != CSRC / "common" / "ptx.cuh" and file.suffix in {".cu", ".cuh"}:
        assert not re.search(r"\basm\b", text), "inline PTX lives in common/ptx.cuh"
    if file.suffix in {".h", ".cuh"}:
        assert "#pragma once" in text


@pytest.mark.parametrize("file", [file for file in SOURCES if file.suffix == ".cu"], ids=lambda file: file.name)
def test_cuda_launches_are_checked_and_nothing_waits(file):
    text = code(file)
    assert file.name.endswith("_cuda.cu")
    assert "<<<" not in text, "kernels are launched by common/launch.cuh, which checks"
    assert not re.search(r"cuda(Device|Stream)Synchronize|cudaMalloc|cudaFree", text)


@pytest.mark.parametrize(
    "file", [file for file in SOURCES if file.name.endswith("_cuda.cu")], ids=lambda file: file.name
)
def test_every_way_in_asks_whether_the_device_is_one_it_was_built_for(file):
    """OnDevice refuses, before a launch, a device that no embedded architecture runs on."""
    for name, body in re.findall(
        r"^void (\w+)\([^)]*int device, void\* stream\) \{\n(.*?)^\}", code(file), re.DOTALL | re.MULTILINE
    ):
        before = re.split(r"\blaunch\(|\bwith_\w+\(|\bcolumn_sums<|\bsum_by_row<", body)[0]
        assert "const OnDevice on_device(" in before, f"{name} launches before it asks"
    assert "const OnDevice on_device(" in code(file) or "int device, void* stream)" not in code(file)
