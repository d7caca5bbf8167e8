"""Which recipe pays, measured: every recipe and plain training in equal time, by one command with the settings of PRESETS.

    python -m benchmarks sweep [TEXT ...] --out DIR [--preset cpu]       # --dry-run shows what would run, and how long

It is `stackbert sweep` (docs/compare.md) with a model, a text and rates to tune that a machine finishes in reasonable time. The same command goes
on where it stopped. Without TEXT, the documentation of this machine's Python is the text (nothing is downloaded). A GPU reads it dozens of
times: for a comparison that means something there, give a larger TEXT. Tokens are prepared once, in DIR/data.

Pieces on machines that are given back in between: `--stop-after 8` ends before a run that would not end in time, and `--state FILE` (a .tar.gz)
keeps the logs of what is finished, beside FILE.tokens those tokens that are not too large to carry: the next piece, with FILE given back in, goes on
from there with an empty DIR.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stackbert_kernels.config import ConfigError, DataConfig, ModelConfig, OptimConfig, TrainConfig
from stackbert_kernels.recipes import RECIPES, AlbertOptions

from . import results_file
from .command_line import DONE, FAILED, BadUse, Parser, answered, device_of

CARRIED_BYTES = 15 << 20
"""The most that a file of tokens may have."""


@dataclass(frozen=True)
class Preset:
    """A comparison: what all recipes share, how long each run takes, and the rates that each is tried with."""

    config: TrainConfig
    minutes: float
    seeds: int
    jobs: int
    tune: tuple[float, ...]
    tune_minutes: float
    rates: dict[str, float] = field(default_factory=dict)
    """Of recipes whose rate is not sought."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    options: dict[str, object] = field(default_factory=lambda: {"albert": AlbertOptions(sop=False)})
    """Of recipes; without sentence order, whose held-out text is another one."""


# Twelve layers, or as many as leave the plateau in time: with fewer, growth has nothing to save. All are trained without dropout, since a run
# sees its text once or little more often, with large initial weights and a high rate and mask rate, which leave the unigram plateau soonest.
PRESETS = {
    "cpu": Preset(
        config=TrainConfig(
            model=ModelConfig(layers=8, hidden=128, heads=2, max_position=64, dropout=0.0, init_std=0.05),
            data=DataConfig(train_vocab_size=4096, seq_len=64, batch_tokens=512, mask_rate=0.30, heldout=0.03),
            optim=OptimConfig(beta2=0.98),
            device="cpu",
        ),
        minutes=15,
        seeds=2,
        jobs=2,
        tune=(5e-4, 1e-3, 2e-3),
        tune_minutes=3,
        # In three minutes it learns no context at any rate. In six: 5.924, 5.845 and 6.415 at 2.5e-4, 5e-4 and 1e-3.
        rates={"albert": 5e-4},
    ),
    # BERT-base's depth at half its width: BERT-small's four layers are too few to stack, and a run has to end within a piece of nine minutes.
    "small": Preset(
        config=TrainConfig(
            model=ModelConfig(layers=12, hidden=384, heads=6, max_position=128, dropout=0.0),
            data=DataConfig(train_vocab_size=16384, seq_len=128, batch_tokens=16384, mask_rate=0.30),
            optim=OptimConfig(beta2=0.98),
            precision="bf16",
            device="cuda",
        ),
        minutes=2,
        seeds=2,
        jobs=1,
        tune=(5e-4, 1e-3, 2e-3),
        tune_minutes=0.5,
    ),
    "base": Preset(
        config=TrainConfig(
            model=ModelConfig(max_position=128, dropout=0.0),
            data=DataConfig(train_vocab_size=16384, seq_len=128, batch_tokens=16384, mask_rate=0.30),
            optim=OptimConfig(beta2=0.98),
            precision="bf16",
            device="cuda",
        ),
        minutes=4.5,
        seeds=2,
        jobs=1,
        tune=(2e-4, 5e-4, 1e-3),
        tune_minutes=1.2,
    ),
    "pretend": Preset(  # runs through everything in seconds, and says nothing
        config=TrainConfig(
            model=ModelConfig(layers=4, hidden=16, heads=2, max_position=16, dropout=0.0),
            data=DataConfig(train_vocab_size=300, seq_len=16, batch_tokens=64, eval_tokens=256),
            device="cpu",
            threads=1,
        ),
        minutes=0.02,
        seeds=1,
        jobs=1,
        tune=(1e-3, 3e-3),
        tune_minutes=0.01,
        recipes=("baseline", "mslt"),
    ),
}


