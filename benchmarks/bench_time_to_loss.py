"""Held-out loss over seconds and over FLOPs: the same text, model, batches, masks, initial weights and budget of seconds for everyone.

    python -m benchmarks time_to_loss [TEXT ...] [--out DIR] [--minutes 5]

Contenders, one after another on the whole machine: the loop that people write around transformers (BertForMaskedLM, sdpa, AdamW, padded
batches), our baseline, and MSLT, or the recipes that --contenders names. Each is timed for a few steps first, every stage of a recipe by itself; from that follows how many
steps fit into the budget, and the learning rate's warm-up and decay (the same shape for all) are laid over these steps, so that the
schedule ends with the budget. Seconds are those of training: waiting for batches and growth are in them, evaluation, saving and the short timing
are not. FLOPs are the matrix products that each executes: for ours by plan/'s model; transformers also computes padding and all logits.

Without TEXT, the documentation of this machine's Python is the text (nothing is downloaded). A GPU reads it dozens of times in a few minutes:
for a comparison that means something there, give a larger TEXT.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from stackbert_kernels.config import ConfigError, DataConfig, ModelConfig, OptimConfig, TrainConfig, to_dict
from stackbert_kernels.recipes import RECIPES
from stackbert_kernels.train import budget
from stackbert_kernels.train.budget import TIMED_STEPS

from . import results_file, table
from .command_line import DONE, FAILED, BadUse, Parser, answered, device_of, make_folder

HF = "HF loop"
BY_DEFAULT = ("baseline", "mslt")
"""The recipes that compete when none is asked for."""
COLOURS = ("#d1541f", "#2f6db3", "#0e9f8e", "#7c3aed", "#b45309", "#be185d", "#4d7c0f", "#0369a1")
QUARTERS = (0.25, 0.5, 0.75)
NOTED = 0.1  # a run that is so much longer or shorter than its budget
FEWEST_SECONDS = 1.0


@dataclass(frozen=True)
class Preset:
    """A run that a machine finishes in `minutes`, all contenders together."""

    minutes: float
    aside: float
    """Seconds of a contender beside its budget: the short timing, evaluation, checkpoints, export."""
    config: TrainConfig
    warmup: float
    """Share of the steps."""
    recipes: dict[str, object] = field(default_factory=dict)
    """Options of recipes that differ from their defaults."""


PRESETS = {
    # Large initial weights, a high rate and mask rate and no dropout leave the unigram plateau soonest (stackbert_kernels/demo.py).
    "cpu": Preset(
        minutes=5,
        aside=12,
        config=TrainConfig(
            model=ModelConfig(layers=4, hidden=128, heads=2, max_position=64, dropout=0.0, init_std=0.05),
            data=DataConfig(train_vocab_size=4096, seq_len=64, batch_tokens=512, mask_rate=0.30, eval_tokens=8192),
            optim=OptimConfig(lr=2e-3, beta2=0.98),
        ),
        warmup=0.05,
    ),
    "cuda": Preset(
        minutes=6,
        aside=30,
        config=TrainConfig(  # BERT-base but for its vocabulary
            model=ModelConfig(max_position=128),
            data=DataConfig(train_vocab_size=16384, seq_len=128, batch_tokens=16384, mask_rate=0.30),
            optim=OptimConfig(lr=5e-4, beta2=0.98),
            precision="bf16",
        ),
        warmup=0.05,
    ),
}


# A contender.


@dataclass(frozen=True)
class Contest:
    """What all contenders share."""

    base: TrainConfig
    preset: Preset
    data: Path
    work: Path
    seconds: float

    def of_steps(self, steps: int) -> TrainConfig:
        """The baseline's configuration for so many steps: schedule, evaluation and logging laid over them."""
        optim = replace(self.base.optim, warmup=max(1, round(self.preset.warmup * steps)))
        every = {"eval_every": max(1, steps // 20), "log_every": max(1, steps // 50), "checkpoint_every": steps}
        return replace(self.base, steps=steps, stages=(), optim=optim, keep=1, **every)

    def recipe(self, name: str, steps: int) -> TrainConfig:
        function, options = RECIPES[name]
        return function(self.of_steps(steps), self.preset.recipes.get(name, options()))

    def enough(self, steps: int) -> int:
        return budget.enough(steps, self.seconds)


def run_transformers(contest: Contest) -> dict:
    from .transformers_loop import Loop

    seconds_per_step = Loop(contest.of_steps(1000), contest.data, contest.base.device).seconds_per_step(3, TIMED_STEPS)
    _free()
    config = contest.of_steps(contest.enough(steps_that_fit(contest, "baseline", [seconds_per_step])))
    metrics = contest.work / "transformers.jsonl"
    Loop(config, contest.data, config.device).train(metrics)
    return {"steps": config.steps, "timed_seconds_per_step": [seconds_per_step], "recipe": None} | _events(metrics)


def run_recipe(contest: Contest, name: str) -> dict:
    from stackbert_kernels.train.loop import train

    timed = budget.timing_of(lambda steps: contest.recipe(name, steps), TIMED_STEPS)
    seconds_per_step = _finished(train(timed, contest.work / f"{name}-timed", progress=False))["stage_seconds"]
    _free()
    config = contest.recipe(name, contest.enough(steps_that_fit(contest, name, seconds_per_step)))
    run = contest.work / name
    _finished(train(config, run, progress=sys.stderr.isatty()))
    options = contest.preset.recipes.get(name, RECIPES[name][1]())
    found = {"steps": config.steps, "timed_seconds_per_step": seconds_per_step, "recipe": to_dict(options)}
    return found | {"stages": to_dict(config)["stages"]} | _events(run / "metrics.jsonl")


def steps_that_fit(contest: Contest, name: str, seconds_per_step: Sequence[float]) -> int:
    """The most steps whose stages, at their own seconds a step, take no longer than the budget."""
    return budget.steps_that_fit(lambda steps: contest.recipe(name, steps), seconds_per_step, contest.seconds)


def _finished(result: dict) -> dict:
    if result["status"] == "stopped":
        raise KeyboardInterrupt
    if result["status"] != "finished":
        raise RuntimeError(result["message"])
    return result


def _events(metrics: Path) -> dict:
    """The curve of a run, and what it used."""
    from stackbert_kernels.train.run_directory import read_metrics

    events = read_metrics(metrics)
    evals = [event for event in events if event["event"] == "eval" and event["eval_loss"] is not None]
    names = {
        "step": "step",
        "seconds": "seconds",
        "tokens": "tokens",
        "flops": "flops",
        "loss": "eval_loss",
        "accuracy": "eval_accuracy",
    }
    curve = [{name: event[theirs] for name, theirs in names.items()} for event in evals]
    kernels = next((event["kernels"] for event in events if event["event"] == "stage"), {})
    if not curve:
        raise RuntimeError("no evaluation gave a finite loss")
    return {"curve": curve, "kernels": kernels}


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Curves.


def loss_at(curve: Sequence[dict], seconds: float) -> float | None:
    """Between the evaluations before and after; None before the first, the last one's after it."""
    if seconds < curve[0]["seconds"]:
        return None
    for a, b in pairwise(curve):
        if seconds <= b["seconds"]:
            share = (seconds - a["seconds"]) / (b["seconds"] - a["seconds"])
            return a["loss"] + share * (b["loss"] - a["loss"])
    return curve[-1]["loss"]


def seconds_to(curve: Sequence[dict], loss: float) -> float | None:
    """When the curve first was at `loss` or below, between the evaluations; None: never."""
    if curve[0]["loss"] <= loss:
        return curve[0]["seconds"]
    for a, b in pairwise(curve):
        if b["loss"] <= loss:
            share = (a["loss"] - loss) / (a["loss"] - b["loss"])
            return a["seconds"] + share * (b["seconds"] - a["seconds"])
    return None


def summarize(result: dict) -> None:
    """Fills in what is read off the curves; the target is the transformers loop's final loss, or else the baseline's."""
    rows = {row["case"]: row for row in result["rows"]}
    name = next((n for n in (HF, "baseline") if n in rows), None)
    result["target"] = {"contender": name, "loss": rows[name]["curve"][-1]["loss"]} if name else None
    for row in result["rows"]:
        curve, budget = row["curve"], result["settings"]["seconds"]
        row["loss_at"] = {f"{share:.0%}": loss_at(curve, share * budget) for share in QUARTERS}
        row |= {key: curve[-1][key] for key in ("loss", "accuracy", "tokens", "flops")}
        row["train_seconds"] = curve[-1]["seconds"]
        row["seconds_to_target"] = seconds_to(curve, result["target"]["loss"]) if name else None


# What comes out.


def report(result: dict) -> str:
    settings, target = result["settings"], result["target"]
    model = settings["config"]["model"]
    lines = [
        f"{model['layers']} layers, hidden {model['hidden']}, {settings['config']['precision']}, {settings['config']['data']['batch_tokens']} "
        f"tokens a step; {settings['train_tokens']:,} tokens of text; {settings['seconds']:.0f} s each; "
        f"held-out loss without context {settings['unigram_loss']:.3f}"
    ]
    to_target = f"s to {target['contender']}'s loss" if target else "s to loss"
    rows = [
        {
            "contender": row["case"], "steps": row["steps"], "s": f"{row['train_seconds']:.1f}",
            **{f"loss at {share}": _loss(loss) for share, loss in row["loss_at"].items()},
            "at the end": _loss(row["loss"]), "accuracy": f"{row['accuracy']:.3f}",
            to_target: "never" if row["seconds_to_target"] is None else f"{row['seconds_to_target']:.1f}",
            "tokens": f"{row['tokens']:,}", "FLOPs": f"{row['flops']:.2e}",
        }
        for row in result["rows"]
    ]  # fmt: skip
    notes = [f"{name} absent: {reason}" for name, reason in result["absent"].items()]
    notes += [
        f"{row['case']} took {row['train_seconds']:.1f} s: its steps did not take as long as in the short timing"
        for row in result["rows"]
        if abs(row["train_seconds"] / settings["seconds"] - 1) > NOTED
    ]
    return "\n\n".join(part for part in (*lines, table.text(rows), "\n".join([*notes, *result["problems"]])) if part)


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def plot(result: dict, path: Path) -> None:
    """Two panels: held-out loss over seconds and over FLOPs. ImportError where matplotlib is missing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    picture = Figure(figsize=(12, 4.8), dpi=110, layout="constrained")
    FigureCanvasAgg(picture)
    by_seconds, by_flops = picture.subplots(1, 2, sharey=True)
    for axis, key, label in (
        (by_seconds, "seconds", "seconds of training"),
        (by_flops, "flops", "FLOPs of matrix products"),
    ):
        for i, row in enumerate(result["rows"]):
            colour = "#6b7280" if row["case"] == HF else COLOURS[i % len(COLOURS)]
            points = [(point[key], point["loss"]) for point in row["curve"]]
            axis.plot(*zip(*points, strict=True), color=colour, lw=1.6, marker="o", ms=2.5, label=row["case"])
        axis.axhline(result["settings"]["unigram_loss"], color="#b91c1c", lw=1, ls=(0, (3, 2)), label="without context")
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e7eb", lw=0.6)
        axis.set_xlim(left=0)
    by_seconds.axvline(result["settings"]["seconds"], color="#c7ccd4", lw=1)
    by_flops.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_seconds.set_ylabel("held-out loss, nats a masked token")
    by_flops.legend(frameon=False, fontsize=9)
    picture.suptitle(table.header(result["machine"]), fontsize=9, x=0.01, ha="left")
    picture.savefig(path, format="png")


# The command.


def parser(prog: str) -> Parser:
    made = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("text", nargs="*", metavar="TEXT",
                      help="text files, globs, directories, .jsonl, or one prepared directory; default: the documentation of this Python")  # fmt: skip
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument(
        "--contenders",
        choices=(HF.split()[0].lower(), *RECIPES),
        nargs="+",
        help=f"default: {HF.split()[0].lower()} {' '.join(BY_DEFAULT)}",
    )
    how_long = made.add_mutually_exclusive_group()
    how_long.add_argument("--seconds", type=float, help="of training for each contender")
    how_long.add_argument("--minutes", type=float, help="for everything together; default: 5 on a CPU, 6 on a GPU")
    for name, what in (("layers", "layers"), ("hidden", "width"), ("heads", "attention heads"), ("seq-len", "most tokens of a sample"),
                       ("batch-tokens", "tokens of a step"), ("vocab-size", "words of the WordPiece that is trained on the text")):  # fmt: skip
        made.add_argument(f"--{name}", type=int, help=f"{what}; default: the preset of the device")
    made.add_argument("--lr", type=float, help="highest learning rate; default: the preset of the device")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--out", type=Path, metavar="DIR", help="write time_to_loss.json and time_to_loss.png there")
    made.add_argument("--commit", help="of these sources, where they are a copy without their history")
    made.add_argument("--json", action="store_true", help="print the result as one JSON object instead of a table")
    return made


def configuration(options: argparse.Namespace, preset: Preset, device: str) -> TrainConfig:
    """The preset with what the options change; ConfigError, or BadUse, for what cannot work."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    model = {"layers": "layers", "hidden": "hidden", "heads": "heads"}
    data = {"seq_len": "seq_len", "batch_tokens": "batch_tokens", "vocab_size": "train_vocab_size"}
    base = preset.config
    changed = replace(base.model, inner=0, **{theirs: given[ours] for ours, theirs in model.items() if ours in given})
    changed = replace(changed, max_position=max(changed.max_position, given.get("seq_len", 0)))
    return replace(
        base,
        model=changed,
        data=replace(
            base.data,
            text=tuple(options.text),
            **{theirs: given[ours] for ours, theirs in data.items() if ours in given},
        ),
        optim=replace(base.optim, lr=given.get("lr", base.optim.lr)),
        stages=(),
        seed=options.seed,
        device=device,
        threads=options.threads or 0,
    )


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks time_to_loss") -> int:
    options = parser(prog).parse_args(sys.argv[1:] if arguments is None else arguments)
    for name in ("seconds", "minutes", "threads"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise BadUse(f"--{name} must be above 0, got {value:g}")
    if options.seconds is not None and options.seconds < FEWEST_SECONDS:
        raise BadUse(f"--seconds must be at least {FEWEST_SECONDS:g}, got {options.seconds:g}")
    device = device_of(options.device)
    preset = PRESETS[device]
    asked = options.contenders or (HF.split()[0].lower(), *BY_DEFAULT)
    names = [name for name in (HF, *RECIPES) if name.split()[0].lower() in asked]
    with tempfile.TemporaryDirectory(prefix="time-to-loss-") as work:
        started = time.perf_counter()
        try:
            from stackbert_kernels.train.run_directory import check

            config = configuration(options, preset, device)
            if options.text:
                config = check(config, Path(work) / "run")
        except ConfigError as error:
            raise BadUse(str(error)) from None
        minutes = options.minutes or preset.minutes
        if options.seconds is None and 60 * minutes / len(names) < preset.aside + FEWEST_SECONDS:
            least = len(names) * (preset.aside + FEWEST_SECONDS) / 60
            raise BadUse(f"--minutes must be at least {least:.2g} for {len(names)} contenders, got {minutes:g}")
        make_folder(options.out)
        contest, result = prepared(options, preset, config, Path(work), device)
        if options.seconds is None:
            left = 60 * minutes - (time.perf_counter() - started)
            contest = replace(contest, seconds=max(FEWEST_SECONDS, left / len(names) - preset.aside))
        else:
            contest = replace(contest, seconds=options.seconds)
        result["settings"]["seconds"] = contest.seconds
        try:
            compete(contest, names, result, options.out)
        finally:
            print(
                json.dumps(result, indent=1)
                if options.json
                else f"{table.header(result['machine'])}\n\n{report(result)}"
            )
    return FAILED if result["problems"] else DONE


def prepared(
    options: argparse.Namespace, preset: Preset, config: TrainConfig, work: Path, device: str
) -> tuple[Contest, dict]:
    """The text as shards, and a result without rows."""
    from stackbert_kernels.data.documentation import documentation
    from stackbert_kernels.data.prepare import load_manifest, prepare

    from . import machine

    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    text = options.text or [str(documentation(work / "documentation.txt"))]
    try:
        data = prepare(text, work / "data", config.data)
    except ConfigError as error:
        raise BadUse(str(error)) from None
    manifest = load_manifest(data)
    model = replace(config.model, vocab_size=manifest["vocab_size"])
    config = replace(config, model=model, data=replace(config.data, text=(str(data),)))
    settings = {
        "config": to_dict(config), "text": options.text or "documentation", "warmup": preset.warmup,
        "train_tokens": manifest["splits"]["train"]["tokens"], "heldout_tokens": manifest["splits"]["heldout"]["tokens"],
        "unigram_loss": manifest["unigram"]["entropy"],
    }  # fmt: skip
    result = {
        "format": results_file.FORMAT, "kind": "time_to_loss", "machine": machine.machine(device, options.commit),
        "settings": settings, "target": None, "rows": [], "absent": {}, "problems": [],
    }  # fmt: skip
    return Contest(config, preset, data, work, 0.0), result


def compete(contest: Contest, names: Sequence[str], result: dict, out: Path | None) -> None:
    """Each contender in turn; the files are written after each, so that what finished counts whatever happens to the others."""
    for name in names:
        print(f"{name}: {contest.seconds:.0f} s", file=sys.stderr, flush=True)
        try:
            found = run_transformers(contest) if name == HF else run_recipe(contest, name)
        except ImportError as error:
            result["absent"][name] = str(error)
        except Exception as error:  # the others may work
            result["problems"].append(f"{name}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        else:
            result["rows"].append(_row(contest, name, found))
            summarize(result)
        _free()
        if out:
            write(result, out)


def _row(contest: Contest, name: str, found: dict) -> dict:
    base = contest.base
    return {
        "op": "time_to_loss", "case": name, "dtype": base.precision, "p": base.model.dropout, "options": {},
        "direction": "run", "bytes": 0, "ours": None if name == HF else name, "seconds": {}, "absent": {}, "wrong": {}, **found,
    }  # fmt: skip


def write(result: dict, out: Path) -> None:
    results_file.write(out / "time_to_loss.json", result)
    if result["rows"]:
        try:
            plot(result, out / "time_to_loss.png")
        except ImportError as error:
            print(f"no plot without matplotlib: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(answered(main, sys.argv[1:], "python -m benchmarks.bench_time_to_loss"))
