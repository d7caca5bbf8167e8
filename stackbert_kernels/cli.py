"""`stackbert <command>`: the options are the fields of config, checked before anything slow is loaded.

Exit codes: 0 done, 1 failed, 2 bad arguments (one line on stderr, before any work).
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, Suppress, arg, subcommand

from stackbert_kernels import __version__
from stackbert_kernels.config import (
    GROWTH_OPERATORS,
    OPTIMIZER_STATES,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Stage,
    TeacherShape,
    TrainConfig,
    differences,
    to_dict,
)
from stackbert_kernels.plan import cost_table, plan, span_cost
from stackbert_kernels.recipes import (
    RECIPES,
    AlbertOptions,
    Bert2bertOptions,
    CompoundGrowOptions,
    CoreOptions,
    IncrementalOptions,
    LateToEarlyOptions,
    MsltOptions,
    MultiLevelOptions,
    ProgressiveLayerDroppingOptions,
    ShareThenUnshareOptions,
    StackingOptions,
)
from stackbert_kernels.train.checkpoint import CheckpointError
from stackbert_kernels.train.torchrun import DistributedError, check_ranks, place, speaks

if TYPE_CHECKING:
    from stackbert_kernels.train.run_directory import Run

DONE, FAILED, BAD_ARGUMENTS = 0, 1, 2
MOST_WORKERS = 1024

Texts = Annotated[tuple[str, ...], Positional, arg(metavar="TEXT...")]
Flag = FlagCreatePairsOff[bool]
Json = Annotated[Flag, arg(help="Print the result as one JSON object on stdout.")]


@dataclass(frozen=True)
class _Data(DataConfig):
    text: Texts = field()
    """Text files, globs, directories, .jsonl with a `text` field, or one prepared directory."""


@dataclass(frozen=True)
class _Model(ModelConfig):
    """What is of single stages is the recipe's to say."""

    rank: Suppress[int] = 0
    score_dim: Suppress[int] = 0


