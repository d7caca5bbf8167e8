"""Machine code of the CUDA kernels in the compiled module: registers, stack, shared memory, widths of loads and stores, matrix units.

    python -m benchmarks.compiled_cuda [--module FILE] [--sass 80 90a] [--json FILE]

Every kernel for every architecture that the module holds machine code of. Instructions are read for those of --sass alone, which takes
seconds each. Exit code 1 where a kernel breaks its bounds. python_tests/test_compiled_cuda.py runs this on the module that was built.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import machine, machine_code, results_file

SASS = ("80", "90a")
REGISTERS = 64 << 10  # of a multiprocessor
SYSTEM = 1 << 10  # bytes of shared memory that the system has of each block from sm_90 on


class Unreadable(RuntimeError):
    """Why there is no machine code to look at, in one line."""


@dataclass(frozen=True)
class Bounds:
    """What the machine code of a kernel has to keep. No kernel has a stack: no register is spilled, no array lies in local memory."""

    kernel: str  # matches the whole of a readable name
    threads: int = 256  # of a block
    blocks: int = 2  # that the registers of a multiprocessor hold at once
    shared: int = 0  # bytes besides those that a launch asks for
    wide: tuple[str, ...] = ()  # which of loads and stores there have to be by 16 bytes
    narrowest: int = 16  # bits of an access
    products: bool = False  # by matrix units
    archs: str = r"\w+"  # matches the whole of an architecture that it is for

    @property
    def registers(self) -> int:
        """Of a thread: they are given out by 8."""
        return min(255, REGISTERS // (self.threads * self.blocks) // 8 * 8)


BOTH, LOADS, STORES = ("loads", "stores"), ("loads",), ("stores",)
ROOMY = r"80|(9|10)\d\w*"  # architectures with more shared memory than 100 KB a multiprocessor
VECTORS = r"[48]\b.*>"  # elements of 16 bytes: a kernel's template argument
# The first that fits a kernel's name holds for it; the last two fit every name, so that a new kernel is held to something.
BOUNDS = (
    Bounds(r"attention_forward_kernel<\w+, (32|64), .*", wide=BOTH, narrowest=32, products=True),
    Bounds(r"attention_forward_kernel<\w+, 128, .*", blocks=1, wide=BOTH, narrowest=32, products=True),
    # Where the shared memory of more blocks does not fit a multiprocessor, fewer may have its registers.
    Bounds(r"attention_one_tile_backward_kernel<\w+, 32>", wide=BOTH, narrowest=32, products=True, archs="80"),
    Bounds(r"attention_one_tile_backward_kernel<.*", wide=BOTH, narrowest=32, products=True, archs=r"(9|10)\d\w*"),
    Bounds(r"attention_one_tile_backward_kernel<.*", blocks=1, wide=BOTH, narrowest=32, products=True),
    Bounds(r"attention_d(q|kv)_kernel<\w+, 32>", 128, 3, wide=BOTH, narrowest=32, products=True),
    Bounds(r"attention_d(q|kv)_kernel<\w+, 64>", 128, 3, wide=BOTH, narrowest=32, products=True, archs=ROOMY),
    Bounds(r"attention_d(q|kv)_kernel<.*", 128, wide=BOTH, narrowest=32, products=True),
    Bounds(r"layer_norm_bwd_kernel<Row<\w+, 8, 3, 1>>", threads=128, blocks=3, wide=BOTH, narrowest=32),
    Bounds(r"layer_norm_bwd_kernel<Row<\w+, [48], \d, [12]>>", threads=128, wide=BOTH, narrowest=32),
    Bounds(r"layer_norm_bwd_kernel<Row<\w+, [48], \d, 8>>", blocks=1, wide=BOTH, narrowest=32),
    Bounds(r"layer_norm_bwd_kernel<Row<\w+, 4, \d, 16>>", threads=512, blocks=1, wide=BOTH, narrowest=32),
    Bounds(r"layer_norm_bwd_kernel<Row<\w+, 1, 22, 12>>", threads=384, blocks=1),
    Bounds(r"(bias_gelu|dropout|dropout_add)_(fwd_|bwd_)?kernel<\w+, " + VECTORS, threads=512, wide=BOTH, narrowest=32),
    Bounds(r"(bias_gelu|dropout|dropout_add)_(fwd_|bwd_)?kernel<.*", threads=512),
    Bounds(r"embedding_fwd_kernel<Row<8, 3, 1>>", blocks=4, wide=BOTH, narrowest=32),
    Bounds(r"embedding_bwd_kernel<Row<8, 1, 3>>", threads=96, blocks=8, wide=BOTH, narrowest=32),
    Bounds(r"embedding_bwd_kernel<Row<8, 1, 4>>", threads=128, blocks=8, wide=BOTH, narrowest=32),
    Bounds(r"sum_pieces_kernel<.*", threads=128, blocks=5),  # indices of rows may have 16 bits
    Bounds(r"(join_pieces|column_sums)_kernel<.*", blocks=4),
    Bounds(r"cross_entropy_kernel<.*", threads=512, blocks=1, wide=BOTH),
    Bounds(r"cross_entropy_row_kernel<.*", wide=BOTH, narrowest=8),  # which predictions are right: a byte a row
    Bounds(r"duplicate_layers_kernel", blocks=4, wide=BOTH, narrowest=8),  # rows of any bytes
    Bounds(r"squares_kernel", blocks=4, wide=LOADS),
    Bounds(r"adamw_kernel", blocks=4, wide=BOTH),
    Bounds(r"total_kernel", threads=1024, blocks=1),
    Bounds(r"\w+_kernel<(Row<)?([a-z]\w*, )?" + VECTORS, wide=BOTH, narrowest=32),
    Bounds(r".*"),
)


def bounds(kernel: str, arch: str) -> Bounds:
    return next(b for b in BOUNDS if re.fullmatch(b.kernel, kernel) and re.fullmatch(b.archs, arch))


def broken(row: Mapping) -> list[str]:
    """What the machine code of a kernel does not keep of its bounds; what was not read is not judged."""
    wanted = bounds(row["kernel"], row["arch"])
    system = SYSTEM if int(re.match(r"\d+", row["arch"])[0]) >= 90 else 0
    found = []
    for what, limit in (
        ("registers", wanted.registers),
        ("stack", 0),
        ("shared", wanted.shared + system),
        ("local", 0),
    ):
        if row.get(what, 0) > limit:
            found.append(f"{what}: {row[what]}, at most {limit}")
    if "accesses" not in row:
        return found
    wide = {
        kind for access in row["accesses"] for kind in BOTH if moves(access, kind) and machine_code.bits(access) == 128
    }
    found += [f"no {kind} of 16 bytes" for kind in wanted.wide if kind not in wide]
    narrow = [f"{n} {access}" for access, n in row["accesses"].items() if machine_code.bits(access) < wanted.narrowest]
    found += [f"{', '.join(narrow)}: at least {wanted.narrowest} bits"] if narrow else []
    return found + (["no products by matrix units"] if wanted.products and not row["products"] else [])


def moves(access: str, kind: str) -> bool:
    return access.startswith("ST" if kind == "stores" else "LD")


def cuobjdump(*arguments: str | Path) -> str:
    tool = machine_code.cuda_tool("cuobjdump")
    if tool is None:
        raise Unreadable("no cuobjdump on PATH or in Triton")
    ran = subprocess.run([tool, *arguments], capture_output=True, text=True)
    if ran.returncode:
        raise Unreadable(f"cuobjdump: {(ran.stderr or ran.stdout).strip().splitlines()[-1]}")
    return ran.stdout


def table(file: Path, sass: Iterable[str] = SASS) -> list[dict[str, object]]:
    """A row for each kernel of each architecture in a module or object file, those of `sass` with what their instructions are."""
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for row in machine_code.resource_usage(cuobjdump("-res-usage", file)):
        row["arch"] = row["arch"].removeprefix("sm_")
        # A kernel of a header is in several object files: the same code.
        rows.setdefault((row["kernel"], row["arch"]), row)
    if not rows:
        raise Unreadable(f"{file} holds no machine code for GPUs")
    read = sorted({arch for _, arch in rows} & set(sass))
    with ThreadPoolExecutor(2) as disassemblers:
        for arch, printed in zip(read, disassemblers.map(lambda arch: _sass(file, arch), read), strict=True):
            for name, found in machine_code.functions(printed).items():
                rows[name, arch] |= machine_code.facts(found)
    names = machine_code.readable(name for name, _ in rows)
    for row, name in zip(rows.values(), names, strict=True):
        row["file"] = machine_code.source(row["kernel"])
        row["kernel"] = name
        row["broken"] = broken(row)
    return sorted(rows.values(), key=lambda row: (row["kernel"], row["file"] or "", order(row["arch"])))


def _sass(file: Path, arch: str) -> str:
    return cuobjdump("-sass", "-arch", f"sm_{arch}", file)


def order(arch: str) -> tuple[int, str]:
    return int(re.match(r"\d+", arch)[0]), arch


def families(rows: Sequence[Mapping]) -> list[dict[str, object]]:
    """Rows of a result file: a kernel on an architecture with what is the same or worst of its instances."""
    grouped: dict[tuple[str | None, str, str], list[Mapping]] = {}
    for row in rows:
        grouped.setdefault((row["file"], row["kernel"].partition("<")[0], row["arch"]), []).append(row)
    return [
        {
            "file": file,
            "kernel": kernel,
            "arch": arch,
            "instances": len(of),
            "registers": [min(row["registers"] for row in of), max(row["registers"] for row in of)],
            "stack": max(row["stack"] for row in of),
            **_instructions([row for row in of if "accesses" in row]),
            "broken": [f"{row['kernel']}: {reason}" for row in of for reason in row["broken"]],
        }
        for (file, kernel, arch), of in grouped.items()
    ]


def _instructions(rows: Sequence[Mapping]) -> dict[str, object]:
    if not rows:
        return {}
    widths = [{machine_code.bits(access) for access in row["accesses"]} for row in rows]
    return {
        "instructions": [min(row["instructions"] for row in rows), max(row["instructions"] for row in rows)],
        "wide": sum(128 in of for of in widths),
        "products": sorted({name for row in rows for name in row["products"]}),
    }


def result(info: Mapping, rows: Sequence[Mapping]) -> dict[str, object]:
    """As a result file holds it; info: the module's build_info()."""
    facts = machine.machine("cpu")
    kept = {name: facts[name] for name in ("python", "date", "commit", "dirty")}
    return {
        "format": results_file.FORMAT,
        "kind": "compiled_cuda",
        "machine": {"device": "cuda", "cuda": info["cuda"], **kept},
        "rows": families(rows),
    }


