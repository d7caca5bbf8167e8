"""`python -m benchmarks` and `stackbert bench`: check every op against float64, then time it beside its peers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .command_line import DONE, FAILED, BadUse, Parser, answered, device_of, make_folder

DTYPES = ("fp32", "bf16", "fp16")
OTHER_COMMANDS = """other commands, each with --help:
  {prog} train_step     the whole training step beside transformers
  {prog} time_to_loss   held-out loss in equal time
  {prog} sweep          every recipe in equal time, several seeds, each at its best rate
  {prog} dropin         patched models of transformers beside unpatched ones
  {prog} torch_encoder  a patched nn.TransformerEncoder beside PyTorch's
  {prog} tune           the candidates of each Triton kernel's configuration, on a GPU
  {prog} compare A B    what became slower between two results
  {prog} report         RESULTS.md from the committed results
"""


def run_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Check every op against float64, then time it beside its peers.",
        epilog=OTHER_COMMANDS.format(prog=prog),
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="which ops; all without one (--list shows them)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU where there is one")
    add("--dtype", choices=DTYPES, nargs="+", help="only these")
    add("--quick", action="store_true", help="one small case an op: shows that everything runs, not how fast")
    add("--compile", action="store_true", help="torch.compile beside every case; else beside the main ones, on a GPU")
    add("--repeats", type=int, default=30, metavar="N", help="timed rounds of a case (default 30)")
    add("--minutes", type=float, metavar="M", help="end after about so long; what is left out is named")
    add("--threads", type=int, metavar="N", help="CPU threads")
    add("--out", type=Path, metavar="DIR", help="write ops.json and a plot of each op there")
    add("--commit", metavar="SHA", help="of these sources, where they are a copy without their history")
    add("--json", action="store_true", help="print the result as one JSON object instead of tables")
    add("--list", action="store_true", help="show what would be measured, then stop")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks") -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else ""
    if name in ("train_step", "time_to_loss", "sweep", "dropin", "torch_encoder", "tune", "compare", "report"):
        return answered(_other(name), arguments[1:], f"{prog} {name}")
    return answered(lambda given, prog: run_ops(run_parser(prog).parse_args(given)), arguments, prog)


def _other(name: str):
    from importlib import import_module

    own = ("train_step", "time_to_loss", "sweep", "dropin", "torch_encoder")
    module = f".bench_{name}" if name in own else f".{name}"
    return import_module(module, __package__).main


def run_ops(options: argparse.Namespace) -> int:
    if options.repeats < 2:
        raise BadUse(f"--repeats must be at least 2, got {options.repeats}")
    if options.minutes is not None and not options.minutes > 0:
        raise BadUse(f"--minutes must be above 0, got {options.minutes:g}")
    if options.threads is not None and options.threads < 1:
        raise BadUse(f"--threads must be at least 1, got {options.threads}")
    device = device_of(options.device)

    import torch
    from tqdm import tqdm

    from . import figure, machine, results_file, table
    from .declared import BENCHES
    from .harness import dtype_name, plan, run

    known = [bench.op for bench in BENCHES]
    for op in options.ops:
        if op not in known:
            raise BadUse(f"unknown op {op!r}; ops are {', '.join(known)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    make_folder(options.out)

    def keep(case) -> bool:
        return not options.dtype or dtype_name(case.dtype) in options.dtype

    benches = [bench for bench in BENCHES if not options.ops or bench.op in options.ops]
    planned = plan(benches, device, quick=options.quick, keep=keep)
    if options.list:
        print("\n".join(f"{bench.op} {case}" for bench, case in planned))
        return DONE
    if not planned:
        raise BadUse(f"nothing to measure on {device} with --dtype {' '.join(options.dtype)}")

    result = {
        "format": results_file.FORMAT,
        "kind": "ops",
        "machine": machine.machine(device, options.commit),
        "sources": {bench.op: machine.digest(bench.folder, device) for bench in benches},
        "quick": options.quick,
        "rows": [],
        "problems": [],
    }
    print(table.header(result["machine"]), file=sys.stderr)
    bar = tqdm(total=len(planned), disable=not sys.stderr.isatty(), unit="case", file=sys.stderr)

    def add(rows: list[dict]) -> None:
        result["rows"] += rows
        bar.update()
        if options.out:
            results_file.write(options.out / "ops.json", result)

    result["problems"] = run(
        benches, device, quick=options.quick, repeats=options.repeats, minutes=options.minutes,
        keep=keep, compile=options.compile, on_rows=add, on_case=bar.set_description,
    )  # fmt: skip
    bar.close()
    if options.out:
        results_file.write(options.out / "ops.json", result)
        figure.write(result, options.out)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for bench in benches:
            if rows := [row for row in result["rows"] if row["op"] == bench.op]:
                print(f"\n{table.text(table.op_rows(rows))}")
        print("".join(f"\n{line}" for line in (*table.left_out(result["rows"]), *result["problems"])))
    wrong = [row for row in result["rows"] if any(table.is_ours(name) for name in row["wrong"])]
    failed = [line for line in result["problems"] if not line.endswith("the time was up")]
    return FAILED if wrong or failed else DONE


if __name__ == "__main__":
    sys.exit(main())