@dataclass(frozen=True)
class _Text(_Data):
    """What decides the shards."""

    seq_len: Suppress[int] = 8
    short_seq_len: Suppress[int] = 0
    short_share: Suppress[float] = DataConfig.short_share
    batch_tokens: Suppress[int] = 8
    mask_rate: Suppress[float] = DataConfig.mask_rate
    whole_word: Suppress[bool] = False
    max_ngram: Suppress[int] = 1
    eval_tokens: Suppress[int] = DataConfig.eval_tokens


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainConfig):
    """Pre-train a BERT on text: prepares it, trains by a recipe, writes a transformers checkpoint and a report to --out.

    The same command on an existing run directory goes on where it stopped. `torchrun --nproc-per-node N -m stackbert_kernels pretrain ...` trains
    on N GPUs, or with N processes on CPUs, and goes on with any N.
    """

    out: Annotated[Path, arg(metavar="DIR")]
    """The run directory."""
    recipe: Literal[tuple(RECIPES)] = "mslt"
    """The training method: baseline (all layers from the start), mslt (multi-stage layerwise training), stacking (a shallow encoder copied
    on top of itself), incremental (new layers alone, then all), share_then_unshare (layers share weights at first), albert (they
    share them throughout), progressive_layer_dropping (steps leave out layers at random),
    bert2bert (from a smaller model, --source), multi_level (down to a smaller model and back),
    core (low-rank layers first), compound_grow (fewer layers, narrower feed-forward layers and pooled tokens first),
    late_to_early (an early layer follows a finished model at first, --teacher)."""
    dry_run: Flag = False
    """Print stages and predicted cost, then stop."""
    fresh: Flag = False
    """Start over: remove what an earlier run wrote to --out."""
    json: Json = False
    model: OmitArgPrefixes[_Model]
    data: OmitArgPrefixes[_Data]
    optim: OmitArgPrefixes[OptimConfig]
    stages: Suppress[tuple[Stage, ...]] = ()
    teacher_shape: Suppress[TeacherShape] = TrainConfig.teacher_shape
    mslt: MsltOptions = field(default_factory=MsltOptions)
    stacking: StackingOptions = field(default_factory=StackingOptions)
    incremental: IncrementalOptions = field(default_factory=IncrementalOptions)
    share_then_unshare: ShareThenUnshareOptions = field(default_factory=ShareThenUnshareOptions)
    albert: AlbertOptions = field(default_factory=AlbertOptions)
    progressive_layer_dropping: ProgressiveLayerDroppingOptions = field(default_factory=ProgressiveLayerDroppingOptions)
    bert2bert: Bert2bertOptions = field(default_factory=Bert2bertOptions)
    multi_level: MultiLevelOptions = field(default_factory=MultiLevelOptions)
    core: CoreOptions = field(default_factory=CoreOptions)
    compound_grow: CompoundGrowOptions = field(default_factory=CompoundGrowOptions)
    late_to_early: LateToEarlyOptions = field(default_factory=LateToEarlyOptions)

    def __post_init__(self):
        """Checked by `config`: the recipe may make the stages that these settings need."""

    def base(self) -> TrainConfig:
        """What these options say, before the recipe makes its stages of it."""
        settings = {f.name: getattr(self, f.name) for f in fields(TrainConfig)}
        settings |= {"model": _plain(self.model, ModelConfig), "data": _plain(self.data, DataConfig)}
        return TrainConfig(**settings)

    def config(self) -> TrainConfig:
        """The configuration that these options name, with the recipe's stages."""
        for name, (_, options) in RECIPES.items():
            if name != self.recipe and getattr(self, name, options()) != options():
                raise ConfigError(
                    f"--{name.replace('_', '-')} options need --recipe {name}, got --recipe {self.recipe}"
                )
        recipe, options = RECIPES[self.recipe]
        return recipe(self.base(), getattr(self, self.recipe, options()))

    def outline(self, config: TrainConfig) -> str:
        """Stages and cost of `config`, and what else the recipe has set."""
        lines = [cost_table(config)]
        changed = differences(self.base(), self.config(), leaving=("stages", "recipe"))
        if changed:
            lines.append(f"set by {self.recipe}: {', '.join(changed)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _SharedOptim(OptimConfig):
    """AdamW with warm-up and linear decay to zero, the same for all methods but for the rate."""

    lr: Suppress[float] = OptimConfig.lr
    warmup: Suppress[int] = 0


@dataclass(frozen=True, kw_only=True)
class _Sweep(TrainConfig):
    """Train by several recipes, each with several seeds and the same budget of time, on the same batches, and compare them.

    The same command goes on where it stopped; recipes and seeds can be added to a finished sweep.
    """

    recipes: Annotated[str, Positional, arg(metavar="RECIPE,RECIPE,...")]
    """Names of recipes, such as baseline,mslt."""
    out: Annotated[Path, arg(metavar="DIR")]
    """The directory of the sweep."""
    minutes: float
    """Of training, for each run; as many steps are taken as fit."""
    seeds: int = 3
    """Runs of each recipe, with the seeds --seed, --seed + 1, ..."""
    lr: Annotated[tuple[str, ...], arg(metavar="[RECIPE=]RATE ...")] = (f"{OptimConfig.lr:g}",)
    """Highest learning rate: of all recipes, or of one, as mslt=2e-3."""
    warmup_share: float = 0.05
    """Share of a run's steps over which the rate rises."""
    tune: Annotated[tuple[float, ...], arg(metavar="RATE ...")] = ()
    """Rates that each recipe is tried with first, for --tune-minutes with the first seed; it then runs with the one whose final held-out loss
    was lowest. A recipe whose rate --lr names is not tuned."""
    tune_minutes: float = 0.0
    """Of training, for each trial of --tune; 0 = a quarter of --minutes."""
    source_share: float = 0.2
    """Recipes that need a --source or --teacher: where none is given, each run first trains a smaller model of its own for this share of
    its time."""
    stop_after: float = 0.0
    """Minutes after which the command ends, so that a sweep can be cut into pieces: a run that would not end before is left for the next
    one; 0 = never."""
    jobs: int = 1
    """Runs at a time, each in a process of its own with its part of the cores (--threads, else cores / jobs). Steps are timed in the same
    way, and a sweep goes on with as many as it began with."""
    dry_run: Flag = False
    """Print the runs and the time that they will take, then stop."""
    fresh: Flag = False
    """Start over: remove what an earlier sweep wrote to --out."""
    json: Json = False
    data: OmitArgPrefixes[_Data]
    model: OmitArgPrefixes[_Model]
    optim: OmitArgPrefixes[_SharedOptim]
    steps: Suppress[int] = TrainConfig.steps
    stages: Suppress[tuple[Stage, ...]] = ()
    teacher_shape: Suppress[TeacherShape] = TrainConfig.teacher_shape
    recipe: Suppress[str] = TrainConfig.recipe
    checkpoint_every: Suppress[int] = TrainConfig.checkpoint_every
    keep: Suppress[int] = TrainConfig.keep
    eval_every: Suppress[int] = TrainConfig.eval_every
    log_every: Suppress[int] = TrainConfig.log_every

    def __post_init__(self):
        """Checked by `base`."""

    def base(self) -> TrainConfig:
        """What all runs share; the rate is set for each method."""
        settings = {f.name: getattr(self, f.name) for f in fields(TrainConfig)}
        sections = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig}
        return TrainConfig(**settings | {name: _plain(getattr(self, name), cls) for name, cls in sections.items()})

    def rates(self, recipes: Sequence[str]) -> dict[str, float]:
        """The highest rate of each recipe: its own, or that of all; with --tune, of those that have their own."""
        shared, own = None, {}
        for given in self.lr:
            name, _, rate = given.rpartition("=")
            try:
                value = float(rate)
            except ValueError:
                raise ConfigError(f"--lr: wanted a number or RECIPE=number, got {given!r}") from None
            if name:
                own[name] = value
            else:
                shared = value
        if not self.tune:
            return dict.fromkeys(recipes, OptimConfig.lr if shared is None else shared) | own
        if shared is not None and self.lr != (f"{OptimConfig.lr:g}",):
            raise ConfigError(
                f"--lr: with --tune, wanted only rates of single recipes, as mslt={shared:g}, got {shared:g}"
            )
        return own


