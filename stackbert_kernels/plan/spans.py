"""TrainConfig -> the spans that the loop executes: at each step the window, the rate, the layers that run, the pull of a teacher."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from stackbert_kernels.config import Alignment, LayerDrop, Stage, TrainConfig

WARMUP_SHARE = 0.02
"""Of all steps, where OptimConfig.warmup is 0."""


@dataclass(frozen=True)
class Span:
    """One stage at its place in the run: steps [first, last), counted from the start of the run."""

    stage: Stage
    index: int
    first: int
    last: int
    config: TrainConfig

    @property
    def grows(self) -> bool:
        return self.stage.grow is not None

    @property
    def name(self) -> str:
        return self.stage.name or f"stage {self.index + 1}"

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(most tokens of a sample, steps that have it), in the order of the steps; two where the length changes inside the stage."""
        data, change = self.config.data, min(max(self.config.short_steps, self.first), self.last)
        parts = ((data.short_seq_len, change - self.first), (data.seq_len, self.last - change))
        return tuple((seq_len, steps) for seq_len, steps in parts if steps)

    def at(self, step: int) -> Stage:
        """The window of `step`: the stage's own, or the prefix that this step draws (Stage.submodel). A function of seed and step."""
        prefixes = submodels(self.stage)
        if len(prefixes) == 1:
            return prefixes[0]
        digest = hashlib.blake2b(f"{self.config.seed} prefix of step {step}".encode(), digest_size=8).digest()
        return prefixes[int.from_bytes(digest) % len(prefixes)]

    def lr(self, step: int) -> float:
        """The learning rate of `step`."""
        if not self.first <= step < self.last:
            raise ValueError(f"Span.lr: step must be in [{self.first}, {self.last}) of {self.name}, got {step}")
        config, stage = self.config, self.stage
        warmup = warmup_steps(config)
        local = step - self.first
        if stage.lr_policy == "curve":
            return config.optim.lr * on_curve(stage.lr_curve, local)
        if stage.lr_policy == "restart":
            warmup = stage.rewarm or max(1, round(warmup * stage.steps / config.steps))
            constant = round(config.optim.constant * stage.steps / config.steps)
            return config.optim.lr * schedule(local, stage.steps, warmup, constant)
        again = min(1.0, (local + 1) / stage.rewarm) if stage.rewarm else 1.0
        return config.optim.lr * schedule(step, config.steps, warmup, config.optim.constant) * again

    def gates(self, step: int) -> tuple[float, ...] | None:
        """What each layer's residual branches are multiplied by in `step`, 0 = the layer is left out; None where all run as they are.

        A function of (seed, step) alone: every part of an accumulated step, and every process, leaves out the same layers.
        """
        if self.stage.drop.keep == 1:
            return None
        chances, scales = layer_chances(self.stage, theta(self.stage.drop, step - self.first))
        return tuple(
            scale if _uniform(self.config.seed, step, layer) < chance else 0.0
            for layer, (chance, scale) in enumerate(zip(chances, scales, strict=True))
        )

    def pull(self, step: int) -> float:
        """The weight of the alignment with the teacher in `step`; 0 = no teacher runs."""
        return pull(self.stage.align, step - self.first)


def pull(align: Alignment, t: float) -> float:
    """lambda after `t` steps."""
    return align.weight * max(0.0, (align.until - t) / align.until) if align.weight else 0.0


def theta(drop: LayerDrop, t: float) -> float:
    """How likely the last layer runs after `t` steps."""
    return (1 - drop.keep) * math.exp(-drop.gamma * t) + drop.keep


def layer_chances(stage: Stage, theta: float) -> tuple[list[float], list[float]]:
    """Of each layer: how likely it runs, and by what the residual branches are multiplied when it does."""
    L = stage.depth
    own = [1 - (layer + 1) / L * (1 - theta) for layer in range(L)]
    drawn = [1 - layer / L * (1 - theta) for layer in range(L)] if stage.drop.deepspeed_compat else own
    return drawn, [1 / chance for chance in own]


def expected_layers(stage: Stage) -> list[float]:
    """The share of the stage's steps in which each layer runs, in the mean over all draws."""
    drop = stage.drop
    if drop.keep == 1:
        return [1.0] * stage.depth
    decayed = -math.expm1(-drop.gamma * stage.steps) / -math.expm1(
        -drop.gamma
    )  # the sum of exp(-gamma t) over the steps
    return layer_chances(stage, drop.keep + (1 - drop.keep) * decayed / stage.steps)[0]


def _uniform(seed: int, step: int, layer: int) -> float:
    """In [0, 1)."""
    digest = hashlib.blake2b(f"{seed} layer {layer} of step {step}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def plan(config: TrainConfig) -> list[Span]:
    """The stages of `config` one after another; they cover steps [0, config.steps) exactly."""
    spans, first = [], 0
    for index, stage in enumerate(config.stages):
        spans.append(Span(stage, index, first, first + stage.steps, config))
        first += stage.steps
    return spans


@lru_cache(maxsize=64)
def submodels(stage: Stage) -> tuple[Stage, ...]:
    """The windows that steps of `stage` can have, each as often as the others."""
    n = stage.submodel
    if n == 0:
        return (stage,)
    kept = replace(
        stage, submodel=0, grow=None, optimizer_state="copy"
    )  # what holds when a stage is entered holds once
    return tuple(replace(kept, depth=depth, train_from=depth - n) for depth in range(n, stage.depth + 1, n))


def span_at(spans: Sequence[Span], step: int) -> Span:
    """The span that executes `step`."""
    for span in spans:
        if span.first <= step < span.last:
            return span
    raise ValueError(f"span_at: step must be in [0, {spans[-1].last}), got {step}")


def warmup_steps(config: TrainConfig) -> int:
    return config.optim.warmup or max(1, round(WARMUP_SHARE * config.steps))


def schedule(step: float, steps: float, warmup: float, constant: float = 0) -> float:
    """1/warmup, 2/warmup, ... 1 at step warmup - 1 and up to step warmup + constant, then linearly to 0 at `steps`, which is never
    executed. With a constant part it is the schedule of LANS (Zheng et al. 2020, arXiv 2006.13484), whose last step has the rate 0: the
    decay is one step later here."""
    if step < warmup:
        return (step + 1) / warmup
    if step < warmup + constant:
        return 1.0
    return (steps - step) / (steps - warmup - constant)


def on_curve(points: Sequence[Sequence[float]], step: float) -> float:
    """The height at `step` of the straight lines that join `points` (step, height)."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if step <= right:
            return low + (high - low) * (step - left) / (right - left)
    return points[-1][1]


def baseline_stage(config: TrainConfig) -> Stage:
    """All layers, all parameters, all steps: what a stage's cost is compared with."""
    return Stage(steps=config.steps, depth=config.model.layers)
