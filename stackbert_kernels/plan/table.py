"""The table of stages and their cost that --dry-run prints."""

from __future__ import annotations

from collections.abc import Sequence

from stackbert_kernels.config import ConfigError, TrainConfig
from stackbert_kernels.plan.cost import BACKWARD, flops_per_token, head_cost, span_cost, span_flops, teacher_flops
from stackbert_kernels.plan.sizes import trainable_parameters
from stackbert_kernels.plan.spans import Span, baseline_stage, plan


def cost_table(config: TrainConfig, seconds_per_step: Sequence[float] | None = None) -> str:
    """What the run will do and cost, a line a stage; with measured seconds per step (one a stage), beside them.

    `layers` is the cost of a step relative to one of the whole model (with samples of data.seq_len tokens) by `step_cost` with the head,
    `FLOPs` the same by `flops_per_token`, `share` the stage's part of all FLOPs.
    """
    spans = plan(config)
    if seconds_per_step is not None and len(seconds_per_step) != len(spans):
        raise ConfigError(
            f"cost_table: seconds_per_step must have {len(spans)} numbers, one a stage, got {len(seconds_per_step)}"
        )
    full = baseline_stage(config)
    full_flops = flops_per_token(config, full)
    flops = [span_flops(span) for span in spans]
    simple = [span_cost(span) for span in spans]
    total = sum(f * span.stage.steps for f, span in zip(flops, spans, strict=True))

    header = ["stage", "name", "steps", "depth", "train from", "trainable", "layers", "FLOPs", "share"]
    rows = []
    for span, f, cost in zip(spans, flops, simple, strict=True):
        stage = span.stage
        rows.append(
            [
                str(span.index),
                span.name,
                str(stage.steps),
                f"{stage.submodel}-{stage.depth}" if stage.submodel else str(stage.depth),
                f"top {stage.submodel}" if stage.submodel else str(stage.train_from),
                f"{trainable_parameters(config, stage):,}",
                f"{cost:.3f}",
                f"{f / full_flops:.3f}",
                f"{100 * f * stage.steps / total:.1f}%",
            ]
        )
    if seconds_per_step is not None:
        whole = [
            s
            for s, span in zip(seconds_per_step, spans, strict=True)
            if (span.stage.depth, span.stage.train_from) == (full.depth, 0)
        ]
        header += ["ms/step", "measured"]
        for row, seconds in zip(rows, seconds_per_step, strict=True):
            row += [f"{1e3 * seconds:.1f}", f"{seconds / whole[-1]:.3f}" if whole else "-"]

    if config.short_steps:
        header.insert(3, "seq len")
        for row, span in zip(rows, spans, strict=True):
            row.insert(3, "-".join(str(seq_len) for seq_len, _ in span.lengths))
    ordinary = Span(full, 0, 0, config.steps, config)  # with the same lengths
    by_layers = (
        config.steps * span_cost(ordinary) / sum(c * span.stage.steps for c, span in zip(simple, spans, strict=True))
    )
    by_flops = config.steps * span_flops(ordinary) / total
    data, lengths = config.data, []
    if config.short_steps:
        lengths = [
            f"samples of up to {data.short_seq_len} tokens in steps 0-{config.short_steps}, then of up to {data.seq_len}: "
            f"{total / sum(flops_per_token(config, s.stage) * s.stage.steps for s in spans):.2f} of the FLOPs of {data.seq_len} throughout"
        ]
    return "\n".join([
        *_aligned([header, *rows]),
        *lengths,
        *_teacher_lines(config, full_flops),
        f"predicted speed-up over training all layers for as many steps: {by_layers:.2f}x by layers (b = {BACKWARD:g}, "
        f"head = {head_cost(config.model, config.data):.3f} layer forwards), {by_flops:.2f}x by FLOPs",
        f"total: {config.steps} steps, {config.steps * config.data.batch_tokens:,} tokens, {total * config.data.batch_tokens:.2e} FLOPs",
    ])  # fmt: skip


def _teacher_lines(config: TrainConfig, full_flops: float) -> list[str]:
    shape, learning = config.teacher_shape, [stage for stage in config.stages if stage.align.weight]
    if not learning:
        return []
    steps, flops = sum(stage.steps for stage in learning), teacher_flops(config, learning[0])
    return [
        f"teacher: {shape.layers} layers, hidden {shape.hidden}, forward in {steps} steps: {flops / full_flops:.3f} of a full step's FLOPs, "
        "counted above; what its own training cost is not"
    ]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns of equal width; names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) if i == 1 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]  # fmt: skip
