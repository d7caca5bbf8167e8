"""The loop: it executes what plan.py decided, saves what a restart needs, and logs what happened.

Everything that is random is a pure function of the seed and the step (batches, masks, dropout, new layers), so the state of a run is
its parameters, the optimizer's moments and a few numbers; going on from it is bitwise the same as never having stopped.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from stackbert_kernels import ops
from stackbert_kernels.config import (
    RESHAPES,
    ConfigError,
    Stage,
    TrainConfig,
    differences,
    from_dict,
    stage_model,
    to_dict,
)
from stackbert_kernels.data.batches import Batch, Batches, heldout
from stackbert_kernels.data.windows import windows
from stackbert_kernels.growth.apply import grow
from stackbert_kernels.growth.reshape import Kept, reshape
from stackbert_kernels.growth.share import gradient_cosines, part_layers, parted
from stackbert_kernels.growth.source import begin
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.plan import Span, bank_rows, flops_per_token, plan, projection_shape, span_at, span_cost
from stackbert_kernels.train import checkpoint
from stackbert_kernels.train.console import Console
from stackbert_kernels.train.distributed import ALONE, Ranks, joined
from stackbert_kernels.train.export import export, exportable, exported
from stackbert_kernels.train.optim import Optimizer
from stackbert_kernels.train.report import write_report
from stackbert_kernels.train.run_directory import REPORT, Metrics, Run, cut_metrics, finite, locked, read_metrics
from stackbert_kernels.train.teacher import Pull, load_teacher
from stackbert_kernels.train.torchrun import DistributedError, Place, check_ranks

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


def train(config: TrainConfig, out: Path | str, *, fresh: bool = False, progress: bool = True) -> dict:
    """Trains by `config` in the directory `out`, or goes on there. Returns what `execute` does."""
    with together(config) as ranks:
        run = ranks.open(config, Path(out), fresh=fresh, progress=progress)
        return execute(run, progress=progress, ranks=ranks)


def together(config: TrainConfig):
    """A context of the processes that torchrun started, `Ranks`, joined to train by `config`; one alone without torchrun."""
    place = check_ranks(config)
    return joined(place, _device(config.device, place))


def execute(run: Run, *, progress: bool = True, ranks: Ranks = ALONE) -> dict:
    """Runs to the end, a signal or too many steps without a finite loss.

    Returns status "finished", "stopped" (SIGTERM or SIGINT: saved, goes on by the same command) or "failed", and the figures so far.
    """
    progress = progress and ranks.rank == 0
    if run.finished:
        return ranks.first(lambda: _already_finished(run, progress))
    with locked(run.checkpoints) if ranks.rank == 0 else nullcontext():
        return _execute(run, progress, ranks)


def _execute(run: Run, progress: bool, ranks: Ranks) -> dict:
    config, spans = run.config, plan(run.config)
    device = ranks.device or _device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    kernels = _kernels(config, device)
    if ranks.rank == 0:
        checkpoint.clean(run.checkpoints)

    with Console(config.steps, shown=progress) as console:
        model, optimizer, state, kept = _restore(run, device, console, ranks)
        _require_same(model, optimizer, "at the start", ranks)
        if state.step == 0 and ranks.rank == 0:
            exportable(run, console)  # what is in the way of a model of transformers is said before the work, too
        batches = Batches(
            run.data,
            config.data,
            config.model.objective,
            config.seed,
            rank=ranks.rank,
            world_size=ranks.size,
            short_steps=config.short_steps,
        )
        held_out = heldout(run.data, config.data, config.model.objective, config.seed)[ranks.rank :: ranks.size]
        held_out = [batch.to(device) for batch in held_out]
        stream = batches.prefetch(state.step, config.optim.accumulate, _pooled(spans))
        with closing(stream), closing(_Log(run.metrics, state, ranks)) as log, _stop_signals() as received:
            for span in spans[_index(spans, state.step) :]:
                span = _parted(span, state)
                stage = window = span.stage
                whole = replace(stage, optimizer_state="copy")  # a reset is of the moment that the stage is entered
                teacher = load_teacher(config, stage, device)

                if state.step == span.first:
                    started = time.perf_counter()
                    state.rows, state.low_readings = [], 0
                    if span.grows:
                        model, optimizer, growth = _grow(model, optimizer, span, kept)
                    _use(model, optimizer, span)
                    state.seconds += time.perf_counter() - started
                    state.stage_seconds.append([])
                    if span.grows:
                        log(span, "growth", operator=stage.grow, **growth)
                    log(
                        span,
                        "stage",
                        name=span.name,
                        steps=stage.steps,
                        predicted_cost=span_cost(span),
                        kernels=kernels,
                        **ranks.logged,
                    )
                    console.stage(span, len(spans), span_cost(span))

                for step in range(state.step, span.last):
                    if step == config.short_steps > span.first:
                        state.stage_seconds.append([])  # a step takes another time from here on
                    started = time.perf_counter()
                    parts = next(stream)
                    lr, gates = span.lr(step), span.gates(step)
                    if span.at(step) != window:
                        window = span.at(step)
                        _set_window(model, optimizer, window)
                    pull = None if teacher is None else Pull(teacher, stage.align.layer, span.pull(step))
                    loss, norm, skipped, tokens, alignment = _step(
                        model, optimizer, [p.to(device) for p in parts], step, lr, config, gates, ranks, pull
                    )
                    seconds = time.perf_counter() - started
                    cost = flops_per_token(config, window, gates, config.seq_len(step))
                    _count(state, loss, tokens, cost, seconds, skipped, alignment)
                    if span.stage.untie.due(state.step):
                        span = _read_gradients(model, optimizer, span, parts, state, config, log, ranks)
                        stage = window = span.stage
                        whole = replace(stage, optimizer_state="copy")
                    console.step(state.step, span, loss, lr, tokens / seconds)

                    if state.step % config.log_every == 0 or state.step == span.last:
                        log(span, "step", loss=_mean_loss(state), lr=lr, grad_norm=norm, **_interval(state))
                        console.logged(_mean_loss(state))
                        state.since_log = State().since_log
                    stopped_by = ranks.agreed(received)
                    failed = state.skipped_in_row >= config.optim.skip_limit
                    ends = bool(stopped_by) or failed
                    evaluates = state.step % config.eval_every == 0 or state.step == span.last
                    saves = state.step % config.checkpoint_every == 0 or state.step == span.last or ends
                    if (evaluates or saves) and window not in (stage, whole):
                        window = whole
                        _set_window(model, optimizer, window)
                    if evaluates:
                        state.eval = _evaluate(model, held_out, config, batches, ranks)
                        log(span, "eval", **state.eval)
                        console.evaluated(state.step, state.eval)
                    if saves:
                        log.sync()
                        path = _save(run, model, optimizer, state, kept, ranks)
                        log(span, "checkpoint", path=_inside(run, path))
                    if failed:
                        return _failed(run, state, path)
                    if ends and state.step < config.steps:
                        return _stopped(run, state, path, stopped_by[0])

            if ranks.rank == 0:
                if exportable(run, console):
                    export(run, model)
                seconds = _stage_seconds(state, config)
                log(spans[-1], "end", **state.eval, stage_seconds=seconds, skipped=state.skipped)
    return ranks.first(lambda: _end(run))


def _end(run: Run) -> dict:
    write_report(run.directory)
    return _finished(run, f"finished: {run.directory}")


def _pooled(spans: list[Span]) -> Callable[[int, Batch], Batch] | None:
    """What the thread that builds batches does to those of a step whose stage pools tokens; None where no stage does."""
    if all(span.stage.pool == 1 for span in spans):
        return None

    def change(step: int, batch: Batch) -> Batch:
        # The thread is a step or two ahead, past the end of the run, too.
        stage = span_at(spans, min(step, spans[-1].last - 1)).stage
        if stage.pool == 1:
            return batch
        return replace(batch, windows=windows(batch.cu_seqlens, batch.masked, stage.pool, stage.pool_kind))

    return change


# One step


def _step(
    model: Bert,
    optimizer: Optimizer,
    parts: list[Batch],
    step: int,
    lr: float,
    config: TrainConfig,
    gates: tuple[float, ...] | None,
    ranks: Ranks,
    pull: Pull | None,
) -> tuple[float, float, bool, int, float | None]:
    """Loss, gradient norm, whether the step was skipped because one of them is not finite, the tokens of the batch, and the alignment with
    the teacher where there is one, over all ranks."""
    model.train()
    optimizer.zero_grad()
    total, tokens, alignment = _backward(model, parts, step, config, gates, ranks, pull)
    norm = optimizer.clip(config.optim.clip)
    skipped = optimizer.step(lr, loss=total if alignment is None else total + alignment)
    figures = [total, norm, skipped] if alignment is None else [total, norm, skipped, alignment]
    loss, norm, skipped, *aligned = torch.stack(figures).tolist()  # the only wait for the device in a step
    return loss, norm, skipped > 0, tokens, aligned[0] if aligned else None


def _backward(
    model: Bert,
    parts: list[Batch],
    step: int,
    config: TrainConfig,
    gates: tuple[float, ...] | None = None,
    ranks: Ranks = ALONE,
    pull: Pull | None = None,
) -> tuple[Tensor, int, Tensor | None]:
    """The loss of a step's batch over all ranks, a scalar on the device, its tokens, and the alignment that `pull` asks for, a scalar beside
    the loss; the gradients of both are added to those that are there, which must be zero where there are several ranks."""
    own = [sum(len(p.masked) for p in parts), sum(p.sequences for p in parts), sum(p.tokens for p in parts)]
    predictions, sequences, tokens = ranks.sums(own)
    predictions = max(1, predictions)
    device = parts[0].input_ids.device
    total = torch.zeros((), device=device)
    alignment = None if pull is None else torch.zeros((), device=device)
    for i, part in enumerate(parts):
        rng = ops.new_rng(ranks.dropout_seed(config.seed), step * config.optim.accumulate + i, device=device)
        with _precision(config, device):
            align = None if pull is None else (pull.layer, _vectors(pull.teacher, part))
            output = model(part, rng=rng, gates=gates, align=align)
        # Each part counts by what it predicts, so that the sum is the mean over the whole batch however it is cut.
        loss = output.mlm_loss * (len(part.masked) / predictions)
        if output.pair_loss is not None:
            loss = loss + output.pair_loss * (part.sequences / sequences)
        total += loss.detach()
        if pull is not None:
            share = output.alignment * (part.tokens / tokens)
            alignment += share.detach()
            loss = loss + pull.weight * share
        with ranks.summing(model, gates) if i == len(parts) - 1 else nullcontext():
            loss.backward()
    return ranks.sum_(total), int(tokens), None if alignment is None else ranks.sum_(alignment)


@torch.no_grad()
def _vectors(teacher: Bert, batch: Batch) -> Tensor:
    """[T, W], the teacher's output at every token."""
    return teacher.encode(batch, dropout=False)


