"""The whole training step beside transformers: same model, data, dtype and threads.

    python -m benchmarks train_step [--out DIR] [--minutes 2]

A step is forward, backward, clipping and AdamW (fused on both sides), with dropout. On a GPU: BERT-base and -large in bf16, full sequences of
128 and 512 tokens and natural lengths (transformers pads to the longest of the batch, as its collators do, and gets no attention mask
where nothing is padded); on a CPU: one small model. Then every MSLT stage against the cost model.

Nothing wrong is timed: without dropout, loss and gradient norm must be those of transformers in fp32 (of our reference where transformers
is missing), and again in the dtype that is timed. The compiled model, which would have to be compiled a second time for that, must instead give
the loss of the uncompiled one up to what dropout explains. Who fails is named.

Real tokens are counted. MFU: the matrix products that the step needs (plan/'s model: logits and last layer only where something is
predicted) a second, over those of a large matrix product measured in the same rounds; it divides every candidate by the same work. MFU 6N counts as
Megatron-LM does (arXiv 2104.04473): 6 FLOPs a parameter and token, all logits, and attention.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from stackbert_kernels.config import ConfigError, ModelConfig
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.plan import baseline_stage, flops_per_token, plan
from stackbert_kernels.recipes.mslt import MsltOptions, mslt
from stackbert_kernels.train.machine import check_machine

from . import figure as figures
from . import machine, results_file, table
from .clock import interleave, matmul_ceiling, ratio
from .command_line import DONE, FAILED, BadUse, Parser, answered, device_of, make_folder
from .lengths import equal, natural
from .training_step import (
    BEST_FIRST,
    HF,
    HF_COMPILED,
    OURS,
    Field,
    Ours,
    Samples,
    Setting,
    Wrong,
    check,
    few,
    field_of,
    first_line,
    parameter_flops,
    step,
)

MODELS = {
    "base": ModelConfig(layers=12, hidden=768, heads=12, vocab_size=30522),
    "large": ModelConfig(layers=24, hidden=1024, heads=16, vocab_size=30522),
}
TOKENS = {"cuda": 32768, "cpu": 2048}  # of a step
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATMUL = "matmul"
STEPS, COMPILED, STAGES = "", " with torch.compile", " by MSLT stage"
TIME_WAS_UP = "the time was up"
BY_DROPOUT = 0.05  # the loss of two draws of masks over as many predictions differs by under a per cent
COMPILE_SECONDS_PER_LAYER = 4.0  # a guess, until the first compilation of the run was timed
ROUNDS_AT_LEAST = 6


# Time.


def measure(
    field: Field,
    setting: Setting,
    device: str,
    *,
    compiled: bool = False,
    repeats: int = 20,
    seconds: float = 60.0,
) -> dict:
    """The row of a setting, with the compiled peer where it is wanted."""
    samples = Samples.random(setting.lengths, setting.model.vocab_size, device)
    wrong = check(field, few(setting, device), setting.dtype)
    absent = dict(field.absent)
    left = {n: c for n, c in field.candidates.items() if n not in wrong and n not in absent}
    running = {n: c for n, c in left.items() if compiled or n != HF_COMPILED}
    compile_seconds, losses, memory = None, {}, {}
    for name, candidate in list(running.items()):
        started = time.perf_counter()
        try:
            losses[name] = step(candidate, samples, setting.dtype).item()
            if name == HF_COMPILED:
                compile_seconds = time.perf_counter() - started
                _close_to_uncompiled(losses)
            memory[name] = _memory(lambda c=candidate: step(c, samples, setting.dtype), device)
            continue
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
        except Exception as error:
            (wrong if isinstance(candidate, Ours) or isinstance(error, Wrong) else absent)[name] = first_line(error)
        candidate.optimizer.zero_grad()
        del running[name]
        _free(device)

    calls = {name: lambda _, c=c: step(c, samples, setting.dtype) for name, c in running.items()}
    calls[MATMUL], matmul_flops = matmul_ceiling(device, DTYPES[setting.dtype])
    stats = interleave(calls, device, repeats=repeats, warmup=1, seconds=seconds)
    needed = {
        "mfu": setting.flops,
        "mfu_6n": parameter_flops(setting.model, setting.config.data.seq_len) * setting.tokens,
    }
    ours = field.ours if field.ours in running else next((n for n, c in running.items() if isinstance(c, Ours)), None)
    row = {
        "op": "train_step", "case": setting.name, "dtype": setting.dtype, "p": setting.model.dropout, "direction": "step",
        "sizes": {"L": setting.model.layers, "C": setting.model.hidden, "V": setting.model.vocab_size,
                  "B": len(setting.lengths), "S": max(setting.lengths)},
        "options": {}, "bytes": 0, "flops": setting.flops, "tokens": setting.tokens,
        "padded_tokens": samples.padded["input_ids"].numel(), "ours": ours, "kernels": field.kernels,
        "seconds": {name: s.as_dict() for name, s in stats.items()}, "absent": absent, "wrong": wrong,
        "ceilings": {MATMUL: matmul_flops / stats[MATMUL].median},
        "tokens_per_second": {name: setting.tokens / stats[name].median for name in running},
        "memory_bytes": memory, "compile_seconds": compile_seconds,
    }  # fmt: skip
    for key, flops in needed.items():
        row[key] = {n: flops / matmul_flops * ratio(stats, MATMUL, n).median for n in running}
    return row | {
        "speed_up": {n: ratio(stats, HF, n).as_dict() for n in running} if HF in running else {},
        "ratios": {n: ratio(stats, n, ours).as_dict() for n in running if n != ours} if ours else {},
    }


def measure_stages(setting: Setting, device: str, *, repeats: int = 20, seconds: float = 60.0) -> list[dict]:
    """A row for each MSLT stage: its step as a share of a full step, beside the cost model's prediction."""
    samples = Samples.random(setting.lengths, setting.model.vocab_size, device)
    config = replace(setting.config, device=device)
    kernels = check_machine(config)
    spans = plan(mslt(config, MsltOptions()))
    template = Bert(config.model, seed=0, device=device).train()
    candidates = {span.name: Ours(copy.deepcopy(template), config, "auto", span.stage) for span in spans}
    calls = {name: lambda _, c=c: step(c, samples, setting.dtype) for name, c in candidates.items()}
    stats = interleave(calls, device, repeats=repeats, seconds=seconds)
    full, full_flops = spans[-1].name, flops_per_token(config, baseline_stage(config))
    rows = []
    for span in spans:
        share = ratio(stats, span.name, full)
        flops = flops_per_token(config, span.stage)
        rows.append({
            "op": "mslt_stage", "case": f"{setting.name} {span.name}", "dtype": setting.dtype, "p": setting.model.dropout,
            "direction": "step", "sizes": {"depth": span.stage.depth, "train_from": span.stage.train_from},
            "options": {}, "bytes": 0, "flops": flops * setting.tokens, "tokens": setting.tokens,
            "ours": OURS, "kernels": kernels, "seconds": {OURS: stats[span.name].as_dict()},
            "absent": {}, "wrong": {}, "ratios": {},
            "of_full_step": share.as_dict(), "predicted": flops / full_flops, "measured_over_predicted": share.median * full_flops / flops,
        })  # fmt: skip
    return rows


