"""Machine code of the Triton kernels without a GPU: registers, spills, shared memory, widths of loads and stores.

    python -m benchmarks.compiled [--op layer_norm ...] [--arch 80 90 100] [--json FILE]

Compiles every `compilations(arch)` of ops/*/triton_kernel.py ahead of time and reads the SASS with the tools inside Triton. Exit code 1
where a kernel breaks what its Compilation declares. python_tests/ops/test_triton_compile.py runs this.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import stackbert_kernels

from . import machine, machine_code, results_file

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program may have
OPS = Path(stackbert_kernels.__file__).parent / "ops"


def stems() -> list[str]:
    """The ops with a Triton implementation."""
    return sorted(file.parent.name for file in OPS.glob("*/triton_kernel.py"))


def compiled(compilation, arch: int) -> dict[str, object]:
    """One row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = compilation.kernel.arg_names
    multiples = [n for n, kind in compilation.signature.items() if isinstance(kind, str) and kind.endswith(":16")]
    types = {n: kind[:-3] if n in multiples else kind for n, kind in compilation.signature.items()}
    missing = set(names) - set(types) - set(compilation.constants)
    if missing:
        raise ValueError(f"{compilation.name}: neither type nor constant for {', '.join(sorted(missing))}")
    source = ASTSource(
        compilation.kernel,
        {name: types.get(name, "constexpr") for name in names},
        dict(compilation.constants),
        {(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    options = {name: getattr(compilation, name) for name in ("num_warps", "num_stages", "maxnreg")}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = _disassembled(binary.asm["cubin"])
    instructions = machine_code.instructions(sass)
    counts = collections.Counter(instruction.split(".")[0] for instruction in instructions)
    facts = machine_code.facts(instructions)
    row = {
        "kernel": compilation.name,
        "arch": arch,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": counts["STL"],
        "shared": binary.metadata.shared,
        **{name: facts[name] for name in ("instructions", "accesses", "products")},
        "narrow": sum(n for name, n in facts["accesses"].items() if machine_code.bits(name) < 128),
    }
    return row | {"broken": broken(compilation, row, counts)}


def broken(compilation, row: dict[str, object], counts: collections.Counter) -> list[str]:
    """What the machine code does not keep of what was declared."""
    found = []
    for what, limit in (
        ("registers", compilation.max_registers),
        ("spills", compilation.max_spills),
        ("narrow", compilation.max_narrow),
        ("shared", SHARED_MEMORY[row["arch"]]),
    ):
        if row[what] > limit:
            found.append(f"{what}: {row[what]}, at most {limit}")
    missing = [name for name in compilation.sass.get(row["arch"], ()) if not counts[name]]
    unwanted = [name for name in compilation.without.get(row["arch"], ()) if counts[name]]
    return found + [f"no {name}" for name in missing] + [f"{name}, not wanted" for name in unwanted]


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )


def table(ops: list[str], architectures: list[int]) -> list[dict[str, object]]:
    """Compiles in processes of their own, one a core. This one must not have been started with TRITON_INTERPRET."""
    kernels = [(stem, arch, i) for stem in ops for arch in architectures for i in range(len(_compilations(stem, arch)))]
    workers = min(os.cpu_count() or 1, len(kernels))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_row, *zip(*kernels, strict=True)))


def _row(stem: str, arch: int, i: int) -> dict[str, object]:
    """By name, since a kernel cannot be handed to another process."""
    return compiled(_compilations(stem, arch)[i], arch)


def _compilations(stem: str, arch: int) -> list:
    return import_module(f"stackbert_kernels.ops.{stem}.triton_kernel").compilations(arch)


def result(ops: list[str], rows: list[dict[str, object]]) -> dict[str, object]:
    """As a result file holds it."""
    facts = machine.machine("cpu")
    kept = {name: facts[name] for name in ("triton", "python", "date", "commit", "dirty")}
    return {
        "format": results_file.FORMAT,
        "kind": "compiled",
        "machine": {"device": "cuda", **kept},
        "sources": {stem: machine.digest(stem, "cuda") for stem in ops},
        "rows": rows,
    }


def render(rows: list[dict[str, object]]) -> str:
    lines = []
    width = max((len(row["kernel"]) for row in rows), default=0)
    for row in rows:
        accesses = ", ".join(f"{n} {name}" for name, n in row["accesses"].items())
        lines.append(
            f"{row['kernel']:{width}}  sm_{row['arch']:<3}  {row['registers']:3} registers  {row['spills']} spills  "
            f"{row['shared']:6} B shared  {row['instructions']:5} instructions  {accesses}"
        )
        lines += [f"  BROKEN: {reason}" for reason in row["broken"]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--op", nargs="+", choices=stems(), default=stems(), help="default: every op with Triton kernels"
    )
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", None):  # the kernels must be compiled, not interpreted
        return subprocess.run([sys.executable, "-m", f"{__package__}.compiled", *sys.argv[1:]]).returncode
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # today's compiler, not what an earlier one left
        rows = table(options.op, options.arch)
    print(render(rows))
    if options.json:
        results_file.write(options.json, result(options.op, rows))
    return 1 if any(row["broken"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