Sweep = make_dataclass(
    "Sweep",
    [(name, options, field(default_factory=options)) for name, (_, options) in RECIPES.items() if fields(options)],
    bases=(_Sweep,),
    namespace={"__doc__": _Sweep.__doc__},
    frozen=True,
    kw_only=True,
)
"""With the options of every recipe, as --mslt.joint."""


@dataclass(frozen=True)
class Compare:
    """Show what runs cost to reach a loss: by FLOPs, tokens and time, and their losses at equal cost; seeds become mean and range."""

    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN...")]
    """Run directories, or folders of them, such as that of a sweep."""
    baseline: Annotated[str | None, arg(metavar="RUN|RECIPE")] = None
    """Whose final loss is the target; default: the recipe baseline, else the first run's method."""
    free_source: Flag = False
    """Leave out what earlier runs, teachers and source models cost."""
    flops: Literal["executed", "b1", "b2"] = "executed"
    """executed: the matrix products that ran; b1, b2: forwards of whole layers, a backward costing one or two of them."""
    clock: Literal["passed", "timed"] = "passed"
    """passed: the seconds that a run took; timed, of a sweep: its steps at what a step of their stage took when the sweep timed it, for runs
    on a machine that others used."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Write compare.json and compare.png there."""
    json: Json = False


@dataclass(frozen=True)
class Prepare:
    """Turn text into a directory of token shards, which pretrain takes in place of the text."""

    out: Annotated[Path, arg(metavar="DIR")]
    """The directory to write."""
    data: OmitArgPrefixes[_Text]
    workers: int = 0
    """Threads; 0 = one per CPU."""
    json: Json = False


@dataclass(frozen=True)
class Doctor:
    """Show versions, devices and which implementation each op takes and why; runs a 2-second self-test."""

    json: Json = False


@dataclass(frozen=True)
class Grow:
    """Deepen a Hugging Face checkpoint, or one of its Trainer's with the optimizer's state, and say where each tensor is from."""

    source: Annotated[Path, Positional, arg(metavar="IN")]
    """What save_pretrained or Trainer wrote, such as RUN/model or out/checkpoint-500."""
    out: Annotated[Path, Positional, arg(metavar="OUT")]
    """The directory to write; it must be new or empty."""
    layers: int
    """The new depth."""
    operator: Literal[GROWTH_OPERATORS] = "stack"
    """How new layers get their weights: copies (copy_top, stack, interleave), random, or identity (a pre-norm model keeps its function)."""
    optimizer_state: Literal[OPTIMIZER_STATES] = "copy"
    """Of a Trainer checkpoint: copy (by the same map), zero (none in layers that changed) or reset (none at all)."""
    seed: int = 0
    """For operators that draw new weights."""
    overwrite: Flag = False
    """Replace the checkpoint in OUT."""
    json: Json = False


