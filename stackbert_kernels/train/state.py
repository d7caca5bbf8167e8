"""What a run has done so far: counted, logged, saved, and put back where a run goes on."""

from __future__ import annotations

import math
import statistics
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from stackbert_kernels.config import ConfigError, Stage, TrainConfig, differences, from_dict, stage_model, to_dict
from stackbert_kernels.growth.reshape import Kept
from stackbert_kernels.growth.share import parted
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.plan import Span, bank_rows, plan, projection_shape, span_at
from stackbert_kernels.train import checkpoint
from stackbert_kernels.train.console import Console
from stackbert_kernels.train.distributed import ALONE, Ranks
from stackbert_kernels.train.optim import Optimizer
from stackbert_kernels.train.run_directory import Metrics, Run, cut_metrics, finite

TIMED_STEPS = 200
"""The median of so many last steps of a stage is its measured time."""


@dataclass
class State:
    """What a run has done so far; with parameters and moments, all that going on needs."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    """Of training and growth, waiting for batches included; evaluation, saving and preparation are not in it."""
    skipped: int = 0
    skipped_in_row: int = 0
    rows: list[int] = field(default_factory=list)
    """The rows that layers read since they parted inside a stage; empty = as the stage says."""
    low_readings: int = 0
    since_log: dict[str, float] = field(
        default_factory=lambda: {"loss": 0.0, "steps": 0, "tokens": 0, "seconds": 0.0, "skipped": 0}
    )
    stage_seconds: list[list[float]] = field(default_factory=list)
    """One list a stage so far; two for a stage in which the length of samples changes."""
    eval: dict[str, float] = field(default_factory=dict)


class Log:
    """Appends an event with the place in the run that every line has; only rank 0 does."""

    def __init__(self, path: Path, state: State, ranks: Ranks = ALONE):
        self.metrics, self.state = Metrics(path) if ranks.rank == 0 else None, state

    def __call__(self, span: Span, event: str, **values) -> None:
        if self.metrics is None:
            return
        state, stage = self.state, span.stage
        place = {"step": state.step, "stage": span.index, "depth": stage.depth, "train_from": stage.train_from}
        spent = {"tokens": state.tokens, "flops": state.flops, "seconds": state.seconds}
        self.metrics.append(event, **place, **spent, **values)

    def sync(self) -> None:
        if self.metrics is not None:
            self.metrics.sync()

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()


def count(
    state: State, loss: float, tokens: int, cost: float, seconds: float, skipped: bool, alignment: float | None
) -> None:
    state.step += 1
    state.tokens += tokens
    state.flops += cost * tokens
    state.seconds += seconds
    state.skipped += skipped
    state.skipped_in_row = state.skipped_in_row + 1 if skipped else 0
    state.since_log["skipped"] += skipped
    state.since_log["tokens"] += tokens
    state.since_log["seconds"] += seconds
    if math.isfinite(loss):
        state.since_log["loss"] += loss
        state.since_log["steps"] += 1
        if alignment is not None and math.isfinite(alignment):
            state.since_log["alignment"] = state.since_log.get("alignment", 0.0) + alignment
    state.stage_seconds[-1] = [*state.stage_seconds[-1][1 - TIMED_STEPS :], seconds]


def stage_seconds(state: State, config: TrainConfig) -> list[float]:
    """Of each stage so far: how long a step takes, the median; where the length of samples changes in it, the mean over both lengths."""
    medians, seconds = iter([statistics.median(s) for s in state.stage_seconds]), []
    for span in plan(config):
        lengths = [(each, steps) for (_, steps), each in zip(span.lengths, medians, strict=False)]
        if not lengths:
            break
        seconds.append(lengths[0][0])
        if len(lengths) > 1:
            seconds[-1] = sum(each * steps for each, steps in lengths) / sum(steps for _, steps in lengths)
    return seconds


def mean_loss(state: State) -> float:
    return state.since_log["loss"] / state.since_log["steps"] if state.since_log["steps"] else math.nan


def interval(state: State) -> dict:
    since = state.since_log
    figures = {"tokens_per_second": since["tokens"] / since["seconds"], "skipped": since["skipped"]}
    return figures | ({"alignment": since["alignment"] / since["steps"]} if "alignment" in since else {})


def use(model: Bert, optimizer: Optimizer, span: Span) -> None:
    shape = projection_shape(span.config, span.stage)
    model.project_to(shape[0] if shape else 0, span.config.seed)
    set_window(model, optimizer, span.stage)


def set_window(model: Bert, optimizer: Optimizer, stage: Stage) -> None:
    model.use(
        stage.depth, stage.train_from, stage.embeddings, stage.frozen_dropout, stage.rows, stage.ffn_rows, stage.retie
    )
    optimizer.set_window(stage)


def as_parted(span: Span, state: State) -> Span:
    """`span` as it is since layers that shared rows parted inside it."""
    if not state.rows or state.step == span.first:
        return span
    return replace(span, stage=parted(span.stage, tuple(state.rows)))


def save(run: Run, model: Bert, optimizer: Optimizer, state: State, kept: Kept, ranks: Ranks = ALONE) -> Path:
    """The checkpoint, which rank 0 writes."""
    require_same(model, optimizer, f"after step {state.step}", ranks)
    if ranks.rank > 0:
        return run.checkpoints / f"step-{state.step}"
    tensors = {
        "model": {"bank": model.bank.weights, **model.always_on_parameters()},
        "optimizer": optimizer.state_dict(),
    }
    if kept:
        tensors["kept"] = {f"{i}.{name}": t for i, weights in enumerate(kept) for name, t in weights.items()}
    if model.word_before is not None:
        tensors["before"] = {"word": model.word_before}
    scores = {name: finite(value) for name, value in state.eval.items()}  # of a run that diverges
    documents = {"state": asdict(state) | {"eval": scores}, "config": to_dict(run.config)}
    return checkpoint.save(run.checkpoints, state.step, tensors, documents, keep=run.config.keep)


def require_same(model: Bert, optimizer: Optimizer, when: str, ranks: Ranks) -> None:
    moments = {"exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
    ranks.require_same({"bank": model.bank.weights, **model.always_on_parameters(), **moments}, when)


def inside(run: Run, path: Path) -> str:
    return str(path.relative_to(run.directory))


def _new(config: TrainConfig, stage: Stage, device: torch.device) -> tuple[Bert, Optimizer]:
    """A model of the shape that it has in `stage`, and its optimizer."""
    rows = None if stage.hidden else bank_rows(config)
    shape = stage_model(config.model, stage)
    model = Bert(shape, seed=config.seed, device=device, impl=config.impl, rows=rows)
    return model, Optimizer(model, config.optim)


def restore(
    run: Run, device: torch.device, console: Console, ranks: Ranks = ALONE
) -> tuple[Bert, Optimizer, State, Kept]:
    """What the newest valid checkpoint holds, and the log put back to where it was then; all new where there is none."""
    newest = ranks.first(lambda: str(checkpoint.latest(run.checkpoints, warn=console.line) or ""))
    path = Path(newest) if newest else None
    if path is None:
        if checkpoint.saved(run.checkpoints):
            raise checkpoint.CheckpointError(
                f"no checkpoint in {run.checkpoints} is whole; --fresh starts over, nothing was changed"
            )
        if ranks.rank == 0:
            cut_metrics(run.metrics, None)
        return *_new(run.config, run.config.stages[0], device), State(), []
    tensors, documents = checkpoint.load(path)
    differing = differences(from_dict(documents["config"]), run.config)
    if differing:
        raise ConfigError(f"{path} is of another configuration: {'; '.join(differing)} (there -> wanted)")
    state = State(**documents["state"])
    # A checkpoint at the end of a stage still has that stage's shape, depth and window; the loop then enters the next one.
    span = as_parted(span_at(plan(run.config), max(0, state.step - 1)), state)
    model, optimizer = _new(run.config, span.stage, device)
    if state.step:
        use(model, optimizer, span)
    with torch.no_grad():
        parameters = {"bank": model.bank.weights, **model.always_on_parameters()}
        for name, tensor in _matching(tensors["model"], parameters, path).items():
            parameters[name].copy_(tensor)
        before = {} if model.word_before is None else {"word": model.word_before}
        for name, tensor in _matching(tensors.get("before", {}), before, path).items():
            before[name].copy_(tensor)
    optimizer.load_state_dict(tensors["optimizer"])
    if not run.finished and ranks.rank == 0:
        in_log = cut_metrics(run.metrics, state.step)
        if not in_log:
            with closing(Log(run.metrics, state)) as log:
                log(span, "checkpoint", path=inside(run, path))
        console.line(f"going on from {path.name} of {run.config.steps} steps in {run.directory}")
    kept: Kept = []
    for name, tensor in sorted(tensors.get("kept", {}).items()):
        level, _, name = name.partition(".")
        kept += [{} for _ in range(int(level) + 1 - len(kept))]
        kept[int(level)][name] = tensor
    return model, optimizer, state, kept


def _matching(saved: dict[str, Tensor], parameters: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    shapes, wanted = ({n: list(t.shape) for n, t in tensors.items()} for tensors in (saved, parameters))
    if shapes != wanted:
        name = min(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n))
        raise checkpoint.CheckpointError(f"{path}: {name} must be {wanted.get(name)}, got {shapes.get(name)}")
    return saved
