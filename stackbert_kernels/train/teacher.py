"""The finished model that a run learns from: whether it fits, and the model itself, frozen. Nothing here loads torch before there is work.

A teacher is what a source is (growth/source.py): a run that has written model/, or any directory of transformers with a BERT. It may have any
depth and width; what it must share are the words, so that both read the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from stackbert_kernels.config import ConfigError, Stage, TeacherShape, TrainConfig
from stackbert_kernels.growth.source import load_source, read_settings, source_shape

if TYPE_CHECKING:
    import torch

    from stackbert_kernels.model.bert import Bert

TEACHER = "teacher"


@dataclass(frozen=True)
class Pull:
    """What a step adds to the loss: `weight` times the alignment of the model's `layer` with what the teacher makes of the same tokens."""

    teacher: Bert
    layer: int
    weight: float


def check_teacher(config: TrainConfig) -> TrainConfig:
    """`config` with what is known of the teacher; ConfigError if the run cannot learn from it."""
    if not any(stage.align.layer for stage in config.stages):
        if config.teacher:
            raise ConfigError(
                f"teacher: recipe {config.recipe} learns from text alone, late_to_early from a teacher, got {config.teacher}"
            )
        return config
    if not config.teacher:
        raise ConfigError(
            f"{config.recipe}: --teacher must name a finished run or a transformers directory with a BERT"
        )
    if find_spec("transformers") is None:
        raise ConfigError(f"teacher: {config.teacher} is read by transformers: pip install transformers")
    shape = source_shape(config.teacher, TEACHER)
    if shape.max_position < config.data.seq_len:
        raise ConfigError(
            f"teacher: it must have a position for each of seq_len {config.data.seq_len} tokens, got {shape.max_position}"
        )
    if shape.vocab_size < config.model.vocab_size:
        raise ConfigError(f"teacher: it must know all {config.model.vocab_size} words, got {shape.vocab_size}")
    if config.model.objective != "mlm":
        _check_pairs(config, shape.token_types)
    return replace(config, teacher_shape=TeacherShape(shape.layers, shape.hidden, shape.inner))


def _check_pairs(config: TrainConfig, token_types: int) -> None:
    """Whether the teacher knows a second segment. Of a run the objective is known; of others, how many kinds of tokens they have."""
    objective = config.model.objective
    if token_types < 2:
        raise ConfigError(f"teacher: objective {objective} needs 2 token types, got {token_types}")
    path = Path(config.teacher)
    for run in (path, path.parent):
        if (run / "config.json").is_file():
            settings = read_settings(run, TEACHER)
            trained = settings["model"].get("objective") if "stages" in settings and "recipe" in settings else None
            if trained == "mlm":
                raise ConfigError(
                    f"teacher: objective {objective} has two segments a sample, got a run that saw one (objective mlm): {config.teacher}"
                )


def load_teacher(config: TrainConfig, stage: Stage, device: torch.device) -> Bert | None:
    """The teacher of `stage`, without dropout, gradients or the memory for them; None where it has none."""
    if stage.align.weight == 0:
        return None
    teacher = load_source(config.teacher, TEACHER).to(device).eval().requires_grad_(False)
    teacher.bank.freeze()
    teacher.impl = config.impl
    return teacher
