"""What a run is: frozen dataclasses, checked where they are built. Field names are the names of the command line's options.

Nothing here imports torch: a wrong option is refused before anything slow is loaded.
"""

from __future__ import annotations

import difflib
import itertools
import math
import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass, replace

ACTIVATIONS = ("gelu", "gelu_tanh")
NORMS = ("post", "pre")
OBJECTIVES = ("mlm", "mlm+nsp", "mlm+sop")
EMBEDDING_POLICIES = ("train", "freeze", "output_grad", "untie", "full")
OPTIMIZER_STATES = ("copy", "zero", "reset")
LR_POLICIES = ("global", "restart", "curve")
OPTIMIZERS = ("adamw", "lamb", "lans")
IMPLEMENTATIONS = ("auto", "reference", "native", "triton")
GROWTH_OPERATORS = ("copy_top", "stack", "interleave", "random", "identity")
"""The names of growth/depth.py's operators: known here so that a wrong one is refused before torch is loaded."""
UNSHARE = "unshare"
"""What Stage.grow says where layers that read one row of the bank get rows of their own (growth/share.py)."""
SHARED_GRADIENTS = ("sum", "mean")
RETIES = ("decoder", "mean")
FROM_SOURCE = ("fpi", "aki")
"""The names of growth/width.py's ways to begin with a smaller model's weights."""
WIDTH_MAPS = ("tile", "random")
RESHAPES = ("coalesce", "decoalesce")
"""What Stage.grow says where all axes of the model change at once (growth/multi_level.py)."""
LAYER_GROUPS = ("adjacent", "apart")
MAY_CHANGE_ON_RESUME = ("checkpoint_every", "keep", "log_every")
"""Settings that do not change any computed number."""


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line that says what was wanted and what was given."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        _require(0 < value < math.inf, f"{name} must be > 0 and finite, got {value}")


