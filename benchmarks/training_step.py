"""A training step of ours and of transformers on the same tokens, and whether they are the same step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stackbert_kernels import ops
from stackbert_kernels.config import ConfigError, DataConfig, ModelConfig, OptimConfig, Stage, TrainConfig
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.plan import baseline_stage, flops_per_token
from stackbert_kernels.train.machine import check_machine
from stackbert_kernels.train.optim import Optimizer

MASK = 103
MASK_RATE = 0.15
CHECKED_TOKENS = 4096
BEST_FIRST = ("native", "triton", "reference")
OURS, HF, HF_COMPILED = "ours", "HF eager", "HF compiled"
TOLERANCE = {"fp32": (1e-4, 1e-4), "bf16": (1e-3, 8e-3)}
"""Of loss and gradient norm, beside three times what transformers itself is off in that dtype. fp32: sums in another order. bf16: eps is
8e-3; the loss is a mean over hundreds of predictions whose roundings average out."""


# Data: the same tokens and masks, packed for us and padded for transformers.


@dataclass(frozen=True)
class Packed:
    """A batch as stackbert_kernels.data gives it."""

    input_ids: Tensor
    token_types: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    masked: Tensor
    labels: Tensor
    pair_labels: None = None
    windows: None = None


@dataclass(frozen=True)
class Samples:
    """Sequences of these lengths in both forms; `padded` has an attention mask only where something is padded."""

    lengths: tuple[int, ...]
    packed: Packed
    padded: dict[str, Tensor]

    @classmethod
    def random(cls, lengths: tuple[int, ...], vocab: int, device: str, seed: int = 1) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        total, longest = sum(lengths), max(lengths)
        ids = torch.randint(min(200, vocab // 2), vocab, (total,), generator=generator)
        count = max(1, round(MASK_RATE * total))
        masked = torch.randperm(total, generator=generator)[:count].sort().values
        labels = ids[masked].clone()
        ids[masked] = min(MASK, vocab - 1)
        cu = torch.tensor([0, *lengths]).cumsum(0)
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        positions = torch.arange(total) - cu[sequence]
        tensors = (ids, torch.zeros_like(ids), positions, cu.to(torch.int32))
        packed = Packed(*(t.to(device) for t in tensors), longest, masked.to(device), labels.to(device))

        flat_labels = torch.full((total,), -100)
        flat_labels[masked] = labels
        shape = (len(lengths), longest)

        def pad(values: Tensor, empty: int) -> Tensor:
            return torch.full(shape, empty).index_put((sequence, positions), values).to(device)

        padded = {"input_ids": pad(ids, 0), "labels": pad(flat_labels, -100)}
        if min(lengths) < longest:
            padded["attention_mask"] = pad(torch.ones_like(ids), 0)
        return cls(lengths, packed, padded)


@dataclass(frozen=True)
class Setting:
    """A row of the result: a model, the lengths of a step's sequences, a dtype."""

    size: str
    model: ModelConfig
    kind: str  # "S=128", "natural <= 512"
    lengths: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.size} {self.kind}"

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def config(self) -> TrainConfig:
        """What the cost model reads: attention of sequences of n tokens costs as much a token as that of equal ones of sum(n^2) / sum(n)."""
        attended = max(8, round(sum(n * n for n in self.lengths) / self.tokens))
        data = DataConfig(seq_len=attended, batch_tokens=max(attended, self.tokens), mask_rate=MASK_RATE)
        return TrainConfig(model=self.model, data=data, optim=OptimConfig(), precision=self.dtype)

    @property
    def flops(self) -> float:
        """Of the matrix products that a step needs."""
        return flops_per_token(self.config, baseline_stage(self.config)) * self.tokens


def parameter_flops(model: ModelConfig, seq_len: float) -> float:
    """FLOPs a token as Megatron-LM counts them: 6 a parameter of the layers and the head, all tokens predicted, and attention."""
    layer = 4 * model.hidden**2 + 2 * model.hidden * model.inner
    head = model.hidden**2 + model.hidden * model.vocab_size
    return 6.0 * (model.layers * layer + head) + 12.0 * model.layers * model.hidden * seq_len


# Candidates. The learning rate is zero: the arithmetic is the same, and the weights stay those that were checked.


class Ours:
    """Our model in a stage, all of it in one implementation."""

    def __init__(self, model: Bert, config: TrainConfig, impl: str, stage: Stage | None = None):
        stage = stage or baseline_stage(config)
        self.model = model
        model.impl = impl
        model.use(stage.depth, stage.train_from, stage.embeddings, stage.frozen_dropout)
        self.optimizer = Optimizer(model, config.optim)
        self.optimizer.set_window(stage)
        self.rng = ops.new_rng(0, device=model.word.device)

    def loss(self, samples: Samples) -> Tensor:
        return self.model(samples.packed, rng=self.rng).loss

    def update(self) -> None:
        self.optimizer.clip(1.0)
        self.optimizer.step(0.0)
        self.optimizer.zero_grad()
        self.rng[1] += 1


class Theirs:
    """transformers' BertForMaskedLM with scaled_dot_product_attention, and torch's optimizer."""

    def __init__(self, model: torch.nn.Module, config: TrainConfig, *, compiled: bool = False):
        self.model = model
        self.forward = torch.compile(model, dynamic=False) if compiled else model
        decay = config.optim.weight_decay
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=decay, fused=True)

    def loss(self, samples: Samples) -> Tensor:
        return self.forward(**samples.padded).loss

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