def parser(prog: str) -> Parser:
    made = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add(
        "text",
        nargs="*",
        metavar="TEXT",
        help="text files, globs, directories or .jsonl; default: the documentation of this Python",
    )
    add("--out", type=Path, metavar="DIR", required=True, help="the directory of the sweep")
    add("--preset", choices=tuple(PRESETS), help="default: cpu, or small where there is a GPU")
    add("--recipes", nargs="+", choices=tuple(RECIPES), metavar="RECIPE", help="default: all of the preset")
    for name, kind, what in (("minutes", float, "of training, for each run"), ("seeds", int, "runs of each recipe"), ("jobs", int, "runs at a time"),
                             ("tune-minutes", float, "of each trial of a rate"), ("threads", int, "CPU threads of each run")):  # fmt: skip
        add(f"--{name}", type=kind, help=f"{what}; default: the preset's")
    add("--tune", type=float, nargs="+", metavar="RATE", help="rates to try; default: the preset's")
    add("--lr", nargs="+", default=[], metavar="RECIPE=RATE", help="rates that are known, beside the preset's")
    add("--seed", type=int, default=0, help="the first one")
    add("--stop-after", type=float, metavar="M", help="minutes after which no run is begun that would end later")
    add("--state", type=Path, metavar="FILE", help="what a later piece on another machine needs")
    add("--result", type=Path, metavar="FILE", help="write there how far it is, as JSON, whenever something has ended")
    add("--dry-run", action="store_true", help="print the plan, then stop")
    add("--fresh", action="store_true", help="start over")
    add("--json", action="store_true", help="print the result as one JSON object instead of a table")
    return made


def sweep_of(options: argparse.Namespace, preset: Preset):
    """The sweep that the options and the preset say, of the text that `options` names; BadUse for rates that are none."""
    from stackbert_kernels.sweep import Sweep

    given = {name: value for name, value in vars(options).items() if value is not None}
    recipes = tuple(given.get("recipes", preset.recipes))
    rates = {name: rate for name, rate in preset.rates.items() if name in recipes}
    for asked in options.lr:
        name, _, rate = asked.partition("=")
        try:
            rates[name] = float(rate)
        except ValueError:
            raise BadUse(f"--lr: wanted RECIPE=number, got {asked!r}") from None
    config = replace(preset.config, stages=(), seed=options.seed, threads=given.get("threads", preset.config.threads))
    return Sweep(
        base=replace(config, data=replace(config.data, text=tuple(options.text))),
        methods=recipes,
        directory=options.out,
        seconds=60 * given.get("minutes", preset.minutes),
        seeds=given.get("seeds", preset.seeds),
        rates=rates,
        options={name: value for name, value in preset.options.items() if name in recipes},
        jobs=given.get("jobs", preset.jobs),
        tune=tuple(given.get("tune", preset.tune)),
        tune_seconds=60 * given.get("tune_minutes", preset.tune_minutes),
        until=time.monotonic() + 60 * options.stop_after if options.stop_after else float("inf"),
    )


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks sweep") -> int:
    options = parser(prog).parse_args(sys.argv[1:] if arguments is None else arguments)
    preset = PRESETS[options.preset or ("small" if device_of("auto") == "cuda" else "cpu")]
    device_of(preset.config.device)
    from stackbert_kernels import sweep as sweeps
    from stackbert_kernels.compare.table import text as table
    from stackbert_kernels.sweep.side_by_side import cores

    if options.jobs is None:
        options.jobs = min(preset.jobs, len(cores()))
    try:
        sweep = sweep_of(options, preset)
        # The text is not there yet where none was given: to look at everything else, any file will do.
        text = tuple(options.text) or (__file__,)
        looked = sweeps.checked(
            replace(sweep, base=replace(sweep.base, data=replace(sweep.base.data, text=text))), fresh=True
        )
        if options.dry_run:
            print(sweeps.outline(looked))
            return DONE
        if options.fresh:
            sweeps.remove(sweep)
        if options.state and not options.fresh:
            restore(options.state, options.out)
        sweep = sweeps.checked(with_tokens(sweep))
        print(sweeps.outline(sweep), file=sys.stderr)

        def note(result: dict | None) -> None:
            if options.state:
                keep(options.state, options.out)
            if options.result:
                results_file.write(options.result, found(sweep, result))

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)
            if "held-out loss" in line:
                note(None)

        result = sweeps.run_sweep(sweep, say=say)
        note(result)
    except ConfigError as error:
        raise BadUse(str(error)) from None
    if options.json:
        print(
            json.dumps(result | {n: v for n, v in sweeps.amount(sweep).items() if n in ("runs", "finished")}, indent=1)
        )
    elif result["comparison"]:
        print(table(result["comparison"]))
    print(found(sweep, result)["lines"][0], *result["failed"], sep="; failed: ", file=sys.stderr)
    return FAILED if result["failed"] else DONE