def _precision(config: TrainConfig, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


class _Log:
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


def _count(
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


def _stage_seconds(state: State, config: TrainConfig) -> list[float]:
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


def _mean_loss(state: State) -> float:
    return state.since_log["loss"] / state.since_log["steps"] if state.since_log["steps"] else math.nan


def _interval(state: State) -> dict:
    since = state.since_log
    figures = {"tokens_per_second": since["tokens"] / since["seconds"], "skipped": since["skipped"]}
    return figures | ({"alignment": since["alignment"] / since["steps"]} if "alignment" in since else {})


@torch.no_grad()
def _evaluate(
    model: Bert, batches: list[Batch], config: TrainConfig, train: Batches, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Of this rank's held-out batches and the others': the whole text, unpooled whatever the stage, so that every method and every stage is
    measured by the same."""
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        with _precision(config, batch.input_ids.device):
            figures = model.evaluate(batch)
        loss, right, count = loss + float(figures[0]), right + int(figures[1]), count + int(figures[2])
    loss, right, count = ranks.sums([loss, right, count])
    return {
        "eval_loss": loss / max(1, count),
        "eval_accuracy": right / max(1, count),
        "unigram_loss": train.unigram_entropy,
        "unigram_accuracy": train.unigram_accuracy,
    }


# Stages and state


def _index(spans: list[Span], step: int) -> int:
    return next((span.index for span in spans if step < span.last), len(spans))


def _grow(model: Bert, optimizer: Optimizer, span: Span, kept: Kept) -> tuple[Bert, Optimizer, dict]:
    """Model and optimizer that the stage begins with, new ones where the shape changes, and what the log says of it."""
    stage, config, depth = span.stage, span.config, model.depth
    if span.index == 0:
        rows = begin(model, stage, config.source, seed=config.seed)
        return model, optimizer, {"from_depth": max(rows) + 1, "layer_map": rows, "source": config.source}
    if stage.grow in RESHAPES:
        shape, state = stage_model(config.model, stage), optimizer.state_dict()
        model, moments, said = reshape(model, state, stage, shape, kept, seed=config.seed, optim=config.optim)
        optimizer = Optimizer(model, config.optim)
        optimizer.load_state_dict(moments)
        return model, optimizer, {"from_depth": depth, **said}
    return model, optimizer, {"from_depth": depth, "layer_map": grow(model, optimizer, stage, seed=config.seed)}


def _use(model: Bert, optimizer: Optimizer, span: Span) -> None:
    shape = projection_shape(span.config, span.stage)
    model.project_to(shape[0] if shape else 0, span.config.seed)
    _set_window(model, optimizer, span.stage)


def _set_window(model: Bert, optimizer: Optimizer, stage: Stage) -> None:
    model.use(
        stage.depth, stage.train_from, stage.embeddings, stage.frozen_dropout, stage.rows, stage.ffn_rows, stage.retie
    )
    optimizer.set_window(stage)


def _read_gradients(
    model: Bert,
    optimizer: Optimizer,
    span: Span,
    parts: list[Batch],
    state: State,
    config: TrainConfig,
    log: _Log,
    ranks: Ranks,
) -> Span:
    """Looks at each layer's own gradient on the batch of the step that was done; layers that share weights part if these say so.

    Returns the span as it is from here on. The reading is paid for like a step.
    """
    started, device = time.perf_counter(), model.word.device
    parts = [p.to(device) for p in parts]
    tokens = int(ranks.sums([sum(p.tokens for p in parts)])[0])
    cosines = gradient_cosines(model, lambda: _backward(model, parts, state.step - 1, config, ranks=ranks))
    cosines = ranks.of_first(cosines)
    cost = flops_per_token(config, span.stage, seq_len=config.seq_len(state.step - 1))
    state.flops += cost * tokens
    before = model.rows
    rows, state.low_readings = part_layers(before, cosines, state.low_readings, span.stage.untie)
    if rows != before:
        state.rows = list(rows)
        span = _parted(span, state)
        copied = grow(model, optimizer, span.stage, seed=config.seed)
        _use(model, optimizer, span)
    state.seconds += time.perf_counter() - started
    if rows != before:
        log(span, "growth", operator=span.stage.grow, from_depth=model.depth, layer_map=copied, cosines=cosines)
    return span


def _parted(span: Span, state: State) -> Span:
    """`span` as it is since layers that shared rows parted inside it."""
    if not state.rows or state.step == span.first:
        return span
    return replace(span, stage=parted(span.stage, tuple(state.rows)))


def _save(run: Run, model: Bert, optimizer: Optimizer, state: State, kept: Kept, ranks: Ranks = ALONE) -> Path:
    """The checkpoint, which rank 0 writes."""
    _require_same(model, optimizer, f"after step {state.step}", ranks)
    if ranks.rank > 0:
        return run.checkpoints / f"step-{state.step}"
    tensors = {
        "model": {"bank": model.bank.weights, **model.always_on_parameters()},
        "optimizer": optimizer.state_dict(),
    }
    if kept:
        tensors["kept"] = {f"{i}.{name}": t for i, weights in enumerate(kept) for name, t in weights.items()}
    scores = {name: finite(value) for name, value in state.eval.items()}  # of a run that diverges
    documents = {"state": asdict(state) | {"eval": scores}, "config": to_dict(run.config)}
    return checkpoint.save(run.checkpoints, state.step, tensors, documents, keep=run.config.keep)


def _require_same(model: Bert, optimizer: Optimizer, when: str, ranks: Ranks) -> None:
    moments = {"exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
    ranks.require_same({"bank": model.bank.weights, **model.always_on_parameters(), **moments}, when)


def _inside(run: Run, path: Path) -> str:
    return str(path.relative_to(run.directory))


def _new(config: TrainConfig, stage: Stage, device: torch.device) -> tuple[Bert, Optimizer]:
    """A model of the shape that it has in `stage`, and its optimizer."""
    rows = None if stage.hidden else bank_rows(config)
    shape = stage_model(config.model, stage)
    model = Bert(shape, seed=config.seed, device=device, impl=config.impl, rows=rows)
    return model, Optimizer(model, config.optim)


def _restore(
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
    span = _parted(span_at(plan(run.config), max(0, state.step - 1)), state)
    model, optimizer = _new(run.config, span.stage, device)
    if state.step:
        _use(model, optimizer, span)
    with torch.no_grad():
        parameters = {"bank": model.bank.weights, **model.always_on_parameters()}
        for name, tensor in _matching(tensors["model"], parameters, path).items():
            parameters[name].copy_(tensor)
    optimizer.load_state_dict(tensors["optimizer"])
    if not run.finished and ranks.rank == 0:
        in_log = cut_metrics(run.metrics, state.step)
        if not in_log:
            with closing(_Log(run.metrics, state)) as log:
                log(span, "checkpoint", path=_inside(run, path))
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


# How a run ends


@contextmanager
def _stop_signals():
    """A list that the first SIGTERM or SIGINT is put into, so that the step is finished and saved; a second one acts at once."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number, _):
        received.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _figures(run: Run, state: State) -> dict:
    return {
        "out": str(run.directory),
        "step": state.step,
        "steps": run.config.steps,
        "tokens": state.tokens,
        "flops": state.flops,
        "seconds": state.seconds,
        "skipped": state.skipped,
        **state.eval,
        "stage_seconds": _stage_seconds(state, run.config),
    }


def _stopped(run: Run, state: State, path: Path, by: str) -> dict:
    message = f"stopped by {by} after step {state.step} of {run.config.steps}, saved in {path}; the same command goes on from there"
    return {"status": "stopped", "message": message, **_figures(run, state)}


def _failed(run: Run, state: State, path: Path) -> dict:
    message = (
        f"stopped at step {state.step}: {state.skipped_in_row} steps in a row had a loss or gradient that is not finite; "
        f"parameters from before them are saved in {path}; a lower --lr in another --out may help"
    )
    return {"status": "failed", "message": message, **_figures(run, state)}


def _already_finished(run: Run, progress: bool) -> dict:
    """Makes up for what could not be written then: transformers may have been installed since."""
    with Console(run.config.steps, shown=progress) as console:
        if not exported(run) and exportable(run, console):
            model, *_ = _restore(run, torch.device("cpu"), console)
            export(run, model)
    if not (run.directory / REPORT).exists():
        write_report(run.directory)
    return _finished(run, f"this run was already finished: {run.directory}")


def _finished(run: Run, message: str) -> dict:
    end = next(event for event in reversed(read_metrics(run.metrics)) if event["event"] == "end")
    figures = {name: value for name, value in end.items() if name not in ("event", "stage", "depth", "train_from")}
    return {
        "status": "finished",
        "message": message,
        "out": str(run.directory),
        "steps": run.config.steps,
        **figures,
        "model": str(run.model) if exported(run) else None,
        "report": str(run.directory / REPORT),
    }


# What runs


def check_machine(config: TrainConfig) -> dict[str, str]:
    """The concrete implementation of every op; ConfigError if this machine lacks the device or the implementation that `config` names."""
    return _kernels(config, _device(config.device))


def _device(wanted: str, place: Place = Place()) -> torch.device:  # noqa: B008 (frozen)
    """Of several processes on a machine, each has the GPU of its number. Where these are too few, one process of the machine says so."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and place.size > 1:
        wanted = f"cuda:{place.local_rank}"
    device = torch.device(wanted)
    seen = torch.cuda.device_count()
    if device.type == "cuda" and place.size > 1 and seen < place.local_size:
        refusal = DistributedError if place.rank > 0 and place.local_rank == 0 else ConfigError
        raise refusal(
            f"{place.local_size} ranks on a machine need as many CUDA devices, torch sees {seen}: "
            f"--nproc-per-node {seen}, or --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise ConfigError(
            f"device must be one that torch can use, got {wanted}: torch {torch.__version__} sees {seen} CUDA devices"
        )
    return device


def _kernels(config: TrainConfig, device: torch.device) -> dict[str, str]:
    """The concrete implementation of every op, by what the model will hand to it."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    stream = torch.empty(1, config.model.hidden, dtype=dtype, device=device)
    parameter = torch.empty(1, config.model.embedding_width, device=device)
    samples = {
        "attention": torch.empty(1, config.model.heads, config.model.head_dim, dtype=dtype, device=device),
        **dict.fromkeys(("embedding_layer_norm", "adamw_", "lamb_", "lans_", "global_norm"), parameter),
    }
    try:
        return {op.name: op.resolve(config.impl, samples.get(op.name, stream)) for op in ops.OPS}
    except ValueError as error:
        raise ConfigError(f"impl: {error}") from None
