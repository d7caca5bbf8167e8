"""The candidates of each Triton kernel's configuration, checked and timed in turn with the one that is kept.

    python -m benchmarks tune [OP ...] [--minutes M] [--out DIR]

Each ops/*/triton_kernel.py keeps a configuration for every architecture and names a few CANDIDATES. A variant is the kept configuration
with one kernel's entry replaced. Variants of a case are timed in the same rounds; what computes something else gets no time. Nothing is
changed: the table says which entry to move to the front.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from .command_line import DONE, FAILED, BadUse, Parser, answered, device_of, make_folder

KEPT = "kept"
WITHOUT_CANDIDATES = ("global_norm", "lamb_", "lans_")  # the optimizer's configurations are adamw_'s


def variants(candidates: Mapping | Sequence, kept: object, entry: object = None) -> dict[str, object]:
    """{name: configuration}, the kept one first. Candidates are whole configurations, or, by field of the configuration, what this field
    may be; `entry` is the part of a table of configurations that they are for."""
    if entry is not None:
        return {name: {**kept, entry: one} for name, one in variants(candidates, kept[entry]).items()}
    if isinstance(candidates, Mapping):
        others = {
            f"{field} {_values(one)}": dataclasses.replace(kept, **{field: one})
            for field, ones in candidates.items()
            for one in ones
            if one != getattr(kept, field)
        }
    else:
        others = {_values(one): one for one in candidates if one != kept}
    return {KEPT: kept, **others}


def _values(configuration) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in dataclasses.asdict(configuration).items() if value is not None
    )


@contextmanager
def chosen(module: ModuleType, arch: int, configuration: object) -> Iterator[None]:
    """Launches inside take this configuration."""
    kept = module.CONFIGURATIONS[arch]
    module.CONFIGURATIONS[arch] = configuration
    try:
        yield
    finally:
        module.CONFIGURATIONS[arch] = kept


def tune(bench, case, device: str, *, repeats: int = 30, seconds: float = 1e9) -> list[dict]:
    """A row for each direction of the case: seconds of every variant, and how many times faster than the kept one it is."""
    import torch

    from stackbert_kernels.ops import _triton

    from .clock import interleave, ratio
    from .harness import bound, input_sets, timed

    torch.manual_seed(0)
    module = import_module(f"stackbert_kernels.ops.{bench.folder}.triton_kernel")
    arch = _triton.architecture(module.CONFIGURATIONS, torch.device(device))
    tried = variants(module.CANDIDATES, module.CONFIGURATIONS[arch], getattr(module, "TUNED", None))
    failed = {}
    checked = bench.checked(case)
    inputs = bench.inputs(checked, device)
    for name, configuration in list(tried.items()):
        with chosen(module, arch, configuration):
            reason = _why_wrong(bench, checked, inputs)
        if reason:
            failed[name] = reason
            del tried[name]
    sets = input_sets(bench, case, device)
    rows = []
    for direction in case.directions:
        calls = {}
        for name, configuration in tried.items():
            with chosen(module, arch, configuration):
                call = timed(case, direction, lambda c, t: bound(bench.ours(c, t, "triton"), t), sets)
            calls[name] = _with(module, arch, configuration, call)
        stats = interleave(calls, device, repeats=repeats, seconds=seconds / len(case.directions)) if calls else {}
        rows.append({
            "op": bench.op, "case": str(case), "direction": direction, "arch": arch,
            "seconds": {name: s.as_dict() for name, s in stats.items()},
            "ratios": {name: ratio(stats, KEPT, name).as_dict() for name in stats if KEPT in stats},
            "failed": failed,
        })  # fmt: skip
    return rows


def _with(module: ModuleType, arch: int, configuration: object, call):
    def run(i: int):
        with chosen(module, arch, configuration):
            return call(i)

    return run


def _why_wrong(bench, case, inputs) -> str | None:
    """What is wrong with Triton's results on these inputs under the configuration of the moment, judged by our reference in float64."""
    import torch

    from .harness import OURS_SLACK, Wrong, bound, check, copied, largest_errors, results

    def by(impl: str, dtype=None):
        own = copied(inputs, dtype)
        return results(bound(bench.ours(case, own, impl), own))

    try:
        exact = by("reference", torch.float64)
        check("triton", case, by("triton"), exact, largest_errors(by("reference"), exact), OURS_SLACK)
    except Wrong as reason:
        return str(reason)
    except Exception as error:  # as "out of resource: shared memory"
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"
    return None