@dataclass(frozen=True)
class Checkpoint:
    """Look after checkpoints: verify checks every byte of them against their manifests."""

    action: Positional[Literal["verify"]]
    """What to do."""
    directory: Annotated[Path, Positional, arg(metavar="DIR")]
    """A run directory, its checkpoints folder, or one checkpoint."""
    json: Json = False


@dataclass(frozen=True)
class Bench:
    """Check every op against float64, then time it beside its peers; compare two results (`stackbert bench --help`)."""


Command = (
    Annotated[Pretrain, subcommand("pretrain")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Prepare, subcommand("prepare")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Grow, subcommand("grow")]
    | Annotated[Checkpoint, subcommand("checkpoint")]
    | Annotated[Bench, subcommand("bench")]
)
DESCRIPTION = f"stackbert {__version__}: pre-train BERT by stacking layers, with fused kernels. `stackbert COMMAND --help` shows the options."


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"stackbert {__version__}")
        return DONE
    try:
        if arguments[:1] == ["bench"]:
            return _benchmarks()(arguments[1:], prog="stackbert bench")
        command = _parse(arguments)
        return COMMANDS[type(command)](command)
    except ConfigError as error:
        return complain(error, BAD_ARGUMENTS) if speaks() else BAD_ARGUMENTS
    except (CheckpointError, DistributedError, OSError) as error:
        return complain(error if speaks() else f"rank {place().rank}: {error}", FAILED)
    except KeyboardInterrupt:
        return complain("interrupted", FAILED)


def _benchmarks() -> Callable[..., int]:
    """Their `main`. They are installed as stackbert_kernels.benchmarks; in a source tree they lie beside the package."""
    name = f"{__package__}.benchmarks"
    if find_spec(name) is None:
        folder = Path(__file__).parents[1] / "benchmarks"
        if not (folder / "__main__.py").exists():
            raise ConfigError("bench: this installation has no benchmarks")
        spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return import_module(f"{name}.__main__").main


def _parse(arguments: list[str]):
    """tyro's objects from the arguments; its page about a wrong one becomes a ConfigError of one line."""
    page = io.StringIO()
    try:
        with contextlib.redirect_stderr(page):
            return tyro.cli(Command, prog="stackbert", description=DESCRIPTION, args=arguments)
    except SystemExit as end:
        if not end.code:
            raise
    raise ConfigError(_one_line(page.getvalue()))


def _one_line(page: str) -> str:
    """The message of a tyro error box: what stands above its first rule, and the option that it takes for the one meant."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", page)
    rows = [row.strip("│ ") for row in plain.splitlines() if not row.startswith(("╭", "╰"))]
    rows = [row for row in rows if row]
    if "╭" not in plain:  # where stdout is not UTF-8, title and rule stand where the box's upper edge would be
        rows = rows[2:]
    end = next((i for i, row in enumerate(rows) if not row.strip("─-")), len(rows))
    message, rest = " ".join(rows[:end]), rows[end:]
    message = re.sub(r"^Error parsing (__tyro-dummy-inner__\.)?\w[\w-]*: (?=[a-z0-9_]+[: ])", "", message)
    message = message.replace("__tyro-dummy-inner__.", "").removeprefix("Error parsing ")
    message = message.replace("invalid literal for int() with base 10:", "wanted a whole number, got")
    message = message.replace("could not convert string to float:", "wanted a number, got")
    message = re.sub(
        r"no type matching \{None\}\|(INT|FLOAT) could be instantiated from \[(.*?)\]\..*", _number_or_none, message
    )
    message = re.sub(r"Could not find valid parse for arguments: \[(.*)\]", r"wanted numbers, got \1", message)
    if not message.startswith("Unrecognized"):
        return message
    message = re.sub(r" \(applied to [^)]*\)| Arguments are applied to .*", "", message)
    first = next((i for i, row in enumerate(rest) if row.startswith("Available subcommands: ")), None)
    if first is not None:
        several = range(first, len(rest))  # rows, where the list is long
        last = next((i for i in several if not rest[i].endswith(",")), first)
        return f"{message}; commands are {' '.join(rest[first : last + 1]).removeprefix('Available subcommands: ')}"
    meant = next((row.split()[0].rstrip(",") for row in rest if row.startswith("--") and row.strip("-")), None)
    return f"{message}; did you mean {meant}?" if meant and meant not in message.split() else message


def _number_or_none(match: re.Match) -> str:
    return f"wanted {'a whole number' if match[1] == 'INT' else 'a number'} or None, got {match[2]}"


def complain(reason: object, code: int) -> int:
    """One line on stderr, and the exit code."""
    print(f"stackbert: {' '.join(str(reason).split())}", file=sys.stderr)
    return code


def _print(result: dict) -> None:
    print(json.dumps(result, indent=1))


def _plain(section, cls):
    """The section of a configuration, of its own class, that one of the command line's classes holds."""
    return cls(**{f.name: getattr(section, f.name) for f in fields(cls)})