Candidate = Ours | Theirs


def step(candidate: Candidate, samples: Samples, dtype: str) -> Tensor:
    """One training step to its end, as a loop that looks at the loss sees it. Returns the loss."""
    device = samples.packed.input_ids.device
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        loss = candidate.loss(samples)
    loss.backward()
    candidate.update()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return loss.detach()


def loss_and_norm(candidate: Candidate, samples: Samples, dtype: str) -> tuple[float, float]:
    """Without dropout."""
    candidate.model.eval()
    with torch.autocast(samples.packed.input_ids.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        loss = candidate.loss(samples)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in candidate.model.parameters() if p.grad is not None])
    candidate.optimizer.zero_grad()
    candidate.model.train()
    return loss.item(), norm.item()


@dataclass
class Field:
    """Who takes part for one model, and why the others do not."""

    candidates: dict[str, Candidate]
    absent: dict[str, str]
    ours: str
    """What users get: the implementation that "auto" takes."""
    kernels: dict[str, str]
    """Of `ours`: the implementation of each op."""
    without_fp32: set[str]
    """Ours that cannot be checked in fp32."""


def field_of(config: TrainConfig, device: str, wanted: Sequence[str] = BEST_FIRST) -> Field:
    """Every candidate that can run here, all with the same weights. Of ours, those not `wanted` are absent, but never what auto takes."""
    template = Bert(config.model, seed=0, device=device).train()
    usable, absent = _implementations(config, device)
    names = {f"{OURS} {impl}": impl for impl in usable}
    candidates: dict[str, Candidate] = {}
    try:
        from stackbert_kernels.model.hf import to_transformers

        theirs = to_transformers(template)
        theirs.set_attn_implementation("sdpa")
    except Exception as error:  # somebody else's code: it never makes our benchmark fail
        absent |= dict.fromkeys((HF, HF_COMPILED), first_line(error))
    else:
        candidates |= {HF: Theirs(theirs, config), HF_COMPILED: Theirs(copy.deepcopy(theirs), config, compiled=True)}
    candidates |= {name: Ours(copy.deepcopy(template), config, impl) for name, impl in names.items()}
    in_fp32, _ = _implementations(replace(config, precision="fp32"), device)
    ours = next(iter(names))
    unwanted = [n for n, impl in names.items() if impl not in wanted and n != ours]
    absent |= {name: f"left out by --impl {' '.join(wanted)}" for name in unwanted}
    return Field(candidates, absent, ours, usable[names[ours]], {n for n, impl in names.items() if impl not in in_fp32})


def _implementations(config: TrainConfig, device: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """{impl: {op: implementation}} of what can run the whole model, first what "auto" comes to; and why the others cannot.

    "auto" itself is listed only where it takes different implementations for different ops.
    """
    usable, absent = {}, {}
    for impl in ("auto", *BEST_FIRST):
        try:
            usable[impl] = check_machine(replace(config, device=device, impl=impl))
        except ConfigError as error:
            absent[f"{OURS} {impl}"] = str(error).removeprefix("impl: ")
    first = next((impl for impl in BEST_FIRST if usable.get(impl) == usable["auto"]), "auto")
    return {first: usable[first], **{i: k for i, k in usable.items() if i not in ("auto", first)}}, absent


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


# Correctness.


class Wrong(Exception):
    """A candidate does not compute the same step. The message says by how much."""


def few(setting: Setting, device: str) -> Samples:
    """Sequences of the same kind, as many as the check needs: without the masked-only head a step of fp32 logits is large."""
    kept = max(1, sum(end <= CHECKED_TOKENS for end in itertools.accumulate(setting.lengths)))
    return Samples.random(setting.lengths[:kept], setting.model.vocab_size, device)


def check(field: Field, samples: Samples, dtype: str) -> dict[str, str]:
    """{name: what is wrong} of the candidates whose loss or gradient norm differs without dropout, in fp32 or in `dtype`."""
    measure = HF if HF in field.candidates else f"{OURS} reference"
    exact = loss_and_norm(field.candidates[measure], samples, "fp32")
    baseline = loss_and_norm(field.candidates[measure], samples, dtype)
    wrong = {}
    for name, candidate in field.candidates.items():
        if name == HF_COMPILED or name in field.absent:
            continue
        try:
            if name not in field.without_fp32:
                _compare(loss_and_norm(candidate, samples, "fp32"), exact, exact, "fp32")
            _compare(loss_and_norm(candidate, samples, dtype), exact, baseline, dtype)
        except Wrong as error:
            wrong[name] = str(error)
        except Exception as error:
            wrong[name] = first_line(error)
    return wrong


def _compare(actual: Sequence[float], exact: Sequence[float], baseline: Sequence[float], dtype: str) -> None:
    for what, rate, a, e, b in zip(("loss", "gradient norm"), TOLERANCE[dtype], actual, exact, baseline, strict=True):
        allowed = rate * abs(e) + 3 * abs(b - e)
        if not abs(a - e) <= allowed:
            raise Wrong(f"{what} in {dtype} is {a:.6g}, must be {e:.6g} up to {allowed:.2g}")
