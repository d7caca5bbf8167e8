"""A stretch of steps, and what must hold in it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from stackbert_kernels.config.checks import one_of, positive, require

EMBEDDING_POLICIES = ("train", "freeze", "output_grad", "untie", "full")
OPTIMIZER_STATES = ("copy", "zero", "reset")
LR_POLICIES = ("global", "restart", "curve")
SHARED_GRADIENTS = ("sum", "mean")
RETIES = ("decoder", "mean")
WIDTH_MAPS = ("tile", "random")
LAYER_GROUPS = ("adjacent", "apart")
POOL_KINDS = ("mean", "max")
LARGEST_POOL = 255
"""So that a place in a window fits a byte."""


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
        require(0 < self.keep <= 1, f"drop: keep must be in (0, 1], got {self.keep}")
        require(0 <= self.gamma < math.inf, f"drop: gamma must be >= 0 and finite, got {self.gamma}")
        require(self.keep == 1 or self.gamma > 0, f"drop: gamma must be > 0 with keep {self.keep}, got {self.gamma}")


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
        require(self.every >= 0, f"untie: every must be >= 0, got {self.every}")
        require(-1 <= self.below <= 1, f"untie: below must be in [-1, 1], got {self.below}")

    def due(self, step: int) -> bool:
        """Whether the gradients are read after `step` steps of the run."""
        return self.every > 0 and step % self.every == 0


@dataclass(frozen=True)
class Alignment:
    """A layer's output is pulled towards a teacher's last one (Zhao et al. 2026, arXiv 2602.05393): the loss gets lambda(t) times minus the
    mean cosine of the two over all tokens, lambda(t) = weight * max(0, (until - t) / until), t the steps of the stage so far."""

    layer: int = 0
    """Which layer, counted from 1; 0 = none."""
    weight: float = 0.0
    """lambda at the first step; 0 = no teacher runs."""
    until: int = 0
    """The step at which lambda is 0."""

    def __post_init__(self):
        require(self.layer >= 0, f"align: layer must be >= 0, got {self.layer}")
        require(0 <= self.weight < math.inf, f"align: weight must be >= 0 and finite, got {self.weight}")
        require(
            self.weight == 0 or (self.layer >= 1 and self.until >= 1),
            f"align: layer and until must be >= 1 with weight {self.weight}, got layer {self.layer}, until {self.until}",
        )


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
    align: Alignment = Alignment()
    """Which layer is pulled towards the teacher's last, and how strongly (TrainConfig.teacher)."""
    width_map: str = "tile"
    """Where grow begins from a smaller model: which neuron each new one copies, all in turn (tile) or random ones."""
    submodel: int = 0
    """0, or a divisor of depth: each step draws one of the depths submodel, 2 submodel, ..., depth, runs so many of the lowest layers and
    trains the topmost `submodel` of these."""
    untie: Untying = Untying()
    """When shared layers part of themselves."""
    hidden: int = 0
    """Width of the encoder in this stage, with heads and inner; 0 = the run's."""
    heads: int = 0
    """Attention heads in this stage."""
    inner: int = 0
    """Width of the feed-forward layer in this stage; without hidden and heads, it alone differs from the run's."""
    split_noise: float = 0.0
    """Where grow="widen" copies a neuron: its copies share what it gives, equally but for noise of this size, relative to the equal share."""
    rank: int = 0
    """Each matrix of the feed-forward layer is the product of two of this rank in this stage; 0 = one matrix, as the run ends with."""
    score_dim: int = 0
    """Width of a head's queries and keys in this stage; 0 = that of its values, as the run ends with."""
    pool: int = 1
    """The encoder reads one pooled embedding for so many tokens; [CLS] and the tokens that are predicted stay as they are. 1 = all do."""
    pool_kind: str = "mean"
    """What becomes of the embeddings of a window: their mean, or of each column the max."""
    layer_groups: str = "adjacent"
    """Which layers grow="coalesce" makes one of, and "decoalesce" copies one to: adjacent ones, or those as far apart as possible."""
    alpha: float = 0.5
    """Share of the de-coalesced weights in grow="decoalesce"; the rest are the weights from before they were coalesced."""
    name: str = ""

    def __post_init__(self):
        positive(steps=self.steps, depth=self.depth)
        require(
            0 <= self.train_from < self.depth,
            f"train_from must be in [0, depth), got train_from {self.train_from}, depth {self.depth}",
        )
        one_of("embeddings", self.embeddings, EMBEDDING_POLICIES)
        one_of("optimizer_state", self.optimizer_state, OPTIMIZER_STATES)
        one_of("lr_policy", self.lr_policy, LR_POLICIES)
        one_of("retie", self.retie, RETIES)
        one_of("shared_gradient", self.shared_gradient, SHARED_GRADIENTS)
        _check_rows(self)
        _check_untying(self)
        require(
            self.drop.keep == 1 or self.train_from == 0,
            f"layers are left out only where all learn: train_from must be 0 with drop, got {self.train_from}",
        )
        one_of("width_map", self.width_map, WIDTH_MAPS)
        one_of("layer_groups", self.layer_groups, LAYER_GROUPS)
        one_of("pool_kind", self.pool_kind, POOL_KINDS)
        require(1 <= self.pool <= LARGEST_POOL, f"pool must be in [1, {LARGEST_POOL}], got {self.pool}")
        require(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")
        shape = (self.hidden, self.heads, self.inner)
        alone = self.hidden == self.heads == 0 <= self.inner
        require(min(shape) > 0 or alone, f"hidden, heads and inner go together in a stage, got {shape}")
        require(0 <= self.split_noise < math.inf, f"split_noise must be >= 0 and finite, got {self.split_noise}")
        require(
            self.split_noise == 0 or self.grow == "widen",
            f"split_noise belongs to grow 'widen', got grow={self.grow!r}",
        )
        _check_submodel(self)
        _check_alignment(self)
        _check_curve(self)
        require(
            0 <= self.rewarm <= self.steps,
            f"rewarm must be in [0, steps], got rewarm {self.rewarm}, steps {self.steps}",
        )
        require(
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


def _check_curve(stage: Stage) -> None:
    points = stage.lr_curve
    require(
        (stage.lr_policy == "curve") == bool(points),
        f"lr_curve belongs to lr_policy 'curve' and to no other, got lr_policy {stage.lr_policy!r} with {len(points)} points",
    )
    require(
        all(len(point) == 2 and 0 <= point[1] < math.inf for point in points),
        f"lr_curve must hold pairs (step, share >= 0), got {points}",
    )
    if points:
        at = [point[0] for point in points]
        require(
            at[0] == 0 and all(a < b for a, b in itertools.pairwise(at)),
            f"lr_curve must rise from step 0, got steps {at}",
        )


def _check_rows(stage: Stage) -> None:
    if not stage.rows:
        require(
            not stage.ffn_rows and stage.shared_gradient == "sum" and stage.untie.every == 0,
            "ffn_rows, shared_gradient and untie need rows, got none",
        )
        return
    for name, rows in (("rows", stage.rows), ("ffn_rows", stage.feed_forward_rows)):
        require(
            len(rows) == stage.depth and all(0 <= row <= i for i, row in enumerate(rows)),
            f"{name} must name, for each of {stage.depth} layers, one of the rows up to its own, got {rows}",
        )
    used = set(stage.rows) | set(stage.feed_forward_rows)
    require(used == set(range(len(used))), f"rows must be numbered without a gap, got {sorted(used)}")
    require(
        stage.train_from == 0,
        f"layers that share rows learn together: train_from must be 0 with rows, got {stage.train_from}",
    )
    require(
        not stage.ffn_rows or stage.shared_gradient == "sum",
        "shared_gradient 'mean' is of whole layers: not with ffn_rows",
    )


def _check_untying(stage: Stage) -> None:
    if stage.untie.every == 0:
        return
    require(not stage.ffn_rows, "untie parts whole layers: not with ffn_rows")
    require(
        not stage.untie.split or list(stage.rows) == sorted(stage.rows),
        f"untie.split needs groups of layers that follow each other, got rows {stage.rows}",
    )


def _check_alignment(stage: Stage) -> None:
    align = stage.align
    if align.weight == 0:
        return
    require(
        stage.train_from < align.layer <= stage.depth,
        f"align: layer must be one that learns, of {stage.train_from + 1} to {stage.depth}, got {align.layer}",
    )
    require(
        align.until >= stage.steps,
        f"align: a stage ends where its teacher does: until must be >= steps, got until {align.until}, steps {stage.steps}",
    )
    require(stage.pool == 1, f"align: the teacher has a vector for every token: not with pool {stage.pool}")
    require(stage.submodel == 0, f"align: the layer must be there in every step: not with submodel {stage.submodel}")


def _check_submodel(stage: Stage) -> None:
    require(
        stage.submodel >= 0 and (stage.submodel == 0 or stage.depth % stage.submodel == 0),
        f"submodel must be 0 or a divisor of depth, got submodel {stage.submodel}, depth {stage.depth}",
    )
    require(
        stage.submodel == 0 or (stage.train_from == 0 and stage.embeddings != "train"),
        "with submodel, the window moves from step to step: train_from must be 0 and embeddings freeze, output_grad, untie or full, "
        f"got train_from {stage.train_from}, embeddings {stage.embeddings!r}",
    )
    require(
        stage.submodel == 0 or (not stage.rows and stage.drop.keep == 1),
        "submodel is of layers that have rows of their own and all run: not with rows or drop",
    )
