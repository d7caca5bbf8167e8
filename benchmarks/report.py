"""RESULTS.md from the committed results: tables and plots by machine, beside the targets, and what has changed since.

    results/MACHINE/*.json   what `python -m benchmarks`, `train_step`, `time_to_loss` and `benchmarks.gpu` wrote
    results/compiled.json    what `python -m benchmarks.compiled --json` wrote, and compiled_cuda.json what `benchmarks.compiled_cuda` did

The page is made of these files, of the declarations, and of the digests of the sources as they are now: an op whose sources are not
those that were measured is marked. Nothing on it depends on the day or on the machine that renders it. --check renders it again and
compares. Exit status: 0 done, 1 the page is not what the results give, 2 bad use.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby, zip_longest
from pathlib import Path

from . import figure, history, machine, results_file, table, targets
from .command_line import DONE, FAILED, BadUse, Parser

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE / "RESULTS.md"
NOT_YET = "not yet measured on a GPU"
COMMAND = "python -m benchmarks report"
TRAINING = {
    "train_step": "The training step",
    "dropin": "Patched models of transformers",
    "time_to_loss": "Held-out loss in equal time",
}


@dataclass(frozen=True)
class Result:
    path: Path
    content: Mapping

    @property
    def kind(self) -> str:
        return str(self.content.get("kind"))

    @property
    def machine(self) -> Mapping:
        return self.content["machine"]

    @property
    def on_gpu(self) -> bool:
        return self.machine["device"] == "cuda"


def read(folder: Path) -> dict[str, list[Result]]:
    """The results of each machine's folder, GPUs first. BadUse for what is none or must not be shown."""
    if folder == RESULTS and not folder.exists():
        return {}
    if not folder.is_dir():
        raise BadUse(f"--results: no such folder: {folder}")
    machines = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = []
        for path in sorted(place.glob("*.json")):
            try:
                result = Result(path, results_file.read(path))
            except ValueError as error:
                raise BadUse(str(error)) from None
            for mark in ("pretend", "quick"):
                if result.content.get(mark):
                    raise BadUse(f"{path}: is of a {mark} run, which measures nothing")
            found.append(result)
        if found:
            machines[place.name] = found
    return dict(sorted(machines.items(), key=lambda item: not any(result.on_gpu for result in item[1])))


# The page.


def render(folder: Path, out: Path) -> str:
    """The text of RESULTS.md; `out` is where it will lie, for its links."""
    machines = read(folder)
    parts = [title(machines), INTRODUCTION]
    for name, results in machines.items():
        parts += machine_section(name, results, out)
    parts += [floors_section(), compiled_section(folder / "compiled.json")]
    parts += [compiled_cuda_section(folder / "compiled_cuda.json")]
    return "\n\n".join(part for part in parts if part) + "\n"


INTRODUCTION = f"""Made by `{COMMAND}` from the files in `results/`, which runs wrote; neither is edited by hand. Times are medians. `of ceiling` is the share of
what the declared bytes take in a large copy, or the declared FLOPs in a large matrix product, measured in the same rounds. `x PEER` is a peer's time
over ours: above 1 ours is faster. Everything was checked against float64 before it was timed. `python -m benchmarks compare A B` compares two files."""


def title(machines: Mapping[str, Sequence[Result]]) -> str:
    gpus = {result.machine["gpu"]: None for results in machines.values() for result in results if result.on_gpu}
    return "# Results: " + (f"measured on {', '.join(gpus)}" if gpus else NOT_YET)


def machine_section(name: str, results: Sequence[Result], out: Path) -> list[str]:
    of = {result.kind: result for result in results}
    parts = [f"## {name}", "\n".join(provenance(result) for result in results)]
    if "gpu" in of:
        parts += phases(of["gpu"], out)
    ops = of.get("ops")
    if ops and targets.GPU in str(ops.machine.get("gpu")):
        parts += ["### Targets", table.markdown(targets.judged(ops.content["rows"]))]
    if ops:
        parts += op_sections(ops, out)
    for kind, title in TRAINING.items():
        if kind in of:
            parts += [*whole_training(of[kind]), picture(of[kind].path.with_suffix(".png"), title, out)]
    return parts


