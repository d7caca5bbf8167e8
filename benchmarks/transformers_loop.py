"""The loop that people write around transformers: BertForMaskedLM with sdpa, padded batches, torch's AdamW.

It sees the same batches, masks, initial weights and learning rates as our trainer, logs the same events, and counts seconds alike: of steps,
waiting for batches included; evaluation is not in them. It looks at the loss only where it logs.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stackbert_kernels.config import TrainConfig
from stackbert_kernels.data.batches import Batch, Batches, heldout
from stackbert_kernels.data.progress import Progress
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.plan import plan
from stackbert_kernels.train.run_directory import Metrics

from .training_step import parameter_flops


def padded(batch: Batch) -> dict[str, Tensor]:
    """[B, S] to the longest, as a collator does; labels -100 where nothing is predicted."""
    shape = (batch.sequences, batch.max_seqlen)
    lengths = batch.cu_seqlens.diff()
    where = (torch.repeat_interleave(torch.arange(batch.sequences), lengths), batch.positions)
    labels = torch.full((batch.tokens,), -100)
    labels[batch.masked] = batch.labels
    return {
        "input_ids": torch.zeros(shape, dtype=torch.long).index_put(where, batch.input_ids),
        "labels": torch.full(shape, -100).index_put(where, labels),
        "attention_mask": torch.zeros(shape, dtype=torch.long).index_put(where, torch.ones_like(batch.input_ids)),
    }


class Loop:
    """The model, its optimizer and the batches of a run."""

    def __init__(self, config: TrainConfig, data: Path, device: str):
        from stackbert_kernels.model.hf import to_transformers

        self.config, self.device = config, device
        self.model = to_transformers(Bert(config.model, seed=config.seed, device=device)).train()
        self.model.set_attn_implementation("sdpa")
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True,
        )  # fmt: skip
        self.batches = Batches(data, config.data, config.model.objective, config.seed)
        self.heldout = heldout(data, config.data, config.model.objective, config.seed)
        torch.manual_seed(config.seed)

    def train(self, metrics: Path) -> None:
        """All steps of the configuration; events go to the file `metrics`."""
        config, (span,) = self.config, plan(self.config)
        tokens, flops, seconds = 0, 0.0, 0.0
        with (
            closing(self.batches.prefetch(0)) as stream,
            closing(Metrics(metrics)) as log,
            Progress("HF loop", config.steps, "steps") as bar,
        ):
            started = time.perf_counter()
            for step in range(config.steps):
                (batch,) = next(stream)
                loss = self.step(padded(batch), span.lr(step))
                tokens += batch.tokens
                flops += parameter_flops(config.model, batch.max_seqlen) * batch.sequences * batch.max_seqlen
                done = step + 1
                logs, evaluates = (done % n == 0 or done == config.steps for n in (config.log_every, config.eval_every))
                if logs or evaluates:
                    reached = loss.item()  # waits for the device
                    seconds += time.perf_counter() - started
                    spent = {"step": done, "tokens": tokens, "flops": flops, "seconds": seconds}
                    log.append("step", **spent, loss=reached)
                    if evaluates:
                        log.append("eval", **spent, **self.evaluate())
                    started = time.perf_counter()
                bar.advance(1)

    def step(self, inputs: dict[str, Tensor], lr: float) -> Tensor:
        """The loss, on the device."""
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        with self._precision():
            loss = self.model(**inputs).loss
        loss.backward()
        if self.config.optim.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        loss, right, count = 0.0, 0, 0
        for batch in self.heldout:
            inputs = {name: tensor.to(self.device) for name, tensor in padded(batch).items()}
            labels = inputs.pop("labels")
            with self._precision():
                logits = self.model(**inputs).logits
            predicted = labels != -100
            logits, labels = logits[predicted].float(), labels[predicted]
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
        self.model.train()
        return {"eval_loss": loss / max(1, count), "eval_accuracy": right / max(1, count)}

    def seconds_per_step(self, warmup: int, steps: int) -> float:
        """The mean over `steps` steps after some to warm up. The optimizer remembers them: a loop that was timed is not for training."""
        started = 0.0
        with closing(self.batches.prefetch(0)) as stream:
            for i in range(warmup + steps):
                (batch,) = next(stream)
                loss = self.step(padded(batch), 0.0)
                if i == warmup - 1:
                    loss.item()  # waits for the device
                    started = time.perf_counter()
            loss.item()
        return (time.perf_counter() - started) / steps

    def _precision(self):
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.config.precision == "bf16")