# Commands. What is slow to load is loaded inside, once everything that can be refused without it has been looked at.


def _pretrain(command: Pretrain) -> int:
    from stackbert_kernels.train.run_directory import check, open_run

    config = command.config()
    several = check_ranks(config).size > 1
    if command.dry_run:
        config = check(config, command.out, fresh=command.fresh)
        if not speaks():
            return DONE
        if command.json:
            costs = [span_cost(span) for span in plan(config)]
            _print({"config": to_dict(config), "relative_step_cost": costs})
        else:
            print(command.outline(config))
        return DONE
    if config.device not in ("auto", "cpu") or config.impl != "auto":
        check(config, command.out, fresh=command.fresh)
        from stackbert_kernels.train.machine import check_machine

        check_machine(config)
    if several:
        from stackbert_kernels.train.loop import execute, together

        with together(config) as ranks:
            run = ranks.open(config, command.out, fresh=command.fresh)
            if ranks.rank == 0:
                _announce(run, command)
            result = execute(run, ranks=ranks)
    else:
        run = open_run(config, command.out, fresh=command.fresh, progress=True)
        _announce(run, command)

        from stackbert_kernels.train.loop import execute

        result = execute(run)
    if not speaks():
        return FAILED if result["status"] == "failed" else DONE
    if command.json:
        _print(result)
    else:
        print(summary(run.config, result))
    return FAILED if result["status"] == "failed" else DONE


def _announce(run: Run, command: Pretrain) -> None:
    if not run.finished:
        print(command.outline(run.config), file=sys.stderr)


def summary(config: TrainConfig, result: dict) -> str:
    """What train.loop.execute returned, for a person: the predicted cost of each stage beside the measured one."""
    lines = [result["message"]]
    if result["status"] == "finished":
        lines += ["", cost_table(config, result["stage_seconds"]), ""]
        lines += [
            f"held-out loss {'not finite' if result['eval_loss'] is None else format(result['eval_loss'], '.3f')} (without context {result['unigram_loss']:.3f}), "
            f"accuracy {result['eval_accuracy']:.3f} (without context {result['unigram_accuracy']:.3f}) "
            f"after {result['tokens']:,} tokens in {result['seconds']:.0f} s of training"
        ]
        lines += [f"model   {result['model'] or '-'}", f"report  {result['report']}"]
    return "\n".join(lines)


def _sweep(command: Sweep) -> int:
    from stackbert_kernels import sweep as sweeps

    if place().size > 1:
        raise ConfigError(f"sweep times its runs in one process, got {place().size}: start it without torchrun")
    recipes = tuple(name for name in command.recipes.split(",") if name)
    chosen = {name: getattr(command, name) for name, (_, options) in RECIPES.items() if fields(options)}
    sweep = sweeps.Sweep(
        base=command.base(),
        methods=recipes,
        directory=command.out,
        seconds=60 * command.minutes,
        seeds=command.seeds,
        warmup=command.warmup_share,
        jobs=command.jobs,
        tune=command.tune,
        tune_seconds=60 * (command.tune_minutes or command.minutes / 4),
        source_share=command.source_share,
        until=time.monotonic() + 60 * command.stop_after if command.stop_after else float("inf"),
        rates=command.rates(recipes),
        options={name: value for name, value in chosen.items() if value != type(value)()},
    )
    sweep = sweeps.checked(sweep, fresh=command.fresh)
    if command.dry_run:
        plan = sweeps.outline(sweep)
        _print({"outline": plan.splitlines(), **sweeps.amount(sweep)}) if command.json else print(plan)
        return DONE
    from stackbert_kernels.train.machine import check_machine

    check_machine(sweep.base)
    if command.fresh:
        sweeps.remove(sweep)
    print(sweeps.outline(sweep), file=sys.stderr)
    result = sweeps.run_sweep(sweep, say=lambda line: print(line, file=sys.stderr, flush=True))
    if command.json:
        _print(result)
    elif result["comparison"]:
        from stackbert_kernels.compare.table import text

        print(text(result["comparison"]))
    if result["status"] == "stopped":
        return complain("stopped; the same command goes on", FAILED)
    if result["status"] == "failed":
        return complain(f"{len(result['failed'])} of the runs failed: {', '.join(result['failed'])}", FAILED)
    return DONE if result["comparison"] else complain(result["why_none"], FAILED)