def provenance(result: Result) -> str:
    """What a file's figures have to be read with, and which of them are of older sources."""
    facts = result.machine
    place = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} of {facts['cores']} threads"
    versions = [f"{label} {facts[key]}" for key, label in NAMED.items() if facts.get(key)]
    known = folders()
    return f"- `{result.path.name}`: {stands_for(result, known)}; {', '.join([place, *versions])}. {staleness(result, known)}"


NAMED = {
    "driver_version": "driver",
    "clocks_max_sm": "SM clock up to",
    "power_limit": "power limit",
    "cuda": "CUDA",
    "torch": "torch",
    "triton": "Triton",
    "python": "Python",
}


def stands_for(result: Result, known: Mapping[str, str]) -> str:
    commit = history.commit_of(result.content, known)
    stands = f"commit `{commit[:12]}`" if commit else "a commit that is not known"
    return f"{result.machine['date']}, {stands}" + (" with changes" if result.machine.get("dirty") else "")


def staleness(result: Result, known: Mapping[str, str]) -> str:
    changed = history.changed(result.content, known)
    if changed is None:
        return "**Which sources it measured cannot be found out.**"
    return f"**Changed since: {', '.join(changed)}.**" if changed else "No op has changed since."


def folders() -> dict[str, str]:
    from .declared import BENCHES

    return {bench.op: bench.folder for bench in BENCHES}


def picture(path: Path, label: str, out: Path) -> str:
    if not path.exists():
        return ""
    return f"![{label}]({Path(os.path.relpath(path, out.parent)).as_posix()})"


def op_sections(result: Result, out: Path) -> list[str]:
    changed = history.changed(result.content, folders()) or []
    parts = []
    for op, rows in groupby(
        sorted(result.content["rows"], key=lambda row: _order(row["op"])), key=lambda row: row["op"]
    ):
        of_op = list(rows)
        lines = [{k: v for k, v in line.items() if k != "op"} for line in table.op_rows(of_op)]
        stale = " (its sources have changed since)" if op in changed else ""
        parts += [f"### {op}{stale}", table.markdown(lines), picture(result.path.parent / f"{op}.png", op, out)]
    notes = [*table.left_out(result.content["rows"]), *result.content.get("problems", [])]
    if notes:
        parts += ["### Left out", "\n".join(f"- {note}" for note in notes)]
    return parts


def _order(op: str) -> tuple[int, str]:
    known = list(folders())
    return (known.index(op) if op in known else len(known), op)


def phases(result: Result, out: Path) -> list[str]:
    """What one run on a GPU proved. What is in files of its own stands in sections of its own."""
    done = result.content["phases"]
    lines = [
        {"part": name, "state": phase["state"], "seconds": round(phase["seconds"]), "": phase.get("reason", "")}
        for name, phase in done.items()
    ]
    parts = ["### What the run proved", table.markdown(lines)]
    parts.append("\n".join(f"- {name}: {line}" for name, phase in done.items() for line in phase.get("failures", [])))
    for name, phase in done.items():
        if phase.get("lines") and "file" not in phase:
            told = "\n".join(phase["lines"])
            parts.append(f"{name}:\n\n```text\n{told}\n```")
    kernels = done.get("build", {}).get("kernels", [])
    if kernels:
        columns = ("kernel", "registers", "shared", "stack")
        rows = [{name: kernel[name] for name in columns} for kernel in kernels]
        parts += ["### Compiled CUDA kernels", table.markdown(rows)]
    return [*parts, picture(result.path.parent / "training.png", "training run", out)]


def whole_training(result: Result) -> list[str]:
    """As `python -m benchmarks train_step`, `dropin` and `time_to_loss` print it."""
    text = import_module(f".bench_{result.kind}", __package__).report(result.content)
    return [f"### {TRAINING[result.kind]}", f"```text\n{text}\n```"]


