"""The whole training step beside transformers: same model, data, dtype and threads.

    python benchmarks/bench_train_step.py [--json FILE]

Three measurements, each interleaved in one run: full-length sequences, natural-length ones (real tokens counted: transformers pads
to the longest of the batch, as its collators do), and every MSLT stage against the cost model. A step is forward, backward, clipping
and AdamW (fused on both sides). Before anything is timed, both models must give the same loss and gradient norm without dropout.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import timing
import torch
from torch import Tensor

from stackbert_kernels import ops
from stackbert_kernels.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.model.hf import from_transformers
from stackbert_kernels.plan import baseline_stage, flops_per_token, plan
from stackbert_kernels.recipes.mslt import MsltOptions, mslt
from stackbert_kernels.train.optim import AdamW

MASK = 103


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


def natural_lengths(count: int, longest: int, generator: torch.Generator) -> list[int]:
    """Log-normal sentence lengths, median 24 words, as in English text; the batch's longest is nearly always near the cut."""
    drawn = torch.exp(3.2 + 0.65 * torch.randn(count, generator=generator))
    return [int(n) for n in drawn.clamp(4, longest)]


def batch(
    lengths: list[int], vocab: int, mask_rate: float, generator: torch.Generator
) -> tuple[Packed, dict[str, Tensor]]:
    """The same tokens and masks, packed for us and padded for transformers."""
    total, longest = sum(lengths), max(lengths)
    ids = torch.randint(200, vocab, (total,), generator=generator)
    count = max(1, round(mask_rate * total))
    masked = torch.randperm(total, generator=generator)[:count].sort().values
    labels = ids[masked].clone()
    ids[masked] = MASK
    cu = torch.tensor([0, *lengths]).cumsum(0)
    packed = Packed(
        ids,
        torch.zeros_like(ids),
        torch.cat([torch.arange(n) for n in lengths]),
        cu.to(torch.int32),
        longest,
        masked,
        labels,
    )
    flat_labels = torch.full((total,), -100)
    flat_labels[masked] = labels
    shape = (len(lengths), longest)
    padded = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
        "attention_mask": torch.zeros(shape),
    }
    for i, n in enumerate(lengths):
        padded["input_ids"][i, :n] = ids[cu[i] : cu[i + 1]]
        padded["labels"][i, :n] = flat_labels[cu[i] : cu[i + 1]]
        padded["attention_mask"][i, :n] = 1
    return packed, padded


def hf_model(model: ModelConfig, seed: int = 0):
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden, num_hidden_layers=model.layers, num_attention_heads=model.heads,
        intermediate_size=model.inner, max_position_embeddings=model.max_position, hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.attention_dropout, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def autocast(dtype: str):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")


def check(model: ModelConfig, packed: Packed, padded: dict[str, Tensor]) -> None:
    """Both sides compute the same thing: loss and gradient norm agree in fp32 with dropout off."""
    theirs = hf_model(model).eval()
    ours = from_transformers(theirs).eval()
    their_loss = theirs(**padded).loss
    their_loss.backward()
    our_loss = ours(packed).loss
    our_loss.backward()
    their_norm = torch.stack([p.grad.norm() for p in theirs.parameters() if p.grad is not None]).norm()
    our_norm = torch.stack([p.grad.norm() for p in ours.parameters() if p.grad is not None]).norm()
    for name, a, b in (("loss", our_loss, their_loss), ("gradient norm", our_norm, their_norm)):
        if not torch.isclose(a, b, rtol=1e-4):
            raise SystemExit(
                f"bench_train_step: {name} differs from transformers': {a.item():.6f}, {b.item():.6f}; nothing was timed"
            )


def their_step(model: ModelConfig, padded: dict[str, Tensor], dtype: str):
    theirs = hf_model(model).train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def step():
        with autocast(dtype):
            loss = theirs(**padded).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(config: TrainConfig, span, packed: Packed, dtype: str):
    ours = Bert(config.model, seed=0).train()
    stage = span.stage
    ours.use(stage.depth, stage.train_from, stage.embeddings, stage.frozen_dropout)
    optimizer = AdamW(ours, config.optim)
    optimizer.set_window(stage)
    rng = ops.new_rng(0)

    def step():
        with autocast(dtype):
            loss = ours(packed, rng=rng).loss
        loss.backward()
        optimizer.clip(1.0)
        optimizer.step(1e-4)
        optimizer.zero_grad()
        rng[1] += 1

    return step


def against_transformers(name: str, config: TrainConfig, lengths: list[int], dtype: str, repeats: int) -> dict:
    packed, padded = batch(lengths, config.model.vocab_size, 0.15, torch.Generator().manual_seed(1))
    check(config.model, packed, padded)
    (span,) = plan(config)
    stats = timing.compare(
        {"ours": our_step(config, span, packed, dtype), "transformers": their_step(config.model, padded, dtype)},
        repeats=repeats,
    )
    tokens = sum(lengths)
    return {
        "sequences": name,
        "dtype": dtype,
        "real tokens": tokens,
        "padded tokens": padded["input_ids"].numel(),
        "ours tokens/s": round(tokens / stats["ours"].median),
        "transformers tokens/s": round(tokens / stats["transformers"].median),
        "speed-up": timing.speedup(stats, "transformers", "ours").median,
        "p20": timing.speedup(stats, "transformers", "ours").p20,
    }


def stages(config: TrainConfig, lengths: list[int], dtype: str, repeats: int) -> list[dict]:
    """Every MSLT stage's step, as a share of the full step, beside the cost model's prediction."""
    packed, _ = batch(lengths, config.model.vocab_size, 0.15, torch.Generator().manual_seed(1))
    spans = plan(mslt(config, MsltOptions()))
    stats = timing.compare({str(s.index): our_step(config, s, packed, dtype) for s in spans}, repeats=repeats)
    full_flops = flops_per_token(config, baseline_stage(config))
    rows = []
    for span in spans:
        measured = timing.speedup(stats, str(span.index), str(spans[-1].index)).median
        predicted = flops_per_token(config, span.stage) / full_flops
        rows.append({
            "stage": span.index, "dtype": dtype, "depth": span.stage.depth, "train from": span.stage.train_from,
            "ms/step": 1e3 * stats[str(span.index)].median, "of a full step": measured, "predicted": predicted,
            "measured / predicted": measured / predicted,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), nargs="+", default=["fp32"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8192)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = ModelConfig(
        layers=options.layers, hidden=options.hidden, heads=options.heads, vocab_size=options.vocab, dropout=0.1
    )
    config = TrainConfig(model=model, data=DataConfig(seq_len=128, batch_tokens=2048), optim=OptimConfig(), steps=1000)
    lengths = {"16 x 128": [128] * 16, "64 natural": natural_lengths(64, 128, torch.Generator().manual_seed(2))}
    steps = [
        against_transformers(name, config, of, dtype, options.repeats)
        for dtype in options.dtype
        for name, of in lengths.items()
    ]
    by_stage = [row for dtype in options.dtype for row in stages(config, lengths["16 x 128"], dtype, options.repeats)]

    header = timing.machine() | {"model": f"L{model.layers} H{model.hidden}, {model.heads} heads, V {model.vocab_size}"}
    print("  ".join(f"{name} {value}" for name, value in header.items()))
    timing.print_table(steps)
    print()
    timing.print_table(by_stage)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": header, "steps": steps, "mslt stages": by_stage}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
