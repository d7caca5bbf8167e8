"""ALBERT: a factorised embedding and layers that share their weights for the whole run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import ConfigError, Stage, TrainConfig

SHARED = ("all", "attention", "ffn", "none")
PUBLISHED_WIDTH = 128


@dataclass(frozen=True)
class AlbertOptions:
    """The defaults are the paper's, as this package knows them."""

    share: str = "all"
    """What the layers of a group share: all, attention, ffn, or none."""
    groups: int = 1
    """Groups of consecutive layers, each with its own weights."""
    embedding: int = 0
    """Width of the embeddings; 0 = what --embedding says, else 128, or hidden where that is less."""
    sop: bool = True
    """Whether sentence order is an objective beside masked words; no = the objective that --objective names."""
    max_ngram: int = 3
    """Longest run of tokens that is masked together; --max-ngram, where it is given, goes before."""

    def __post_init__(self):
        if self.share not in SHARED:
            raise ConfigError(f"albert: share must be one of {', '.join(SHARED)}, got {self.share!r}")
        for name, least in (("groups", 1), ("embedding", 0), ("max_ngram", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"albert: {name} must be >= {least}, got {getattr(self, name)}")


def albert(base: TrainConfig, options: AlbertOptions = AlbertOptions()) -> TrainConfig:
    """Lan et al. 2020, "ALBERT" (ICLR, arXiv 1909.11942): one layer applied `layers` times, V x 128 embeddings, sentence order, n-grams.

    It saves parameters and their communication, not FLOPs. Sets the model's embedding and objective and the data's max_ngram. The
    paper trains with LAMB at 1.76e-3 and 4,096 sequences a step: `--optimizer lamb --lr 1.76e-3`.
    """
    layers, groups = base.model.layers, options.groups
    if layers % groups:
        fitting = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        raise ConfigError(f"albert: layers must be divisible by groups, got layers {layers}, groups {groups}; groups that fit: {fitting}")  # fmt: skip
    if options.sop and base.model.objective == "mlm+nsp":
        raise ConfigError("albert: sentence order takes the place of next sentence: wanted objective mlm or mlm+sop, or "
                          "no sop, got objective mlm+nsp with sop")  # fmt: skip
    model = replace(
        base.model,
        embedding=options.embedding or base.model.embedding or min(PUBLISHED_WIDTH, base.model.hidden),
        objective="mlm+sop" if options.sop else base.model.objective,
    )
    own = tuple(range(layers))
    group = tuple(i * groups // layers for i in range(layers))
    rows, ffn_rows = {"all": (group, ()), "attention": (group, own), "ffn": (own, group), "none": ((), ())}[
        options.share
    ]
    if group == own:
        rows = ffn_rows = ()
    stage = Stage(steps=base.steps, depth=layers, rows=rows, ffn_rows=ffn_rows, name=f"{options.share} shared")
    data = base.data if base.data.max_ngram > 1 else replace(base.data, max_ngram=options.max_ngram)
    return replace(base, model=model, data=data, stages=(stage,), recipe="albert")