# What is known without a run.


def floors_section() -> str:
    """Each kernel's floor on an H200, by its declaration."""
    from .declared import BENCHES
    from .harness import dtype_name

    lines = []
    for bench in BENCHES:
        for case in bench.cases("cuda", False):
            if dtype_name(case.dtype) == "fp16":
                continue  # the bytes and FLOPs of bf16
            for direction in case.directions:
                row = {
                    "op": bench.op, "case": case.name, "dtype": dtype_name(case.dtype), "p": case.p, "sizes": case.sizes,
                    "options": case.options, "direction": direction, "bytes": bench.bytes_moved(case, direction),
                    "flops": bench.flops(case, direction),
                }  # fmt: skip
                lines.append(_floor_line(row))
    text = (
        f"## Floors of an {targets.GPU}\n\nWhat each declared case takes at least: its bytes at {targets.COPY / 1e12:g} TB/s or its FLOPs at "
        f"{targets.MATMUL / 1e12:g} TFLOP/s, whichever is longer, and the target where one is set."
    )
    return f"{text}\n\n{table.markdown(lines)}"


def _floor_line(row: Mapping) -> dict[str, object]:
    memory, arithmetic = row["bytes"] / targets.COPY, row["flops"] / targets.MATMUL
    target = targets.of(row)
    return {
        "op": row["op"],
        "case": table.case_name(row),
        "pass": row["direction"],
        "MB": row["bytes"] / 1e6,
        "GFLOP": row["flops"] / 1e9 or None,
        "floor us": 1e6 * max(memory, arithmetic),
        "bound": "FLOPs" if arithmetic > memory else "bytes",
        "target": f"{target}{' (below the floor)' if _unreachable(target, row) else ''}" if target else None,
    }


def _unreachable(target: targets.Target, row: Mapping) -> bool:
    floor = max(row["bytes"] / targets.COPY, row["flops"] / targets.MATMUL)
    return any(target.seconds(impl, row) < floor for impl in target.us)


def compiled_section(path: Path) -> str:
    """Facts of the machine code of the Triton kernels, compiled ahead of time."""
    if not path.exists():
        return ""
    try:
        result = results_file.read(path)
    except ValueError as error:
        raise BadUse(str(error)) from None
    archs = dict.fromkeys(f"sm_{row['arch']}" for row in result["rows"])
    lines: dict[str, dict[str, object]] = {}
    for row in result["rows"]:
        line = lines.setdefault(row["kernel"], {"kernel": row["kernel"]} | dict.fromkeys(archs))
        line[f"sm_{row['arch']}"] = f"{row['registers']} / {row['spills']} / {row['shared']}"
        if row["arch"] == 90:
            line["instructions, sm_90"] = row["instructions"]
            for what, key in (("matrix units", "products"), ("global memory", "accesses")):
                line[f"{what}, sm_90"] = ", ".join(f"{n} {name}" for name, n in row[key].items()) or None
    made, stems = Result(path, result), {stem: stem for stem in result["sources"]}
    text = (
        "## Triton kernels, compiled ahead of time\n\nRegisters of a thread / spill stores / bytes of shared memory. "
        f"Triton {made.machine['triton']}, {stands_for(made, stems)}. {staleness(made, stems)}"
    )
    return f"{text}\n\n{table.markdown(list(lines.values()))}"