def _fraction(**values: float) -> None:
    for name, value in values.items():
        _require(0 <= value < 1, f"{name} must be in [0, 1), got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """A BERT encoder with its heads; `layers` is the final depth."""

    layers: int = 12
    """Encoder layers at the end."""
    hidden: int = 768
    """Width of the encoder."""
    heads: int = 12
    """Attention heads; hidden must be divisible by them."""
    inner: int = 0
    """Width of the feed-forward layer; 0 = 4 x hidden."""
    embedding: int = 0
    """Width of the embeddings, with a linear map to hidden after them (ALBERT); 0 = hidden, with none."""
    vocab_size: int = 0
    """Rows of the word embedding; 0 = as many as the tokenizer has words."""
    max_position: int = 512
    """Longest sequence that the model can read."""
    token_types: int = 2
    """Kinds of segments that tokens can belong to."""
    activation: str = "gelu"
    """gelu (erf, as BERT) or gelu_tanh."""
    norm: str = "post"
    """post (as BERT) or pre."""
    norm_eps: float = 1e-12
    """Added to variances in layer norms."""
    dropout: float = 0.1
    """After the embeddings and before each residual sum."""
    attention_dropout: float | None = None
    """On the attention probabilities; default: the same as dropout."""
    init_std: float = 0.02
    """Standard deviation of new weights."""
    equal_init: bool = False
    """Whether all layers begin with the weights of the first."""
    scaled_init: bool = False
    """Whether the matrices that end a residual branch begin with init_std / sqrt(2 layers)."""
    objective: str = "mlm"
    """mlm, mlm+nsp (next sentence) or mlm+sop (sentence order)."""

    def __post_init__(self):
        _positive(layers=self.layers, hidden=self.hidden, heads=self.heads, max_position=self.max_position)
        _positive(token_types=self.token_types, norm_eps=self.norm_eps, init_std=self.init_std)
        _require(
            self.hidden % self.heads == 0,
            f"hidden must be divisible by heads, got hidden {self.hidden}, heads {self.heads}",
        )
        _require(self.inner >= 0, f"inner must be >= 0, got {self.inner}")
        _require(self.embedding >= 0, f"embedding must be >= 0, got {self.embedding}")
        _require(self.vocab_size >= 0, f"vocab_size must be >= 0, got {self.vocab_size}")
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("norm", self.norm, NORMS)
        _one_of("objective", self.objective, OBJECTIVES)
        if self.inner == 0:
            object.__setattr__(self, "inner", 4 * self.hidden)
        if self.attention_dropout is None:
            object.__setattr__(self, "attention_dropout", self.dropout)
        # Masks take 8 random bits an element (contract 3.3): from 511/512 on, nothing would be kept.
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            _require(0 <= value < 511 / 512, f"{name} must be in [0, 0.998), got {value}")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def embedding_width(self) -> int:
        return self.embedding or self.hidden


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are batched and masked."""

    text: tuple[str, ...] = ()
    """Text files, globs, directories, .jsonl with a `text` field, or one prepared directory."""
    vocab: str = ""
    """vocab.txt or tokenizer.json; empty = train a WordPiece on the text."""
    train_vocab_size: int = 8192
    """Words of a WordPiece that is trained here."""
    lowercase: bool = True
    """Whether words lose case and accents; a given tokenizer.json has its own rules."""
    seq_len: int = 128
    """Most tokens of a sample, [CLS] and [SEP] included."""
    batch_tokens: int = 2048
    """Tokens of one step, over all accumulated parts; no padding is counted because there is none."""
    mask_rate: float = 0.15
    """Share of the tokens to predict; of these 80% are shown as [MASK], 10% as another word, 10% as they are."""
    whole_word: bool = False
    """Mask all pieces of a word together."""
    max_ngram: int = 1
    """Longest run of tokens (of words with whole_word) that is masked together, of length n with a probability in proportion to 1/n;
    1 = each by itself (BERT), 3 = ALBERT. Held-out text is always masked as with 1."""
    heldout: float = 0.01
    """Share of the documents kept for evaluation."""
    eval_tokens: int = 32768
    """Most held-out tokens read by one evaluation."""

    def __post_init__(self):
        _require(self.seq_len >= 8, f"seq_len must be >= 8, got {self.seq_len}")
        _require(
            self.batch_tokens >= self.seq_len,
            f"batch_tokens must be >= seq_len, got batch_tokens {self.batch_tokens}, seq_len {self.seq_len}",
        )
        _positive(train_vocab_size=self.train_vocab_size, eval_tokens=self.eval_tokens)
        _require(1 <= self.max_ngram <= 16, f"max_ngram must be in [1, 16], got {self.max_ngram}")
        _fraction(mask_rate=self.mask_rate, heldout=self.heldout)
        _positive(mask_rate=self.mask_rate, heldout=self.heldout)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, and a rate that warms up, may stay, and decays linearly to zero."""

    optimizer: str = "adamw"
    """adamw, lamb (a trust ratio for each parameter) or lans (that, with normalised gradients and Nesterov's momentum)."""
    lr: float = 1e-4
    """Highest learning rate."""
    warmup: int = 0
    """Steps of linear warm-up; 0 = 2% of all steps."""
    constant: int = 0
    """Steps at the highest rate between warm-up and decay."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    eps: float = 1e-6
    """Added to the root of the squared gradients' mean."""
    weight_decay: float = 0.01
    """Decoupled; of matrices and embeddings, not of biases and norms."""
    clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping. lans has none: there the length of gradients does not matter."""
    accumulate: int = 1
    """Parts into which a step's batch is cut, one backward each."""
    skip_limit: int = 10
    """Stop after this many steps in a row with a loss or gradient that is not finite."""

    def __post_init__(self):
        _positive(lr=self.lr, eps=self.eps, accumulate=self.accumulate, skip_limit=self.skip_limit)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _require(
            self.optimizer == "adamw" or self.eps >= 1e-30,
            f"eps must be >= 1e-30 with optimizer {self.optimizer}, got {self.eps}",
        )
        _fraction(beta1=self.beta1, beta2=self.beta2)
        for name in ("warmup", "constant", "weight_decay", "clip"):
            _require(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class LayerDrop:
    """Which layers a step leaves out (Zhang and He 2020, arXiv 2010.13369): of L layers, number l = 1..L runs with probability
    1 - (l / L) (1 - theta(t)), theta(t) = (1 - keep) exp(-gamma t) + keep, t the steps of the stage so far; what it adds is divided by that."""

    keep: float = 1.0
    """What theta falls to, the share of steps in which the last layer then still runs; 1 = nothing is left out."""
    gamma: float = 0.0
    """How fast theta falls."""
    deepspeed_compat: bool = False
    """As DeepSpeed's code has it: layers are drawn one place lower (the first never left out) than what they add is scaled for."""

    def __post_init__(self):
        _require(0 < self.keep <= 1, f"drop: keep must be in (0, 1], got {self.keep}")
        _require(0 <= self.gamma < math.inf, f"drop: gamma must be >= 0 and finite, got {self.gamma}")
        _require(self.keep == 1 or self.gamma > 0, f"drop: gamma must be > 0 with keep {self.keep}, got {self.gamma}")


@dataclass(frozen=True)
class Untying:
    """When layers that share rows part before their stage ends: by the cosine of the gradients of adjacent layers (Yang et al. 2021)."""

    every: int = 0
    """Steps between two readings; 0 = none, they share to the end of the stage."""
    below: float = 0.5
    """A cosine below this is low."""
    split: bool = False
    """No: all layers part once more than half of the cosines were low in three readings in a row (SWE-A). Yes: at each reading, a group
    of layers is split wherever the cosine of two that follow each other is low (SWE-M)."""

    def __post_init__(self):
        _require(self.every >= 0, f"untie: every must be >= 0, got {self.every}")
        _require(-1 <= self.below <= 1, f"untie: below must be in [-1, 1], got {self.below}")

    def due(self, step: int) -> bool:
        """Whether the gradients are read after `step` steps of the run."""
        return self.every > 0 and step % self.every == 0


@dataclass(frozen=True)
class Stage:
    """A stretch of steps with one active window: layers [0, depth) run, layers [train_from, depth) learn (contract 3.6)."""

    steps: int
    depth: int
    train_from: int = 0
    grow: str | None = None
    """How layers get their weights when depth rises: copy_top, stack, interleave, random or identity; unshare: layers that shared a row
    of the bank get copies of it; None = no growth."""
    rows: tuple[int, ...] = ()
    """The row of the bank that each layer reads; empty = its own. Layers with the same row share their weights."""
    ffn_rows: tuple[int, ...] = ()
    """The same for the feed-forward half of the layers, where that differs from the attention half."""
    shared_gradient: str = "sum"
    """What a shared row learns from: the sum over the layers that read it, or their mean."""
    embeddings: str = "train"
    """Word, position and type embeddings in this stage: train (in and out), freeze, output_grad (the tied word embedding learns from
    the decoder alone), untie (the decoder learns on a private copy), full (gradient through the frozen layers too)."""
    retie: str = "decoder"
    """What the word embedding becomes where this stage ends an untied one: the decoder's private copy, or the mean of the two."""
    optimizer_state: str = "copy"
    """Moments of new layers: copy (by the growth map), zero, or reset (all moments of all parameters)."""
    lr_policy: str = "global"
    """global: one warm-up and decay over the whole run; restart: this stage has its own; curve: lr_curve says it."""
    lr_curve: tuple[tuple[float, ...], ...] = ()
    """With lr_policy curve: points (step of the stage, share of the run's lr) from step 0 on, joined by straight lines; after the last the rate
    stays."""
    rewarm: int = 0
    """Steps over which this stage's rate rises from zero to the schedule's; with lr_policy restart, 0 = as the run's own warm-up,
    in proportion to the stage's steps."""
    frozen_dropout: bool = True
    """Whether the frozen layers keep dropout."""
    drop: LayerDrop = LayerDrop()
    """Which layers a step leaves out at random."""
    width_map: str = "tile"
    """Where grow begins from a smaller model: which neuron each new one copies, all in turn (tile) or random ones."""
    submodel: int = 0
    """0, or a divisor of depth: each step draws one of the depths submodel, 2 submodel, ..., depth, runs so many of the lowest layers and
    trains the topmost `submodel` of these."""
    untie: Untying = Untying()
    """When shared layers part of themselves."""
    hidden: int = 0
    """Width of the encoder in this stage, with heads and inner; 0 = the run's, of all three."""
    heads: int = 0
    """Attention heads in this stage."""
    inner: int = 0
    """Width of the feed-forward layer in this stage."""
    layer_groups: str = "adjacent"
    """Which layers grow="coalesce" makes one of, and "decoalesce" copies one to: adjacent ones, or those as far apart as possible."""
    alpha: float = 0.5
    """Share of the de-coalesced weights in grow="decoalesce"; the rest are the weights from before they were coalesced."""
    name: str = ""

    def __post_init__(self):
        _positive(steps=self.steps, depth=self.depth)
        _require(
            0 <= self.train_from < self.depth,
            f"train_from must be in [0, depth), got train_from {self.train_from}, depth {self.depth}",
        )
        _one_of("embeddings", self.embeddings, EMBEDDING_POLICIES)
        _one_of("optimizer_state", self.optimizer_state, OPTIMIZER_STATES)
        _one_of("lr_policy", self.lr_policy, LR_POLICIES)
        _one_of("retie", self.retie, RETIES)
        _one_of("shared_gradient", self.shared_gradient, SHARED_GRADIENTS)
        _check_rows(self)
        _check_untying(self)
        _require(
            self.drop.keep == 1 or self.train_from == 0,
            f"layers are left out only where all learn: train_from must be 0 with drop, got {self.train_from}",
        )
        _one_of("width_map", self.width_map, WIDTH_MAPS)
        _one_of("layer_groups", self.layer_groups, LAYER_GROUPS)
        _require(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")
        shape = (self.hidden, self.heads, self.inner)
        _require(min(shape) > 0 or max(shape) == 0, f"hidden, heads and inner go together in a stage, got {shape}")
        _check_submodel(self)
        _check_curve(self)
        _require(
            0 <= self.rewarm <= self.steps,
            f"rewarm must be in [0, steps], got rewarm {self.rewarm}, steps {self.steps}",
        )
        _require(
            self.train_from == 0 or self.embeddings != "train",
            f"embeddings cannot be 'train' where train_from is {self.train_from}: the boundary is detached; "
            "use freeze, output_grad, untie or full",
        )

    @property
    def attention_rows(self) -> tuple[int, ...]:
        """The row of the bank that each layer's attention half reads."""
        return self.rows or tuple(range(self.depth))

    @property
    def feed_forward_rows(self) -> tuple[int, ...]:
        return self.ffn_rows or self.attention_rows

    @property
    def bank_rows(self) -> int:
        """Rows [0, bank_rows) are read by a layer."""
        return max(self.attention_rows + self.feed_forward_rows) + 1


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. `stages` empty = one stage of all layers; else their steps must sum to `steps`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000
    """Optimizer steps of the whole run."""
    stages: tuple[Stage, ...] = ()
    recipe: str = "baseline"
    """The name of the recipe that made `stages`."""
    source: str = ""
    """Of recipes that begin from a smaller model (bert2bert): its run directory, or a transformers directory with a BERT."""
    seed: int = 0
    """Decides initial weights, order of samples, masks and dropout."""
    precision: str = "fp32"
    """fp32, or bf16 (autocast; weights, moments and statistics stay fp32)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    impl: str = "auto"
    """Implementation of the ops: auto, reference, native or triton."""
    threads: int = 0
    """CPU threads; 0 = as many as torch chooses."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one more at the end of each stage."""
    keep: int = 2
    """Checkpoints kept; older ones are removed."""
    eval_every: int = 500
    """Steps between evaluations on held-out text; one more at the end of each stage."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self):
        _positive(
            steps=self.steps,
            checkpoint_every=self.checkpoint_every,
            eval_every=self.eval_every,
            log_every=self.log_every,
        )
        _require(self.keep >= 1, f"keep must be >= 1, got {self.keep}")
        _require(self.threads >= 0, f"threads must be >= 0, got {self.threads}")
        _one_of("precision", self.precision, ("fp32", "bf16"))
        _one_of("impl", self.impl, IMPLEMENTATIONS)
        _require(
            self.device in ("auto", "cpu", "cuda") or (self.device.startswith("cuda:") and self.device[5:].isdigit()),
            f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}",
        )
        _require(
            self.data.seq_len <= self.model.max_position,
            f"seq_len must be <= max_position, got seq_len {self.data.seq_len}, max_position {self.model.max_position}",
        )
        _require(
            self.optim.warmup < self.steps,
            f"warmup must be < steps, got warmup {self.optim.warmup}, steps {self.steps}",
        )
        _require(
            self.optim.constant == 0 or self.optim.warmup + self.optim.constant < self.steps,
            f"warmup + constant must be < steps, got warmup {self.optim.warmup}, constant {self.optim.constant}, "
            f"steps {self.steps}",
        )
        if not self.stages:
            object.__setattr__(self, "stages", (Stage(steps=self.steps, depth=self.model.layers, name="all layers"),))
        _check_stages(self.stages, self.model.layers, self.steps)
        _check_levels(self.stages, self.model)
        _require(
            self.model.norm == "pre" or all(stage.drop.keep == 1 for stage in self.stages),
            f"layers can be left out of a pre-norm encoder: norm must be 'pre' with drop, got {self.model.norm!r}",
        )


def _check_curve(stage: Stage) -> None:
    points = stage.lr_curve
    _require(
        (stage.lr_policy == "curve") == bool(points),
        f"lr_curve belongs to lr_policy 'curve' and to no other, got lr_policy {stage.lr_policy!r} with {len(points)} points",
    )
    _require(
        all(len(point) == 2 and 0 <= point[1] < math.inf for point in points),
        f"lr_curve must hold pairs (step, share >= 0), got {points}",
    )
    if points:
        at = [point[0] for point in points]
        _require(
            at[0] == 0 and all(a < b for a, b in itertools.pairwise(at)),
            f"lr_curve must rise from step 0, got steps {at}",
        )


def _check_rows(stage: Stage) -> None:
    if not stage.rows:
        _require(
            not stage.ffn_rows and stage.shared_gradient == "sum" and stage.untie.every == 0,
            "ffn_rows, shared_gradient and untie need rows, got none",
        )
        return
    for name, rows in (("rows", stage.rows), ("ffn_rows", stage.feed_forward_rows)):
        _require(
            len(rows) == stage.depth and all(0 <= row <= i for i, row in enumerate(rows)),
            f"{name} must name, for each of {stage.depth} layers, one of the rows up to its own, got {rows}",
        )
    used = set(stage.rows) | set(stage.feed_forward_rows)
    _require(used == set(range(len(used))), f"rows must be numbered without a gap, got {sorted(used)}")
    _require(
        stage.train_from == 0,
        f"layers that share rows learn together: train_from must be 0 with rows, got {stage.train_from}",
    )
    _require(
        not stage.ffn_rows or stage.shared_gradient == "sum",
        "shared_gradient 'mean' is of whole layers: not with ffn_rows",
    )


def _check_untying(stage: Stage) -> None:
    if stage.untie.every == 0:
        return
    _require(not stage.ffn_rows, "untie parts whole layers: not with ffn_rows")
    _require(
        not stage.untie.split or list(stage.rows) == sorted(stage.rows),
        f"untie.split needs groups of layers that follow each other, got rows {stage.rows}",
    )


def check_unsharing(old: Stage, new: Stage, *, where: str = "") -> None:
    """Whether the layers of `new` can get their rows as copies of those they read in `old`; ConfigError if not."""
    _require(
        new.depth == old.depth and not (old.ffn_rows or new.ffn_rows),
        f"{where}{UNSHARE} is of whole layers at one depth, got depth {old.depth} -> {new.depth}, ffn_rows {new.ffn_rows}",
    )
    before = old.attention_rows
    for row in range(new.bank_rows):
        sources = {before[i] for i, r in enumerate(new.attention_rows) if r == row}
        _require(
            len(sources) == 1,
            f"{where}{UNSHARE} cannot merge: row {row} would gather layers of rows {sorted(sources)}, got {before} -> {new.attention_rows}",
        )


def _row_map(stage: Stage) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return stage.attention_rows, stage.feed_forward_rows


def _check_submodel(stage: Stage) -> None:
    _require(
        stage.submodel >= 0 and (stage.submodel == 0 or stage.depth % stage.submodel == 0),
        f"submodel must be 0 or a divisor of depth, got submodel {stage.submodel}, depth {stage.depth}",
    )
    _require(
        stage.submodel == 0 or (stage.train_from == 0 and stage.embeddings != "train"),
        "with submodel, the window moves from step to step: train_from must be 0 and embeddings freeze, output_grad, untie or full, "
        f"got train_from {stage.train_from}, embeddings {stage.embeddings!r}",
    )
    _require(
        stage.submodel == 0 or (not stage.rows and stage.drop.keep == 1),
        "submodel is of layers that have rows of their own and all run: not with rows or drop",
    )


def _check_stages(stages: tuple[Stage, ...], layers: int, steps: int) -> None:
    depth = stages[0].depth
    _require(
        stages[0].grow in (None, *FROM_SOURCE), f"stages[0]: there is nothing to grow from, got grow={stages[0].grow!r}"
    )
    for i, stage in enumerate(stages):
        before, where = stages[max(0, i - 1)], f"stages[{i}]: "
        if stage.grow in RESHAPES:
            depth = stage.depth
            continue
        _require(stage.depth >= depth, f"{where}depth {depth} -> {stage.depth} would drop layers")
        if stage.depth > depth:
            _require(
                not (before.rows or stage.rows),
                f"{where}layers that share rows cannot grow from depth {depth} to {stage.depth}: unshare them in a stage before",
            )
            _require(stage.grow is not None, f"{where}depth {depth} -> {stage.depth} needs grow, got grow=None")
            check_growth(stage.grow, depth, stage.depth, where=where)
        elif _row_map(stage) != _row_map(before):
            _require(
                stage.grow == UNSHARE, f"{where}rows change, which needs grow={UNSHARE!r}, got grow={stage.grow!r}"
            )
            check_unsharing(before, stage, where=where)
        elif i > 0:
            _require(stage.grow is None, f"{where}depth stays {depth}, got grow={stage.grow!r}")
        depth = stage.depth
    _require(
        depth == layers, f"stages[{len(stages) - 1}]: the last stage must reach all {layers} layers, got depth {depth}"
    )
    total = sum(stage.steps for stage in stages)
    _require(total == steps, f"stages: their steps must sum to {steps}, got {total}")


def stage_model(model: ModelConfig, stage: Stage) -> ModelConfig:
    """The run's `model` in the shape that it has in `stage`."""
    if stage.hidden == 0:
        return model
    return replace(model, layers=stage.depth, hidden=stage.hidden, heads=stage.heads, inner=stage.inner)


def _check_levels(stages: tuple[Stage, ...], model: ModelConfig) -> None:
    """Whether each coalescing makes a smaller model that fits, and each de-coalescing leads back to the one before it."""
    larger: list[ModelConfig] = []
    before = stages[0]
    _require(before.hidden == 0, f"stages[0]: the run begins with its own width, got hidden {before.hidden}")
    for i, stage in enumerate(stages):
        old, new, where = stage_model(model, before), stage_model(model, stage), f"stages[{i}]: "
        if stage.grow not in RESHAPES:
            _require(
                old == new, f"{where}the width changes by grow={' or '.join(map(repr, RESHAPES))}, got {stage.grow!r}"
            )
            before = stage
            continue
        whole = not before.rows and before.embeddings == "train" and before.depth == old.layers and not model.embedding
        _require(
            whole and stage.optimizer_state != "zero",
            f"{where}{stage.grow} is of whole models whose embeddings learn, without shared layers, factorised embedding or "
            "optimizer_state 'zero'",
        )
        if stage.grow == "coalesce":
            check_coalescing(old, new, where=where)
            larger.append(old)
        else:
            wanted = larger.pop() if larger else None
            _require(wanted == new, f"{where}decoalesce must lead back to the model that was coalesced last")
        before = stage
    _require(not larger and before.hidden == 0, "stages: what was coalesced must be de-coalesced before the run ends")


def check_coalescing(large: ModelConfig, small: ModelConfig, *, where: str = "") -> None:
    """Whether groups of indices of `large` make up `small`; ConfigError if not."""
    for name in ("layers", "heads", "hidden", "inner"):
        old, new = getattr(large, name), getattr(small, name)
        _require(old % new == 0, f"{where}{name} must be a multiple of the smaller model's, got {old} -> {new}")
    _require(
        large.head_dim == small.head_dim,
        f"{where}heads are grouped whole, so both models must have the same head dim (hidden / heads), "
        f"got {large.head_dim} -> {small.head_dim}",
    )


def check_growth(operator: str, old: int, new: int, *, where: str = "") -> None:
    """Whether `operator` can make `new` layers of `old` ones; ConfigError if not."""
    _require(
        operator in GROWTH_OPERATORS, f"{where}grow must be one of {', '.join(GROWTH_OPERATORS)}, got {operator!r}"
    )
    _require(0 < old < new, f"{where}{operator} needs 0 < old depth < new depth, got {old} -> {new}")
    if operator == "copy_top":
        _require(new <= 2 * old, f"{where}copy_top can at most double the depth, got {old} -> {new}")
    if operator in ("stack", "interleave"):
        _require(new % old == 0, f"{where}{operator} needs a multiple of the old depth, got {old} -> {new}")


def to_dict(config) -> dict:
    """A configuration as plain JSON values: nested dicts, lists, numbers, strings."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def _plain(value):
    if is_dataclass(value):
        return to_dict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def from_dict(values: dict, cls: type = TrainConfig):
    """The inverse of `to_dict`. A key that is missing takes its default; one that is unknown is a ConfigError."""
    return _read(cls, values, "")


def _read(wanted, value, where: str):
    """`value` (plain JSON) as the annotated type `wanted`; `where` is its path, such as stages[1].depth."""
    if is_dataclass(wanted):
        _require(isinstance(value, dict), f"{where or wanted.__name__} must be an object, got {value!r}")
        annotations = typing.get_type_hints(wanted)
        prefix = f"{where}." if where else ""
        for name in value:
            near = difflib.get_close_matches(name, annotations, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(annotations)}"
            _require(name in annotations, f"{wanted.__name__} has no field {prefix + name!r}{hint}")
        missing = [
            f.name for f in fields(wanted) if f.name not in value and f.default is f.default_factory
        ]  # both MISSING
        _require(
            not missing, f"{where or wanted.__name__} needs {', '.join(missing)}, got {', '.join(value) or 'nothing'}"
        )
        return wanted(**{name: _read(annotations[name], v, prefix + name) for name, v in value.items()})
    if typing.get_origin(wanted) is tuple:
        _require(isinstance(value, (list, tuple)), f"{where} must be a list, got {value!r}")
        item = typing.get_args(wanted)[0]
        return tuple(_read(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    choices = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if float in choices and type(value) is int:
        return float(value)
    fits = type(value) in choices
    names = " or ".join("null" if c is type(None) else c.__name__ for c in choices)
    _require(fits, f"{where} must be {names}, got {value!r}")
    return value


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """What keeps a run made with `old` from being continued with `new`: "lr: 0.001 -> 0.002", empty if nothing does."""
    found: list[str] = []
    for f in fields(old):
        if f.name not in MAY_CHANGE_ON_RESUME:
            _compare(f.name, getattr(old, f.name), getattr(new, f.name), found)
    return found


def _compare(name: str, old, new, found: list[str]) -> None:
    if is_dataclass(old):
        for f in fields(old):
            # The sections of TrainConfig add nothing to a name (field names are unique over them); stages[i] does.
            inner = f"{name}.{f.name}" if isinstance(old, Stage | LayerDrop | Untying) else f.name
            _compare(inner, getattr(old, f.name), getattr(new, f.name), found)
    elif name == "stages" and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            _compare(f"stages[{i}]", a, b, found)
    elif name == "stages":
        found.append(f"stages: {len(old)} stages -> {len(new)} stages")
    elif old != new:
        found.append(f"{name}: {old!r} -> {new!r}")
