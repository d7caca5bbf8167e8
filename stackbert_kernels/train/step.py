"""One step: losses and gradients of its parts, the update; and the evaluation on held-out text."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from stackbert_kernels import ops
from stackbert_kernels.config import TrainConfig
from stackbert_kernels.data.batches import Batch, Batches
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.train.distributed import ALONE, Ranks
from stackbert_kernels.train.optim import Optimizer
from stackbert_kernels.train.teacher import Pull


def take_step(
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
    total, tokens, alignment = backward(model, parts, step, config, gates, ranks, pull)
    norm = optimizer.clip(config.optim.clip)
    skipped = optimizer.step(lr, loss=total if alignment is None else total + alignment)
    figures = [total, norm, skipped] if alignment is None else [total, norm, skipped, alignment]
    loss, norm, skipped, *aligned = torch.stack(figures).tolist()  # the only wait for the device in a step
    return loss, norm, skipped > 0, tokens, aligned[0] if aligned else None


def backward(
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
            align = None if pull is None else (pull.layer, teacher_vectors(pull.teacher, part))
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
def teacher_vectors(teacher: Bert, batch: Batch) -> Tensor:
    """[T, W], the teacher's output at every token."""
    return teacher.encode(batch, dropout=False)


def _precision(config: TrainConfig, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


@torch.no_grad()
def evaluate(
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
