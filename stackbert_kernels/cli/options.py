"""The commands and their options, as dataclasses whose fields are those of config. Loads nothing slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, Suppress, arg, subcommand

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
)
from stackbert_kernels.recipes import (
    RECIPES,
    AlbertOptions,
    AutoOptions,
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
    late_to_early (an early layer follows a finished model at first, --teacher), auto (stacking, as it paid most where it was measured)."""
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
    auto: AutoOptions = field(default_factory=AutoOptions)

    def __post_init__(self):
        """Checked by `config`: the recipe may make the stages that these settings need."""

    def base(self) -> TrainConfig:
        """What these options say, before the recipe makes its stages of it."""
        settings = {f.name: getattr(self, f.name) for f in fields(TrainConfig)}
        settings |= {"model": section(self.model, ModelConfig), "data": section(self.data, DataConfig)}
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
        return TrainConfig(**settings | {name: section(getattr(self, name), cls) for name, cls in sections.items()})

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


def section(given, cls):
    """The section of a configuration, of its own class, that one of the command line's classes holds."""
    return cls(**{f.name: getattr(given, f.name) for f in fields(cls)})
