"""bert2BERT: begin with a smaller model's weights, grown in width and depth; train random sub-models first, then the whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackbert_kernels.config import FROM_SOURCE, WIDTH_MAPS, ConfigError, Stage, TrainConfig

EMBEDDINGS = ("freeze", "output_grad", "untie", "full")


@dataclass(frozen=True)
class Bert2bertOptions:
    """The defaults are the paper's best where its figures are known, but for width_map: it draws at random."""

    init: str = "aki"
    """New heads and inner neurons: aki (of the layer above, so that copies differ; keeps no function) or fpi (of the same layer; keeps the
    function where the new hidden size is a multiple of the source's)."""
    width_map: str = "tile"
    """Which neurons are copied: all in turn (tile: evenly where sizes are multiples) or random ones, as in the paper."""
    submodel: int = 0
    """In the first part, each step runs the lowest submodel, 2 submodel, ... layers and trains the topmost `submodel` of them (3 of 12 as
    published); 0 = the largest divisor of layers up to a quarter of them."""
    share: float = 0.125
    """Of all steps, the first part (5 of 40 epochs as published; 20 make most of the saving vanish); 0 = none."""
    embeddings: str = "freeze"
    """Embeddings in the first part: freeze, output_grad, untie or full."""

    def __post_init__(self):
        choices = (("init", FROM_SOURCE), ("width_map", WIDTH_MAPS), ("embeddings", EMBEDDINGS))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ConfigError(f"bert2bert: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.submodel < 0:
            raise ConfigError(f"bert2bert: submodel must be >= 0, got {self.submodel}")
        if not 0 <= self.share < 1:
            raise ConfigError(f"bert2bert: share must be in [0, 1), got {self.share}")


def bert2bert(base: TrainConfig, options: Bert2bertOptions = Bert2bertOptions()) -> TrainConfig:
    """Chen et al. 2022, "bert2BERT: Towards Reusable Pretrained Language Models" (ACL, arXiv 2110.07143).

    The model of base.source, a finished run or any BERT of transformers with the same tokenizer and head dim, is widened (growth/width.py)
    and its layers stacked: whole copies, then the topmost ones once more. Operators and the two parts are the paper's; the authors' code is
    not public, and that embeddings stay as they are in the first part is this package's reading of "updates only its top layers". What the
    source cost is not in the predicted speed-up.
    """
    layers = base.model.layers
    submodel = options.submodel or next(n for n in range(max(1, layers // 4), 0, -1) if layers % n == 0)
    if layers % submodel:
        fitting = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        raise ConfigError(
            f"bert2bert: layers must be divisible by submodel, got layers {layers}, submodel {submodel}; what fits: {fitting}"
        )
    first = round(options.share * base.steps)
    if base.steps - first < 1 or (options.share > 0 and first < 1):
        raise ConfigError(
            f"bert2bert: steps must leave each part (share {options.share}) at least 1, got steps {base.steps}"
        )
    begins = {"grow": options.init, "width_map": options.width_map}
    whole = {"steps": base.steps - first, "depth": layers, "name": "all layers"}
    if first == 0:
        return replace(base, stages=(Stage(**whole, **begins),), recipe="bert2bert")
    parts = Stage(
        steps=first, depth=layers, submodel=submodel, embeddings=options.embeddings, name="sub-models", **begins
    )
    return replace(base, stages=(parts, Stage(**whole)), recipe="bert2bert")