def _close_to_uncompiled(losses: dict[str, float]) -> None:
    if HF in losses and not math.isclose(losses[HF_COMPILED], losses[HF], rel_tol=BY_DROPOUT):
        raise Wrong(f"loss with dropout is {losses[HF_COMPILED]:.5g}, must be {losses[HF]:.5g} up to {BY_DROPOUT:.0%}")


def _memory(call: Callable[[], object], device: str) -> int | None:
    """Most bytes that a call takes beyond what lay there before: activations, gradients, temporaries."""
    if device == "cpu":
        call()
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# What is measured.


class Budget:
    """Seconds that are left, and what the next setting will take by the one before."""

    def __init__(self, minutes: float):
        self.end = time.perf_counter() + 60 * minutes
        self.aside = 0.0  # seconds beside the timed rounds: making candidates, checking, warming up
        self.round_per_flop = 0.0
        self.compile_per_layer = COMPILE_SECONDS_PER_LAYER

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def seconds(self, setting: Setting) -> float:
        return self.aside + ROUNDS_AT_LEAST * self.round_per_flop * setting.flops

    def compile_seconds(self, setting: Setting) -> float:
        return self.compile_per_layer * setting.model.layers

    def learn(self, setting: Setting, row: dict, seconds: float) -> None:
        timed = sum(stats["median"] for stats in row["seconds"].values())
        self.round_per_flop = timed / setting.flops
        self.aside = seconds - (row["compile_seconds"] or 0.0) - timed * row["seconds"][MATMUL]["samples"]
        if row["compile_seconds"] is not None:
            self.compile_per_layer = row["compile_seconds"] / setting.model.layers