def table_rows(rows: Sequence[Mapping]) -> list[dict[str, object]]:
    """The fastest variant of each row first; behind them what failed."""
    lines = []
    for row in rows:
        for name, taken in sorted(row["seconds"].items(), key=lambda item: item[1]["median"]):
            share = row["ratios"].get(name)
            lines.append({
                "op": row["op"], "case": row["case"], "direction": row["direction"], "variant": name,
                "us": taken["median"] * 1e6, "kept / it": share["median"] if share else None,
                "from": share["p20"] if share else None, "to": share["p80"] if share else None,
            })  # fmt: skip
    return lines


def failures(rows: Sequence[Mapping]) -> list[str]:
    return list(dict.fromkeys(f"{r['op']} {r['case']}, {n}: {why}" for r in rows for n, why in r["failed"].items()))


def tunable(benches) -> list:
    """Benches whose op has candidates."""
    from .compiled import stems

    return [b for b in benches if b.folder in stems() and b.op not in WITHOUT_CANDIDATES]


def parser(prog: str) -> Parser:
    made = Parser(prog=prog, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    add = made.add_argument
    add("ops", nargs="*", metavar="OP", help="which ops; all without one")
    add("--all-cases", action="store_true", help="every case of an op, not its first and main ones alone")
    add("--repeats", type=int, default=30, metavar="N", help="timed rounds of a case (default 30)")
    add("--minutes", type=float, metavar="M", help="end after about so long; what is left out is named")
    add("--out", type=Path, metavar="DIR", help="write tune.json there")
    add("--commit", metavar="SHA", help="of these sources, where they are a copy without their history")
    add("--json", action="store_true", help="print the result as one JSON object instead of tables")
    return made


def run(options: argparse.Namespace) -> int:
    if options.repeats < 2:
        raise BadUse(f"--repeats must be at least 2, got {options.repeats}")
    if options.minutes is not None and not options.minutes > 0:
        raise BadUse(f"--minutes must be above 0, got {options.minutes:g}")

    from .declared import BENCHES

    known = tunable(BENCHES)
    for op in options.ops:
        if op not in [bench.op for bench in known]:
            raise BadUse(f"no candidates for {op!r}; there are some for {', '.join(b.op for b in known)}")
    device = device_of("cuda")

    from tqdm import tqdm

    from . import machine, results_file, table
    from .harness import plan

    make_folder(options.out)
    planned = plan([bench for bench in known if not options.ops or bench.op in options.ops], device)
    if not options.all_cases:
        first = {bench.op: case for bench, case in reversed(planned)}
        planned = [(bench, case) for bench, case in planned if case.main or case is first[bench.op]]
    result = {
        "format": results_file.FORMAT,
        "kind": "tune",
        "machine": machine.machine(device, options.commit),
        "rows": [],
        "problems": [],
    }
    print(table.header(result["machine"]), file=sys.stderr)
    bar = tqdm(planned, disable=not sys.stderr.isatty(), unit="case", file=sys.stderr)
    end = time.perf_counter() + 60 * options.minutes if options.minutes else None
    for i, (bench, case) in enumerate(bar):
        left = end - time.perf_counter() if end else 1e9
        if left <= 0:
            result["problems"].append(f"{bench.op} {case}: not run, the time was up")
            continue
        bar.set_description(f"{bench.op} {case}")
        try:
            result["rows"] += tune(bench, case, device, repeats=options.repeats, seconds=left / (len(planned) - i))
        except Exception as error:  # the next case may work
            result["problems"].append(f"{bench.op} {case}: {type(error).__name__}: {error}")
        if options.out:
            results_file.write(options.out / "tune.json", result)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print(table.text(table_rows(result["rows"])))
        print("".join(f"\n{line}" for line in (*failures(result["rows"]), *result["problems"])))
    wrong = any(KEPT in row["failed"] for row in result["rows"])
    return FAILED if wrong or any(not line.endswith("the time was up") for line in result["problems"]) else DONE


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks tune") -> int:
    return answered(
        lambda given, prog: run(parser(prog).parse_args(given)), sys.argv[1:] if arguments is None else arguments, prog
    )
