"""Which part may import which: the table of DESIGN.md section 2, held against every file, imports inside functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stackbert_kernels

PACKAGE = Path(stackbert_kernels.__file__).parent
NAME = "stackbert_kernels"
EVERYTHING = None

MAY_IMPORT: dict[str, set[str] | None] = {
    "__main__": {"cli"},
    "cli": EVERYTHING,
    "doctor": EVERYTHING,
    "demo": EVERYTHING,
    # What it reads is what train writes: one reader of a run directory, for the report and the comparison.
    "compare": {"config", "plan", "train"},
    "sweep": {"config", "recipes", "plan", "data", "train", "compare"},
    "patch": {"nn", "ops"},
    "hf": {"config", "growth", "model", "ops"},
    "nn": {"ops"},
    "train": {"config", "plan", "growth", "model", "data", "ops"},
    "recipes": {"config"},
    "plan": {"config"},
    "growth": {"config", "model", "ops"},
    "model": {"config", "ops"},
    "data": {"config"},
    "ops": {"_C"},
    "config": set(),
}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(source: str, package: str) -> set[str]:
    """The parts of ours that a module of `package` imports. Names of the top package that are no part, as __version__, count as none."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            modules |= {f"{base}.{alias.name}" for alias in node.names}
    paths = [module.split(".") for module in modules]
    parts = {path[1] for path in paths if path[0] == NAME and len(path) > 1}
    assert [NAME] not in paths, "import the part that is meant, not the whole package"
    return {part for part in parts if part == "_C" or (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()}


def test_the_reader_sees_every_way_to_import():
    source = """
import torch, stackbert_kernels.train.loop
from stackbert_kernels import ops as o, _C, __version__
from stackbert_kernels.plan import Span
def late():
    from ..config import Stage
    from . import bank
    from .. import recipes
"""
    assert imported_parts(source, f"{NAME}.model") == {"train", "ops", "_C", "plan", "config", "model", "recipes"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports(file):
    part = part_of(file)
    package = ".".join([NAME, *file.relative_to(PACKAGE).parent.parts])
    found = imported_parts(file.read_text(), package)
    if file == PACKAGE / "__init__.py":
        assert not found, "the package imports nothing of ours until it is asked for"
        return
    assert part in MAY_IMPORT, f"{part} is new: say in the table what it may import"
    allowed = MAY_IMPORT[part]
    extra = set() if allowed is EVERYTHING else found - allowed - {part}
    assert not extra, f"{file.relative_to(PACKAGE)}: {part} must not import {', '.join(sorted(extra))}"


@pytest.mark.parametrize("part", ["config", "recipes", "plan"])
def test_what_decides_a_run_loads_nothing_heavy(part):
    """A wrong option is refused before torch is loaded."""
    heavy = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "matplotlib")
    code = f"import sys, {NAME}.{part}; print(*[name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert ran.stdout.split() == []


@pytest.mark.parametrize("name", stackbert_kernels.__all__)
def test_public_names(name):
    assert getattr(stackbert_kernels, name) is not None and name in dir(stackbert_kernels)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'bert'"):
        _ = stackbert_kernels.bert