def render(rows: Sequence[Mapping]) -> str:
    width = max((len(row["kernel"]) for row in rows), default=0)
    lines = []
    for row in rows:
        line = f"{row['kernel']:{width}}  sm_{row['arch']:<4}  {row['registers']:3} of {bounds(row['kernel'], row['arch']).registers:3} registers"
        line += f"  {row['stack']:3} B stack  {row['shared']:4} B shared"
        if "accesses" in row:
            counted = [f"{n} {name}" for part in ("products", "accesses") for name, n in row[part].items()]
            line += f"  {row['instructions']:5} instructions  {', '.join(counted)}"
        lines += [line, *(f"  BROKEN: {reason}" for reason in row["broken"])]
    return "\n".join(lines)


def main() -> int:
    from stackbert_kernels import _C

    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled_cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--module", type=Path, default=Path(_C.__file__), help="default: the one that was built")
    parser.add_argument("--sass", nargs="*", default=list(SASS), metavar="ARCH", help="default: 80 90a")
    parser.add_argument("--json", type=Path, help="also write a result file")
    options = parser.parse_args()
    try:
        rows = table(options.module, options.sass)
    except Unreadable as error:
        print(f"benchmarks.compiled_cuda: {error}", file=sys.stderr)
        return 2
    print(render(rows))
    if options.json:
        results_file.write(options.json, result(_C.build_info(), rows))
    return 1 if any(row["broken"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