def found(sweep, result: dict | None) -> dict:
    """How far the sweep is, in lines; `result` is run_sweep's, None before its end."""
    from stackbert_kernels import sweep as sweeps
    from stackbert_kernels.compare.table import text as table

    amounts = sweeps.amount(sweep)
    line = f"{amounts['finished']} of {amounts['runs']} runs finished"
    if amounts["tried"] < amounts["trials"]:
        line += f", {amounts['tried']} of {amounts['trials']} trials of rates"
    if result is None or result["status"] == "stopped":
        line += "; the same command goes on"
    compared = table(result["comparison"]).splitlines() if result and result["comparison"] else []
    failures = [f"{run} failed" for run in result["failed"]] if result else []
    return {"lines": [line, *compared], "failures": failures, "finished": amounts["finished"], "runs": amounts["runs"]}


def with_tokens(sweep):
    """The sweep of its text as tokens, in its directory; made where they are not there yet."""
    from stackbert_kernels.data.documentation import documentation
    from stackbert_kernels.data.prepare import is_prepared, prepare

    text, tokens = sweep.base.data.text, sweep.directory / "data"
    if text or not is_prepared(tokens):
        file = sweep.directory / "text" / "documentation.txt"
        if not text and not file.exists():
            print(f"gathering the documentation of Python and its packages: {file}", file=sys.stderr)
            documentation(file)
        prepare(text or (str(file),), tokens, sweep.base.data)
    return replace(sweep, base=replace(sweep.base, data=replace(sweep.base.data, text=(str(tokens),))))


# What a later piece needs.


def keep(state: Path, directory: Path) -> None:
    """Writes the logs of all finished runs into the file `state`, and the tokens beside it, unless they are there or too large."""
    from stackbert_kernels.sweep.work import finished

    files = [directory / "sweep.json"]
    for run in sorted({file.parent for file in directory.glob("**/metrics.jsonl") if "tuning" not in file.parts}):
        if finished(run):
            files += [run / "config.json", run / "metrics.jsonl"]
    _pack(state, directory, [file for file in files if file.exists()])
    tokens = sorted((directory / "data").glob("*"))
    if not _tokens(state).exists() and sum(file.stat().st_size for file in tokens) <= CARRIED_BYTES:
        _pack(_tokens(state), directory, tokens)


def restore(state: Path, directory: Path) -> None:
    """Lays out what an earlier piece kept, where the sweep has not begun here."""
    if (directory / "sweep.json").exists():
        return
    for file in (state, _tokens(state)):
        if file.exists():
            try:
                with tarfile.open(file) as archive:
                    _lay_out(archive, directory)
            except (tarfile.TarError, OSError) as error:
                raise BadUse(f"--state {file}: {error}") from None


def _lay_out(archive: tarfile.TarFile, directory: Path) -> None:
    """Its files below `directory`; TarError for anything else, such as a link or a path that leads out. (Python 3.11.4 can filter by itself.)"""
    for member in archive:
        place = directory / member.name
        if not member.isfile() or not place.resolve().is_relative_to(directory.resolve()):
            raise tarfile.TarError(f"{member.name} is no file of a sweep")
        place.parent.mkdir(parents=True, exist_ok=True)
        with archive.extractfile(member) as source, place.open("wb") as target:
            shutil.copyfileobj(source, target)


def _tokens(state: Path) -> Path:
    return state.with_name(state.name + ".tokens")


def _pack(file: Path, directory: Path, members: Sequence[Path]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    with tarfile.open(partial, "w:gz") as archive:
        for member in members:
            archive.add(member, member.relative_to(directory))
    partial.replace(file)


if __name__ == "__main__":
    sys.exit(answered(main, sys.argv[1:], "python -m benchmarks.bench_sweep"))
