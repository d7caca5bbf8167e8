"""CompoundGrow: begin with a model that is cheap in several dimensions at once, and grow one kind of dimension at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import POOL_KINDS, WIDEN, ConfigError, Stage, TrainConfig
from stackbert_kernels.recipes.steps import divide

STAGES = 3
OPTIMIZER_STATES = ("reset", "copy")
LR_POLICIES = ("global", "restart")


@dataclass(frozen=True)
class CompoundGrowOptions:
    """The operators and their order are those of the authors' code; the paper's own list of stages is not known."""

    shares: tuple[float, ...] = (0.3, 0.2, 0.5)
    """Of all steps, in proportion: half of the layers, with narrow feed-forward layers and pooled tokens; all layers of that kind; all
    whole."""
    inner_ratio: int = 2
    """The feed-forward layer begins so many times narrower; 1 = in its full width."""
    pool: int = 2
    """Tokens that share a row of the encoder at first, besides [CLS] and those to be predicted; 1 = each has its own."""
    pool_kind: str = "mean"
    """What becomes of their embeddings: mean, or of each column the max."""
    split_noise: float = 0.0
    """How unevenly the copies of a feed-forward neuron share what it gives, relative to equal shares; 0.5, say, parts them. 0 = equally, as
    published: their gradients are then equal for good, and the wider layer learns no more than the narrow one. The function is kept either way."""
    optimizer_state: str = "reset"
    """Adam moments at a growth: reset (as published) or copy (by the maps of the weights)."""
    lr_policy: str = "global"
    """global: one warm-up and decay over the run; restart: each stage has its own (the authors rebuild the rate for each stage)."""

    def __post_init__(self):
        if len(self.shares) != STAGES or not all(0 < share < float("inf") for share in self.shares):
            raise ConfigError(f"compound_grow: shares must be {STAGES} numbers > 0, one a stage, got {self.shares}")
        if self.inner_ratio < 1:
            raise ConfigError(f"compound_grow: inner_ratio must be >= 1, got {self.inner_ratio}")
        if self.pool < 1:
            raise ConfigError(f"compound_grow: pool must be >= 1, got {self.pool}")
        if not 0 <= self.split_noise < float("inf"):
            raise ConfigError(f"compound_grow: split_noise must be >= 0 and finite, got {self.split_noise}")
        choices = (("pool_kind", POOL_KINDS), ("optimizer_state", OPTIMIZER_STATES), ("lr_policy", LR_POLICIES))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"compound_grow: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )


def compound_grow(base: TrainConfig, options: CompoundGrowOptions = CompoundGrowOptions()) -> TrainConfig:
    """Gu et al. 2021, "On the Transformer Growth for Progressive BERT Training" (NAACL, arXiv 2010.12562).

    Half of the layers, with a narrower feed-forward layer and pooled tokens; then all layers (growth/depth.py, stack); then the full
    feed-forward layer (growth/feed_forward.py) and every token. From the authors' code: the operators, that an event stacks or recovers the
    rest and never does both, that copied neurons share equally what they give, that the optimizer begins anew, and that predicted tokens are
    not pooled. Ours: the shares and sizes of the stages; `split_noise`; windows that begin at position 1 and average what is there, where that code pools padded sequences; and a first layer whose
    keys and values are pooled, too, where that code's first layer reads the unpooled tokens. Left out: layers that reuse the attention of
    the layer below, and windows that are concatenated and mapped, whose map growth would drop.

    Held-out loss is always that of the full text, each token by itself, so that it compares with other recipes'; in pooled stages
    the model is measured on more rows than it is trained on.
    """
    model = base.model
    if model.layers % 2:
        raise ConfigError(f"compound_grow: layers must be even, got {model.layers}")
    if model.inner % options.inner_ratio:
        raise ConfigError(
            f"compound_grow: inner must be divisible by inner_ratio {options.inner_ratio}, got inner {model.inner}"
        )
    steps = divide(base.steps, options.shares)
    if min(steps) < 1:
        raise ConfigError(f"compound_grow: steps must leave each of {STAGES} stages at least 1, got steps {base.steps}")
    inner = model.inner // options.inner_ratio
    shared = {"optimizer_state": options.optimizer_state, "lr_policy": options.lr_policy}
    cheap = {"inner": inner if options.inner_ratio > 1 else 0, "pool": options.pool, "pool_kind": options.pool_kind}
    kind = f", inner {inner}, pool {options.pool}"
    half, whole = model.layers // 2, model.layers
    last = Stage(steps=steps[2], depth=whole, name="all", **shared)
    if options.inner_ratio > 1:
        last = replace(last, grow=WIDEN, split_noise=options.split_noise)
    stages = (
        Stage(steps=steps[0], depth=half, name=f"{half} layers{kind}", **shared, **cheap),
        Stage(steps=steps[1], depth=whole, grow="stack", name=f"{whole} layers{kind}", **shared, **cheap),
        last,
    )
    return replace(base, stages=stages, recipe="compound_grow")
