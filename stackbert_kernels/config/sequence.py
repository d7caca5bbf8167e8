"""What must hold between the stages of a run."""

from __future__ import annotations

from dataclasses import replace

from stackbert_kernels.config.checks import require
from stackbert_kernels.config.sections import ModelConfig
from stackbert_kernels.config.stage import Stage

GROWTH_OPERATORS = ("copy_top", "stack", "interleave", "random", "identity")
"""The names of growth/depth.py's operators: known here so that a wrong one is refused before torch is loaded."""
UNSHARE = "unshare"
"""What Stage.grow says where layers that read one row of the bank get rows of their own (growth/share.py)."""
FROM_SOURCE = ("fpi", "aki")
"""The names of growth/width.py's ways to begin with a smaller model's weights."""
LEVELS = ("coalesce", "decoalesce")
"""What Stage.grow says where all axes of the model change at once (growth/multi_level.py)."""
REFINE = "refine"
"""What Stage.grow says where relaxed layers (Stage.rank, .score_dim) become whole (growth/refine.py)."""
WIDEN = "widen"
"""What Stage.grow says where the feed-forward layer alone becomes wider (growth/feed_forward.py)."""
RESHAPES = (*LEVELS, REFINE, WIDEN)
"""What makes a new model and a new optimizer."""


def check_unsharing(old: Stage, new: Stage, *, where: str = "") -> None:
    """Whether the layers of `new` can get their rows as copies of those they read in `old`; ConfigError if not."""
    require(
        new.depth == old.depth and not (old.ffn_rows or new.ffn_rows),
        f"{where}{UNSHARE} is of whole layers at one depth, got depth {old.depth} -> {new.depth}, ffn_rows {new.ffn_rows}",
    )
    before = old.attention_rows
    for row in range(new.bank_rows):
        sources = {before[i] for i, r in enumerate(new.attention_rows) if r == row}
        require(
            len(sources) == 1,
            f"{where}{UNSHARE} cannot merge: row {row} would gather layers of rows {sorted(sources)}, got {before} -> {new.attention_rows}",
        )


def _row_map(stage: Stage) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return stage.attention_rows, stage.feed_forward_rows


def check_stages(stages: tuple[Stage, ...], layers: int, steps: int) -> None:
    depth = stages[0].depth
    require(
        stages[0].grow in (None, *FROM_SOURCE), f"stages[0]: there is nothing to grow from, got grow={stages[0].grow!r}"
    )
    for i, stage in enumerate(stages):
        before, where = stages[max(0, i - 1)], f"stages[{i}]: "
        if stage.grow in LEVELS:
            depth = stage.depth
            continue
        require(stage.depth >= depth, f"{where}depth {depth} -> {stage.depth} would drop layers")
        if stage.depth > depth:
            require(
                not (before.rows or stage.rows),
                f"{where}layers that share rows cannot grow from depth {depth} to {stage.depth}: unshare them in a stage before",
            )
            require(stage.grow is not None, f"{where}depth {depth} -> {stage.depth} needs grow, got grow=None")
            check_growth(stage.grow, depth, stage.depth, where=where)
        elif _row_map(stage) != _row_map(before):
            require(stage.grow == UNSHARE, f"{where}rows change, which needs grow={UNSHARE!r}, got grow={stage.grow!r}")
            check_unsharing(before, stage, where=where)
        elif i > 0:
            require(stage.grow in (None, REFINE, WIDEN), f"{where}depth stays {depth}, got grow={stage.grow!r}")
        depth = stage.depth
    require(
        depth == layers, f"stages[{len(stages) - 1}]: the last stage must reach all {layers} layers, got depth {depth}"
    )
    total = sum(stage.steps for stage in stages)
    require(total == steps, f"stages: their steps must sum to {steps}, got {total}")


def stage_model(model: ModelConfig, stage: Stage) -> ModelConfig:
    """The run's `model` in the shape that it has in `stage`."""
    if stage.hidden:
        model = replace(model, layers=stage.depth, hidden=stage.hidden, heads=stage.heads, inner=stage.inner)
    elif stage.inner:
        model = replace(model, inner=stage.inner)
    if stage.rank or stage.score_dim:
        model = replace(model, rank=stage.rank, score_dim=stage.score_dim)
    return model