def _compare(command: Compare) -> int:
    from stackbert_kernels.compare.comparison import compare

    if not command.runs:
        raise ConfigError("compare: wanted at least one run directory, got none")
    result = compare(
        command.runs,
        baseline=command.baseline,
        free_source=command.free_source,
        counting=command.flops,
        clock=command.clock,
    )
    if command.out:
        from stackbert_kernels.compare.output import write

        written = write(result, command.out)
    if command.json:
        _print(result)
    else:
        from stackbert_kernels.compare.table import text

        print(text(result))
        if command.out:
            print("\n" + "\n".join(map(str, written)))
    return DONE


def _prepare(command: Prepare) -> int:
    from stackbert_kernels.data.prepare import load_manifest, prepare

    if not 0 <= command.workers <= MOST_WORKERS:
        raise ConfigError(f"workers must be in [0, {MOST_WORKERS}], got {command.workers}")
    directory = prepare(
        command.data.text, command.out, _plain(command.data, DataConfig), workers=command.workers or None
    )
    manifest = load_manifest(directory)
    result = {"out": str(directory), "vocab_size": manifest["vocab_size"]}
    result |= {
        split: {k: v for k, v in counts.items() if k != "shards"} for split, counts in manifest["splits"].items()
    }
    if command.json:
        _print(result)
    else:
        train, heldout = result["train"], result["heldout"]
        print(
            f"{directory}: {train['tokens']:,} tokens of {train['documents']:,} documents to train on, "
            f"{heldout['tokens']:,} of {heldout['documents']:,} held out, {result['vocab_size']:,} words"
        )
    return DONE


def _doctor(command: Doctor) -> int:
    from stackbert_kernels.doctor import doctor, render

    report = doctor()
    if command.json:
        _print(report)
    else:
        print(render(report))
    return DONE if report["passed"] else FAILED


def _grow(command: Grow) -> int:
    from stackbert_kernels.growth.checkpoint import grow_checkpoint

    report = grow_checkpoint(
        command.source,
        command.out,
        command.layers,
        command.operator,
        optimizer_state=command.optimizer_state,
        seed=command.seed,
        overwrite=command.overwrite,
    )
    if command.json:
        _print(report.to_dict())
    else:
        print(report)
    return DONE


def _checkpoint(command: Checkpoint) -> int:
    from stackbert_kernels.train.checkpoint import MANIFEST, saved, verify
    from stackbert_kernels.train.run_directory import CHECKPOINTS

    directory = command.directory
    paths = next((p for p in (saved(directory / CHECKPOINTS), saved(directory)) if p), [])
    if not paths and (directory / MANIFEST).exists():
        paths = [directory]
    if not paths:
        raise ConfigError(
            f"checkpoint verify needs a run directory, a checkpoints folder or a checkpoint, got {directory}"
        )
    problems = {str(path): verify(path) for path in paths}
    if command.json:
        _print(problems)
    else:
        for path, found in problems.items():
            print("\n".join(f"{path}: {problem}" for problem in found) or f"{path}: whole")
    return FAILED if any(problems.values()) else DONE


COMMANDS = {
    Pretrain: _pretrain,
    Sweep: _sweep,
    Compare: _compare,
    Prepare: _prepare,
    Doctor: _doctor,
    Grow: _grow,
    Checkpoint: _checkpoint,
}
