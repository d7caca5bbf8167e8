"""CoRe, coarse-refined training: cheaper layers first, then whole ones that compute the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import OPTIMIZER_STATES, REFINE, ConfigError, Stage, TrainConfig
from stackbert_kernels.recipes.steps import rewarm

LR_POLICIES = ("global", "restart")


@dataclass(frozen=True)
class CoreOptions:
    """What the paper's abstract leaves open, which is everything but the two phases; the defaults are those of this package."""

    relaxed: float = 0.5
    """Share of all steps with relaxed layers."""
    rank: int | None = None
    """Of the products that stand for the feed-forward's matrices in relaxed layers; default: a quarter of hidden, 0.31 of the parameters
    and FLOPs. 0 = whole matrices."""
    score_dim: int | None = None
    """Width of a head's queries and keys in relaxed layers; default: half the head's. 0 = as wide as its values."""
    optimizer_state: str = "copy"
    """Adam moments where layers become whole: copy (those of products and of new channels begin at zero, all others go on), zero (layers
    begin without), reset (all)."""
    lr_policy: str = "global"
    """global: one warm-up and decay over the run; restart: each stage has its own."""
    rewarm: int | None = None
    """Steps over which the rate rises again with whole layers; default: a tenth of the stage's steps, at most 1000."""

    def __post_init__(self):
        if not 0 < self.relaxed < 1:
            raise ConfigError(f"core: relaxed must be in (0, 1), got {self.relaxed}")
        for name in ("rank", "score_dim", "rewarm"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"core: {name} must be >= 0, got {value}")
        for name, choices in (("optimizer_state", OPTIMIZER_STATES), ("lr_policy", LR_POLICIES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"core: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


def core(base: TrainConfig, options: CoreOptions = CoreOptions()) -> TrainConfig:
    """Yang et al. 2020, "CoRe: An Efficient Coarse-refined Training Framework for BERT" (arXiv 2011.13633): a relaxed BERT, with cheaper
    attention and factorised feed-forward matrices, is trained first; then it becomes an ordinary one (growth/refine.py) and trains on.

    That much is in the abstract; no number is, nor what the cheaper attention is. Here both are such that the function is kept exactly: each
    feed-forward matrix is a product of two without a nonlinearity between them, and a head's queries and keys have fewer channels than its
    values. The latter makes the projections cheaper and not the scores, for attention's kernels take one width: narrow queries and keys are
    filled up with zeros in one pass (model/narrow_scores.py). On a CPU core that takes back all that the default saves there at hidden 128,
    where `score_dim` 0 is as fast, and little of it at 768.

    Not offered: one pair of query and key matrices for a group of layers, which would become whole exactly, too, but saves no FLOPs; and one
    attention map for several layers, which would not.
    """
    model = base.model
    rank = min(model.hidden, model.inner) // 4 if options.rank is None else options.rank
    score_dim = model.head_dim // 2 if options.score_dim is None else options.score_dim
    if not rank and not score_dim:
        raise ConfigError("core: rank or score_dim must be > 0, or nothing is relaxed")
    most = -(-model.hidden * model.inner // (model.hidden + model.inner)) - 1
    if rank > most:
        raise ConfigError(f"core: rank must be <= {most}, or two factors are no smaller than the matrix, got {rank}")
    if score_dim >= model.head_dim:
        raise ConfigError(f"core: score_dim must be < hidden / heads = {model.head_dim}, got {score_dim}")
    steps = round(options.relaxed * base.steps)
    if not 0 < steps < base.steps:
        raise ConfigError(
            f"core: steps must leave both stages (relaxed {options.relaxed:g}) at least 1, got steps {base.steps}"
        )
    rest, shared = base.steps - steps, {"depth": model.layers, "lr_policy": options.lr_policy}
    named = [f"rank {rank}"] * bool(rank) + [f"scores {score_dim} of {model.head_dim}"] * bool(score_dim)
    stages = (
        Stage(steps=steps, rank=rank, score_dim=score_dim, name=", ".join(named), **shared),
        Stage(steps=rest, grow=REFINE, optimizer_state=options.optimizer_state, rewarm=rewarm(rest, options.rewarm),
              name="whole", **shared),
    )  # fmt: skip
    return replace(base, stages=stages, recipe="core")