def check_levels(stages: tuple[Stage, ...], model: ModelConfig) -> None:
    """Whether each coalescing makes a smaller model that fits, each de-coalescing leads back to the one before it, and each widening is
    one; the last stage has the run's own shape."""
    larger: list[ModelConfig] = []
    before = stages[0]
    require(before.hidden == 0, f"stages[0]: the run begins with its own width, got hidden {before.hidden}")
    require(
        before.inner == 0 or before.grow is None,
        f"stages[0]: what begins from a source begins with the run's own width, got inner {before.inner}",
    )
    for i, stage in enumerate(stages):
        old, new, where = stage_model(model, before), stage_model(model, stage), f"stages[{i}]: "
        require(
            stage.grow not in RESHAPES or before.align.weight == 0,
            f"{where}{stage.grow} cannot follow a stage with a teacher",
        )
        if old.relaxed or new.relaxed or stage.grow == REFINE:
            _check_relaxed(before, stage, old, new, where)
            before = stage
            continue
        if stage.grow == WIDEN:
            _check_widened(before, stage, old, new, where)
            before = stage
            continue
        if stage.grow not in LEVELS:
            by = " or ".join(map(repr, (*LEVELS, WIDEN)))
            require(old == new, f"{where}the width changes by grow={by}, got {stage.grow!r}")
            before = stage
            continue
        whole = not before.rows and before.embeddings == "train" and before.depth == old.layers and not model.embedding
        require(
            whole and stage.optimizer_state != "zero",
            f"{where}{stage.grow} is of whole models whose embeddings learn, without shared layers, factorised embedding or "
            "optimizer_state 'zero'",
        )
        if stage.grow == "coalesce":
            check_coalescing(old, new, where=where)
            larger.append(old)
        else:
            wanted = larger.pop() if larger else None
            require(wanted == new, f"{where}decoalesce must lead back to the model that was coalesced last")
        before = stage
    require(before.pool == 1, f"stages: the last stage must read every token, got pool {before.pool}")
    require(not larger and before.hidden == 0, "stages: what was coalesced must be de-coalesced before the run ends")
    last = stage_model(model, before)
    require(
        not last.relaxed,
        f"stages: relaxed layers must be refined before the run ends, got rank {last.rank}, score_dim {last.score_dim}",
    )
    require(
        last.inner == model.inner,
        f"stages: inner must be the run's {model.inner} before the run ends, got {last.inner}",
    )


def _check_widened(before: Stage, stage: Stage, old: ModelConfig, new: ModelConfig, where: str) -> None:
    """Whether the feed-forward layer alone gets a multiple of the neurons that it had."""
    require(
        new.inner > old.inner and new.inner % old.inner == 0 and new == replace(old, inner=new.inner),
        f"{where}{WIDEN} makes a multiple of inner and changes no other size, got inner {old.inner} -> {new.inner}, "
        f"hidden {old.hidden} -> {new.hidden}, heads {old.heads} -> {new.heads}",
    )
    require(
        not (before.rows or stage.rows) and before.embeddings == "train" and stage.optimizer_state != "zero",
        f"{where}{WIDEN} is of layers with rows of their own, after a stage in which all learns, without optimizer_state 'zero'",
    )


def _check_relaxed(before: Stage, stage: Stage, old: ModelConfig, new: ModelConfig, where: str) -> None:
    """Whether a stage can follow one of relaxed layers (or be the first, as its own predecessor)."""
    require(
        stage.grow not in (*LEVELS, *FROM_SOURCE, WIDEN),
        f"{where}relaxed layers (rank, score_dim) have no rule for {stage.grow}: {REFINE} them in a stage before",
    )
    if stage.grow != REFINE:
        require(
            new == old,
            f"{where}rank and score_dim change by grow={REFINE!r}, got {stage.grow!r} with rank {old.rank} -> {new.rank}, "
            f"score_dim {old.score_dim} -> {new.score_dim}",
        )
        return
    require(
        new != old
        and new == replace(old, rank=new.rank, score_dim=new.score_dim)
        and new.rank in (0, old.rank)
        and new.score_dim in (0, old.score_dim),
        f"{where}{REFINE} makes rank or score_dim 0 and changes nothing else, got rank {old.rank} -> {new.rank}, "
        f"score_dim {old.score_dim} -> {new.score_dim}",
    )
    require(
        before.embeddings == "train",
        f"{where}{REFINE} follows a stage in which all learns: embeddings must be 'train' there, got {before.embeddings!r}",
    )


def check_coalescing(large: ModelConfig, small: ModelConfig, *, where: str = "") -> None:
    """Whether groups of indices of `large` make up `small`; ConfigError if not."""
    for name in ("layers", "heads", "hidden", "inner"):
        old, new = getattr(large, name), getattr(small, name)
        require(old % new == 0, f"{where}{name} must be a multiple of the smaller model's, got {old} -> {new}")
    require(
        large.head_dim == small.head_dim,
        f"{where}heads are grouped whole, so both models must have the same head dim (hidden / heads), "
        f"got {large.head_dim} -> {small.head_dim}",
    )


def check_growth(operator: str, old: int, new: int, *, where: str = "") -> None:
    """Whether `operator` can make `new` layers of `old` ones; ConfigError if not."""
    require(operator in GROWTH_OPERATORS, f"{where}grow must be one of {', '.join(GROWTH_OPERATORS)}, got {operator!r}")
    require(0 < old < new, f"{where}{operator} needs 0 < old depth < new depth, got {old} -> {new}")
    if operator == "copy_top":
        require(new <= 2 * old, f"{where}copy_top can at most double the depth, got {old} -> {new}")
    if operator in ("stack", "interleave"):
        require(new % old == 0, f"{where}{operator} needs a multiple of the old depth, got {old} -> {new}")