def compiled_cuda_section(path: Path) -> str:
    """Facts of the machine code of the CUDA kernels, a line for those of one name."""
    if not path.exists():
        return ""
    try:
        result = results_file.read(path)
    except ValueError as error:
        raise BadUse(str(error)) from None
    archs = dict.fromkeys(f"sm_{row['arch']}" for row in result["rows"])
    lines: dict[tuple[str, str], dict[str, object]] = {}
    for row in result["rows"]:
        line = lines.setdefault(
            (row["file"] or "", row["kernel"]),
            {
                "kernel": row["kernel"],
                "file": row["file"],
                "instances": row["instances"],
                **dict.fromkeys(archs),
                "stack": 0,
            },
        )
        line[f"sm_{row['arch']}"] = _span(row["registers"])
        line["stack"] = max(line["stack"], row["stack"])
        if row["arch"] == CUDA_SASS:
            line[f"instructions, sm_{CUDA_SASS}"] = _span(row["instructions"])
            line["by 16 bytes"], line["matrix units"] = row["wide"] or None, ", ".join(row["products"]) or None
    made = Result(path, result)
    text = (
        "## CUDA kernels, as they are compiled\n\nRegisters of a thread, from the instance with the fewest to that with the most; bytes of stack of any "
        "on any architecture, where spilled registers would be; how many instances move global memory by 16 bytes. "
        f"nvcc {made.machine['cuda']}, {stands_for(made, {})}. Every build holds its kernels to their bounds: `python -m benchmarks.compiled_cuda`."
    )
    return f"{text}\n\n{table.markdown(list(lines.values()))}"


CUDA_SASS = "90a"


def _span(bounds: Sequence[int]) -> str:
    fewest, most = bounds
    return str(most) if fewest == most else f"{fewest} to {most}"


# The command.


def parser(prog: str) -> Parser:
    made = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    made.add_argument("--out", type=Path, default=PAGE, metavar="FILE", help="default: benchmarks/RESULTS.md")
    made.add_argument(
        "--check", action="store_true", help="write nothing; say whether FILE and its plots are up to date"
    )
    return made


def main(arguments: Sequence[str], prog: str) -> int:
    options = parser(prog).parse_args(arguments)
    if options.out == PAGE and not (machine.ROOT / "csrc").is_dir():
        raise BadUse("this is an installed copy, the results are in the source tree; --results and --out name others")
    if options.check and needs_history(options.results) and not history.whole():
        print("cannot be checked here: some results are placed by their commits, and there is no whole history")
        return DONE
    if options.check:
        problem = outdated(options.results, options.out)
        print(f"{prog}: {problem}; run {COMMAND}" if problem else f"{options.out}: up to date")
        return FAILED if problem else DONE
    for results in read(options.results).values():
        for result in results:
            if result.kind == "ops":
                figure.write(result.content, result.path.parent, only_new=True)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(render(options.results, options.out))
    except OSError as error:
        raise BadUse(f"--out {options.out}: {error.strerror}") from None
    print(options.out)
    print("".join(f"{line}\n" for line in since(options.results)), end="")
    return DONE


def needs_history(folder: Path) -> bool:
    """Whether a result lacks its commit or the digests of its sources."""
    results = [result.content for of_machine in read(folder).values() for result in of_machine]
    return any(not (content["machine"].get("commit") and content.get("sources")) for content in results)


def outdated(folder: Path, out: Path) -> str | None:
    """What is not as the results give it, or None."""
    wanted = render(folder, out).splitlines()
    if not out.exists():
        return f"there is no {out}"
    found = out.read_text().splitlines()
    for number, (a, b) in enumerate(zip_longest(wanted, found, fillvalue=""), 1):
        if a != b:
            return f"{out}:{number} is not what the results give: wanted {a[:200]!r}, got {b[:200]!r}"
    for results in read(folder).values():
        for result in results:
            old = figure.outdated(result.content, result.path.parent) if result.kind == "ops" else []
            if old:
                return f"{old[0]} is not of these results"
    return None


def since(folder: Path) -> list[str]:
    """For the terminal: the commits that changed what was measured."""
    lines = []
    for name, results in read(folder).items():
        for result in results:
            commit = history.commit_of(result.content, folders())
            for op in history.changed(result.content, folders()) or []:
                told = history.commits(folders()[op], commit) if commit and op in folders() else []
                lines.append(f"{name}/{result.path.name}: {op} has changed since {(commit or 'then')[:12]}")
                lines += [f"    {line}" for line in told]
    return lines