def jobs(options: argparse.Namespace) -> list[tuple[str, Setting]]:
    """(kind, setting), most important first. A setting is measured with the compiled peer only after it was without, so that a
    compilation that takes too long costs no other figure."""
    found = []
    for size in options.sizes:
        model = MODELS.get(size) or small_model(options)
        for dtype in options.dtype:
            full = [Setting(size, model, f"S={s}", tuple(equal(options.tokens, s)), dtype) for s in options.seq_len]
            mixed = Setting(size, model, *_natural(options), dtype)
            found += [(STEPS, setting) for setting in full]
            found += [(COMPILED, full[0]), (STEPS, mixed)]
            found += [(STAGES, full[0])] if size == options.sizes[0] else []
            found += [(COMPILED, setting) for setting in (*full[1:], mixed)]
    return found


def _natural(options: argparse.Namespace) -> tuple[str, tuple[int, ...]]:
    """transformers computes all logits of all padded tokens, which are 4 times as many at 512: half the tokens keep them in the memory."""
    longest = max(options.seq_len)
    return f"natural <= {longest}", tuple(natural(options.tokens if longest <= 128 else options.tokens // 2, longest))


def small_model(options: argparse.Namespace) -> ModelConfig:
    return ModelConfig(layers=options.layers, hidden=options.hidden, heads=options.heads, vocab_size=options.vocab)


def why_not_compiled(wanted: str, setting: Setting, budget: Budget, device: str) -> str | None:
    """The reason why torch.compile is left out, or None."""
    needed = budget.compile_seconds(setting)
    if wanted == "no":
        return "left out by --compile no"
    if wanted == "auto" and device == "cpu":
        return "left out on CPUs without --compile yes: compiling takes minutes"
    if wanted == "auto" and budget.left < 1.2 * needed + budget.seconds(setting):
        return f"compiling would have taken some {needed:.0f} s of the {max(0.0, budget.left):.0f} s left"
    return None


def run(options: argparse.Namespace, device: str, result: dict, keep: Callable[[], None]) -> None:
    """Appends the rows to `result`, and to its problems a line for each thing that was left out or failed; `keep` after each."""
    budget, measured = Budget(options.minutes), {}
    made: tuple[ModelConfig, str] | None = None
    field: Field | None = None
    for kind, setting in jobs(options):
        name = f"{setting.name} {setting.dtype}{kind}"
        earlier = measured.get(setting)
        if kind == COMPILED:
            reason = why_not_compiled(options.compile, setting, budget, device)
            if earlier and reason:
                earlier["absent"].setdefault(HF_COMPILED, reason)
            if not earlier or HF_COMPILED in earlier["absent"]:
                continue
        elif result["rows"] and budget.left < budget.seconds(setting):
            result["problems"].append(f"{name}: not run, {TIME_WAS_UP}")
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.perf_counter()
        seconds = max(1.0, min(20.0, budget.left / 4))
        try:
            if kind == STAGES:
                result["rows"] += measure_stages(setting, device, repeats=options.repeats, seconds=seconds)
            else:
                if made != (setting.model, setting.dtype):
                    field = made = None  # its memory first
                    _free(device)
                    field, made = field_of(setting.config, device, options.impl), (setting.model, setting.dtype)
                compiled = kind == COMPILED
                row = measure(field, setting, device, compiled=compiled, repeats=options.repeats, seconds=seconds)
                budget.learn(setting, row, time.perf_counter() - started)
                if earlier:
                    result["rows"][result["rows"].index(earlier)] = row
                else:
                    result["rows"].append(row)
                measured[setting] = row
        except Exception as error:  # the next setting may work
            result["problems"].append(f"{name}: {first_line(error)}")
        _free(device)
        keep()


# What comes out.


def step_table(rows: Sequence[dict]) -> list[dict[str, object]]:
    """A line a candidate."""
    lines = []
    for row in rows:
        for name, speed in row["tokens_per_second"].items():
            stats = row["seconds"][name]
            lines.append({
                "case": row["case"], "dtype": row["dtype"], "candidate": name, "ms": 1e3 * stats["median"],
                "p20": 1e3 * stats["p20"], "p80": 1e3 * stats["p80"], "tokens/s": speed,
                "MFU": f"{row['mfu'][name]:.1%}", "MFU 6N": f"{row['mfu_6n'][name]:.1%}",
                f"x {HF}": row["speed_up"][name]["median"] if row["speed_up"] else None,
                "GiB": None if row["memory_bytes"].get(name) is None else row["memory_bytes"][name] / 2**30,
            })  # fmt: skip
    return lines


def stage_table(rows: Sequence[dict]) -> list[dict[str, object]]:
    return [
        {
            "case": row["case"], "dtype": row["dtype"], "layers": row["sizes"]["depth"],
            "learning": row["sizes"]["depth"] - row["sizes"]["train_from"], "ms": 1e3 * row["seconds"][row["ours"]]["median"],
            "of a full step": row["of_full_step"]["median"], "predicted": row["predicted"],
            "measured / predicted": row["measured_over_predicted"],
        }
        for row in rows
    ]  # fmt: skip


def report(result: dict) -> str:
    """The tables, and a line for everything that is not in them."""
    of = {op: [row for row in result["rows"] if row["op"] == op] for op in ("train_step", "mslt_stage")}
    ceilings = {row["dtype"]: row["ceilings"][MATMUL] / 1e12 for row in of["train_step"]}
    lines = [f"{dtype}: a large matrix product runs at {rate:.4g} TFLOP/s" for dtype, rate in ceilings.items()]
    parts = [table.text(step_table(of["train_step"])), "\n".join(lines), table.text(stage_table(of["mslt_stage"]))]
    parts.append("\n".join([*table.left_out(result["rows"]), *result["problems"]]))
    return "\n\n".join(part for part in parts if part)


def plot(result: dict, path: Path) -> None:
    """Bars: tokens a second, a group a setting. ImportError where matplotlib is missing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = [row for row in result["rows"] if row["op"] == "train_step" and row["tokens_per_second"]]
    figure = Figure(
        figsize=(10, 1.6 + 0.3 * sum(1 + len(row["tokens_per_second"]) for row in rows)), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    y, ticks = 0.0, []
    for row in rows:
        first = y
        for name, speed in row["tokens_per_second"].items():
            axis.barh(y, speed, height=0.85, color=figures.colour(name), label=name)
            mfu = row["mfu"][name]
            axis.annotate(
                f"{EngFormatter(places=1, sep='')(speed)}  MFU {mfu:.0%}",
                (speed, y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
            y += 1
        ticks.append(((first + y - 1) / 2, f"{row['case']}\n{row['dtype']}"))
        y += 0.7
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(
        handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9
    )
    axis.set_yticks(*zip(*ticks, strict=True))
    axis.invert_yaxis()
    axis.margins(x=0.22)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("real tokens a second, forward + backward + clipping + AdamW")
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(table.header(result["machine"]), fontsize=9, x=0.01, ha="left")
    figure.savefig(path, format="png")


# The command.


def parser(prog: str) -> Parser:
    made = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument(
        "--sizes", choices=(*MODELS, "small"), nargs="+", help="default: base large on a GPU, small on a CPU"
    )
    made.add_argument("--layers", type=int, default=12, help="of the small model, as the next three (default 12)")
    made.add_argument("--hidden", type=int, default=128, help="(default 128)")
    made.add_argument("--heads", type=int, default=2, help="(default 2)")
    made.add_argument("--vocab", type=int, default=8192, help="(default 8192)")
    made.add_argument("--seq-len", type=int, nargs="+", help="full lengths; default: 128 512 on a GPU, 128 on a CPU")
    made.add_argument(
        "--tokens", type=int, help=f"of a step; default: {TOKENS['cuda']} on a GPU, {TOKENS['cpu']} on a CPU"
    )
    made.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", help="default: bf16 on a GPU, fp32 on a CPU")
    made.add_argument("--impl", choices=BEST_FIRST, nargs="+",
                      help="ours to time, beside what auto takes; default: all on a GPU, native on a CPU")  # fmt: skip
    made.add_argument("--compile", choices=("auto", "yes", "no"), default="auto",
                      help="whether transformers is measured compiled too; auto: on a GPU while there is time")  # fmt: skip
    made.add_argument("--repeats", type=int, default=20, help="most timed rounds of a setting (default 20)")
    made.add_argument(
        "--minutes", type=float, default=2.0, help="end after about so long; what is left out is named (default 2)"
    )
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--out", type=Path, metavar="DIR", help="write train_step.json and train_step.png there")
    made.add_argument("--commit", help="of these sources, where they are a copy without their history")
    made.add_argument("--json", action="store_true", help="print the result as one JSON object instead of tables")
    return made


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks train_step") -> int:
    options = parser(prog).parse_args(sys.argv[1:] if arguments is None else arguments)
    device = device_of(options.device)
    gpu = device == "cuda"
    options.sizes = options.sizes or (["base", "large"] if gpu else ["small"])
    options.seq_len = options.seq_len or ([128, 512] if gpu else [128])
    options.impl = options.impl or (list(BEST_FIRST) if gpu else ["native"])
    options.tokens = options.tokens or TOKENS[device]
    options.dtype = options.dtype or ["bf16" if gpu else "fp32"]
    if options.repeats < 2:
        raise BadUse(f"--repeats must be at least 2, got {options.repeats}")
    if not options.minutes > 0:
        raise BadUse(f"--minutes must be above 0, got {options.minutes:g}")
    if options.threads is not None and options.threads < 1:
        raise BadUse(f"--threads must be at least 1, got {options.threads}")
    if not 8 <= min(options.seq_len) <= max(options.seq_len) <= 512:
        raise BadUse(f"--seq-len must be 8 to 512, got {' '.join(map(str, options.seq_len))}")
    if options.tokens < 2 * max(options.seq_len):
        raise BadUse(f"--tokens must be at least two sequences of {max(options.seq_len)}, got {options.tokens}")
    if options.vocab < 2:
        raise BadUse(f"--vocab must be at least 2, got {options.vocab}")
    try:
        small_model(options)
    except ConfigError as error:
        raise BadUse(str(error)) from None
    if options.threads:
        torch.set_num_threads(options.threads)
    make_folder(options.out)

    result = {
        "format": results_file.FORMAT,
        "kind": "train_step",
        "machine": machine.machine(device, options.commit),
        "rows": [],
        "problems": [],
    }

    def keep() -> None:
        if options.out:
            results_file.write(options.out / "train_step.json", result)

    run(options, device, result, keep)
    keep()
    if options.out and result["rows"]:
        try:
            plot(result, options.out / "train_step.png")
        except ImportError as error:
            print(f"no plot without matplotlib: {error}", file=sys.stderr)
    print(json.dumps(result, indent=1) if options.json else f"{table.header(result['machine'])}\n\n{report(result)}")
    failed = [line for line in result["problems"] if not line.endswith(TIME_WAS_UP)]
    wrong = [
        row for row in result["rows"] if row["ours"] is None or any(name.startswith(OURS) for name in row["wrong"])
    ]
    return FAILED if failed or wrong else DONE


if __name__ == "__main__":
    sys.exit(answered(main, sys.argv[1:], "python -m benchmarks.bench_train_step"))
