"""The loop: it executes what plan/ decided, saves what a restart needs, and logs what happened.

Everything that is random is a pure function of the seed and the step (batches, masks, dropout, new layers), so the state of a run is
its parameters, the optimizer's moments and a few numbers; going on from it is bitwise the same as never having stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from stackbert_kernels.config import RESHAPES, TrainConfig, stage_model
from stackbert_kernels.data.batches import Batch, Batches, heldout
from stackbert_kernels.data.windows import windows
from stackbert_kernels.growth.apply import grow
from stackbert_kernels.growth.reshape import Kept, reshape
from stackbert_kernels.growth.share import gradient_cosines, part_layers
from stackbert_kernels.growth.source import begin
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.plan import Span, flops_per_token, plan, span_at, span_cost
from stackbert_kernels.train import checkpoint
from stackbert_kernels.train.console import Console
from stackbert_kernels.train.distributed import ALONE, Ranks, joined
from stackbert_kernels.train.export import export, exportable
from stackbert_kernels.train.machine import device_of, kernels_of
from stackbert_kernels.train.optim import Optimizer
from stackbert_kernels.train.outcome import (
    already_finished_result,
    failed_result,
    finished_result,
    stop_signals,
    stopped_result,
)
from stackbert_kernels.train.report import write_report
from stackbert_kernels.train.run_directory import Run, locked
from stackbert_kernels.train.state import (
    Log,
    State,
    as_parted,
    count,
    inside,
    interval,
    mean_loss,
    require_same,
    restore,
    save,
    set_window,
    stage_seconds,
    use,
)
from stackbert_kernels.train.step import backward, evaluate, take_step
from stackbert_kernels.train.teacher import Pull, load_teacher
from stackbert_kernels.train.torchrun import check_ranks


def train(config: TrainConfig, out: Path | str, *, fresh: bool = False, progress: bool = True) -> dict:
    """Trains by `config` in the directory `out`, or goes on there. Returns what `execute` does."""
    with together(config) as ranks:
        run = ranks.open(config, Path(out), fresh=fresh, progress=progress)
        return execute(run, progress=progress, ranks=ranks)


def together(config: TrainConfig):
    """A context of the processes that torchrun started, `Ranks`, joined to train by `config`; one alone without torchrun."""
    place = check_ranks(config)
    return joined(place, device_of(config.device, place))


def execute(run: Run, *, progress: bool = True, ranks: Ranks = ALONE) -> dict:
    """Runs to the end, a signal or too many steps without a finite loss.

    Returns status "finished", "stopped" (SIGTERM or SIGINT: saved, goes on by the same command) or "failed", and the figures so far.
    """
    progress = progress and ranks.rank == 0
    if run.finished:
        return ranks.first(lambda: already_finished_result(run, progress))
    with locked(run.checkpoints) if ranks.rank == 0 else nullcontext():
        return _execute(run, progress, ranks)


def _execute(run: Run, progress: bool, ranks: Ranks) -> dict:
    config, spans = run.config, plan(run.config)
    device = ranks.device or device_of(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    kernels = kernels_of(config, device)
    if ranks.rank == 0:
        checkpoint.clean(run.checkpoints)

    with Console(config.steps, shown=progress) as console:
        model, optimizer, state, kept = restore(run, device, console, ranks)
        require_same(model, optimizer, "at the start", ranks)
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
        with closing(stream), closing(Log(run.metrics, state, ranks)) as log, stop_signals() as received:
            for span in spans[_index(spans, state.step) :]:
                span = as_parted(span, state)
                stage = window = span.stage
                whole = replace(stage, optimizer_state="copy")  # a reset is of the moment that the stage is entered
                teacher = load_teacher(config, stage, device)

                if state.step == span.first:
                    started = time.perf_counter()
                    state.rows, state.low_readings = [], 0
                    if span.grows:
                        model, optimizer, growth = _grow(model, optimizer, span, kept)
                    use(model, optimizer, span)
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
                        set_window(model, optimizer, window)
                    pull = None if teacher is None else Pull(teacher, stage.align.layer, span.pull(step))
                    loss, norm, skipped, tokens, alignment = take_step(
                        model, optimizer, [p.to(device) for p in parts], step, lr, config, gates, ranks, pull
                    )
                    seconds = time.perf_counter() - started
                    cost = flops_per_token(config, window, gates, config.seq_len(step))
                    count(state, loss, tokens, cost, seconds, skipped, alignment)
                    if span.stage.untie.due(state.step):
                        span = _read_gradients(model, optimizer, span, parts, state, config, log, ranks)
                        stage = window = span.stage
                        whole = replace(stage, optimizer_state="copy")
                    console.step(state.step, span, loss, lr, tokens / seconds)

                    if state.step % config.log_every == 0 or state.step == span.last:
                        log(span, "step", loss=mean_loss(state), lr=lr, grad_norm=norm, **interval(state))
                        console.logged(mean_loss(state))
                        state.since_log = State().since_log
                    stopped_by = ranks.agreed(received)
                    failed = state.skipped_in_row >= config.optim.skip_limit
                    ends = bool(stopped_by) or failed
                    evaluates = state.step % config.eval_every == 0 or state.step == span.last
                    saves = state.step % config.checkpoint_every == 0 or state.step == span.last or ends
                    if (evaluates or saves) and window not in (stage, whole):
                        window = whole
                        set_window(model, optimizer, window)
                    if evaluates:
                        state.eval = evaluate(model, held_out, config, batches, ranks)
                        drift = model.word_drift()
                        log(span, "eval", **state.eval, **({} if drift is None else {"word_drift": drift}))
                        console.evaluated(state.step, state.eval, drift)
                    if saves:
                        log.sync()
                        path = save(run, model, optimizer, state, kept, ranks)
                        log(span, "checkpoint", path=inside(run, path))
                    if failed:
                        return failed_result(run, state, path)
                    if ends and state.step < config.steps:
                        return stopped_result(run, state, path, stopped_by[0])

            if ranks.rank == 0:
                if exportable(run, console):
                    export(run, model)
                seconds = stage_seconds(state, config)
                log(spans[-1], "end", **state.eval, stage_seconds=seconds, skipped=state.skipped)
    return ranks.first(lambda: _end(run))


def _end(run: Run) -> dict:
    write_report(run.directory)
    return finished_result(run, f"finished: {run.directory}")


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


def _read_gradients(
    model: Bert,
    optimizer: Optimizer,
    span: Span,
    parts: list[Batch],
    state: State,
    config: TrainConfig,
    log: Log,
    ranks: Ranks,
) -> Span:
    """Looks at each layer's own gradient on the batch of the step that was done; layers that share weights part if these say so.

    Returns the span as it is from here on. The reading is paid for like a step.
    """
    started, device = time.perf_counter(), model.word.device
    parts = [p.to(device) for p in parts]
    tokens = int(ranks.sums([sum(p.tokens for p in parts)])[0])
    cosines = gradient_cosines(model, lambda: backward(model, parts, state.step - 1, config, ranks=ranks))
    cosines = ranks.of_first(cosines)
    cost = flops_per_token(config, span.stage, seq_len=config.seq_len(state.step - 1))
    state.flops += cost * tokens
    before = model.rows
    rows, state.low_readings = part_layers(before, cosines, state.low_readings, span.stage.untie)
    if rows != before:
        state.rows = list(rows)
        span = as_parted(span, state)
        copied = grow(model, optimizer, span.stage, seed=config.seed)
        use(model, optimizer, span)
    state.seconds += time.perf_counter() - started
    if rows != before:
        log(span, "growth", operator=span.stage.grow, from_depth=model.depth, layer_map=copied, cosines=cosines)
    return span
