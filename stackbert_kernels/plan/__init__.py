"""TrainConfig -> the spans that the loop executes, and what they cost. Pure: nothing here reads a file, a clock or a tensor.

spans.py    the stages at their places in the run, and what each step does: window, rate, layers, teacher
sizes.py    parameters: of the model, and those that a stage updates
cost.py     of a step, in forwards of one layer and in FLOPs
table.py    both for a person
"""

from __future__ import annotations

from stackbert_kernels.plan.cost import (
    flops_per_step,
    flops_per_token,
    head_cost,
    layer_flops,
    pooled_length,
    relative_step_cost,
    span_cost,
    span_flops,
    step_cost,
    teacher_flops,
)
from stackbert_kernels.plan.sizes import (
    attention_parameters,
    bank_rows,
    embedding_parameters,
    feed_forward_parameters,
    head_parameters,
    layer_parameters,
    model_parameters,
    projection_shape,
    trainable_parameters,
    vocab_size,
)
from stackbert_kernels.plan.spans import (
    Span,
    baseline_stage,
    expected_layers,
    layer_chances,
    plan,
    pull,
    schedule,
    span_at,
    submodels,
    theta,
    warmup_steps,
)
from stackbert_kernels.plan.table import cost_table

__all__ = ["Span", "attention_parameters", "bank_rows", "baseline_stage", "cost_table", "embedding_parameters",
           "expected_layers", "feed_forward_parameters", "flops_per_step", "flops_per_token", "head_cost", "head_parameters",
           "layer_chances", "layer_flops", "layer_parameters", "model_parameters", "plan", "pooled_length", "projection_shape", "pull",
           "relative_step_cost", "schedule", "span_at", "span_cost", "span_flops", "step_cost", "submodels", "teacher_flops", "theta",
           "trainable_parameters", "vocab_size", "warmup_steps"]  # fmt: skip
