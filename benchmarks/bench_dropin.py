"""Models of transformers with sbk.patch beside the same ones without.

    python -m benchmarks dropin [--size small|base] [--dtype fp32 bf16] [--out DIR]

BertForSequenceClassification: fine-tuning steps (forward, backward, clipping, AdamW) at natural lengths, short as single sentences are (13
tokens in the mean, padded to the longest of each batch of 32), and at full length; inference with padding and without. BertForMaskedLM:
training steps at full length, with logits that nobody reads. Training has dropout; bf16 is autocast. transformers attends by sdpa, on a
GPU also compiled. "unpad" is patched with unpad=True.
What is wrong gets no time: without dropout, the error of the loss and of every gradient against float64 must be at most four times that of
transformers' worst one, in fp32 and in the dtype that is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stackbert_kernels import patch

from . import machine, results_file, table
from .clock import interleave, ratio
from .command_line import DONE, FAILED, BadUse, Parser, answered, device_of, make_folder

HF, HF_COMPILED, PATCHED, UNPAD = "HF", "HF compiled", "ours patched", "ours unpad"
BATCH = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES = 4  # of natural lengths; the rounds take them in turn


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    full: tuple[tuple[int, int], ...]  # (sequences, tokens of each)


SIZES = {
    "base": Size(12, 768, 12, 30522, ((16, 128), (4, 512))),
    "small": Size(4, 256, 4, 8192, ((16, 128), (4, 512))),
    "quick": Size(1, 32, 2, 99, ((2, 16),)),
}
ON_GPU = ((256, 128), (64, 512))


@dataclass(frozen=True)
class Setting:
    name: str
    head: str
    training: bool
    lengths: tuple[tuple[int, ...], ...]  # a tuple a batch

    @property
    def padded(self) -> bool:
        return any(min(batch) < max(batch) for batch in self.lengths)


def short(sequences: int, seed: int) -> tuple[int, ...]:
    """Log-normal with a mean of 13, as sentences of reviews with [CLS] and [SEP] are; 3 to 66."""
    drawn = torch.exp(2.42 + 0.55 * torch.randn(sequences, generator=torch.Generator().manual_seed(seed)))
    return tuple(drawn.round().clamp(3, 66).int().tolist())


def settings(size: Size, full: Sequence[tuple[int, int]]) -> list[Setting]:
    natural = tuple(short(BATCH, seed) for seed in range(BATCHES))
    classes, words = "BertForSequenceClassification", "BertForMaskedLM"
    whole = [(length, ((length,) * sequences,)) for sequences, length in full]
    return [
        Setting("fine-tune, short sentences", classes, True, natural),
        *(Setting(f"fine-tune, full length {length}", classes, True, lengths) for length, lengths in whole),
        Setting("inference, short sentences", classes, False, natural),
        Setting(f"inference, full length {whole[0][0]}", classes, False, whole[0][1]),
        Setting(f"masked LM, full length {whole[0][0]}", words, True, whole[0][1]),
    ]


def model_of(size: Size, head: str, device: str) -> nn.Module:
    import transformers

    longest = max(512, *(length for _, length in size.full))
    config = transformers.BertConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, intermediate_size=4 * size.hidden, max_position_embeddings=longest,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, head)._from_config(config, attn_implementation="sdpa").to(device)


def batch(size: Size, head: str, lengths: Sequence[int], device: str) -> dict[str, Tensor]:
    """As a tokenizer and a collator give it: with an attention mask, ones or not."""
    generator = torch.Generator().manual_seed(len(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, size.vocabulary, mask.shape, generator=generator).where(mask, 0)
    if head == "BertForMaskedLM":
        chosen = (torch.rand(mask.shape, generator=generator) < 0.15).index_fill(1, torch.tensor([1]), True)
        labels = ids.where(chosen & mask, -100)
    else:
        labels = torch.randint(0, 2, (len(lengths),), generator=generator)
    given = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    return {name: tensor.to(device) for name, tensor in given.items()}


def loss_of(model: nn.Module, given: dict[str, Tensor], dtype: str) -> Tensor:
    device = given["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
        return model(**given).loss


def results(model: nn.Module, given: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The loss and every gradient, in training without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss = loss_of(model.train(), given, dtype)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {"loss": loss.detach()} | {n: g for n, g in zip(names, gradients, strict=True) if g is not None}


def why_wrong(size: Size, setting: Setting, device: str, dtype: str, unpad: bool) -> str | None:
    """On two sequences of the first batch, by the error relative to the largest gradient, which a key's bias, say, does not have."""
    lengths = (max(setting.lengths[0]), min(setting.lengths[0]))
    model, given = model_of(size, setting.head, device), batch(size, setting.head, lengths, device)
    exact = results(copy.deepcopy(model).double(), given, "fp32")
    largest = max(g.abs().max().item() for name, g in exact.items() if name != "loss")
    for kind in dict.fromkeys(("fp32", dtype)):
        theirs, ours = results(copy.deepcopy(model), given, kind), copy.deepcopy(model)
        patch(ours, unpad=unpad)
        actual = results(ours, given, kind)

        def error(got: dict[str, Tensor], name: str) -> float:
            return float((got[name] - exact[name]).abs().max()) / (exact[name].item() if name == "loss" else largest)

        allowed = 4 * max(torch.finfo(DTYPES[kind]).eps, *(error(theirs, name) for name in exact))
        if actual.keys() != exact.keys():
            return f"{kind}: other parameters have a gradient"
        for name in exact:
            if not error(actual, name) <= allowed:
                return f"{kind}: {name} is off by {error(actual, name):.3g}, at most {allowed:.3g} is rounding"
    return None


def call_of(model: nn.Module, batches: list[dict[str, Tensor]], training: bool, dtype: str) -> Callable[[int], None]:
    if not training:
        model.eval()
        return torch.inference_mode()(lambda i: loss_of(model, batches[i % len(batches)], dtype))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # the weights stay those that were checked

    def step(i: int) -> None:
        loss_of(model, batches[i % len(batches)], dtype).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    size: Size, setting: Setting, device: str, dtype: str, *, compiled: bool = False, repeats: int = 20, seconds: float = 20.0
) -> dict:  # fmt: skip
    """The row of a setting."""
    batches = [batch(size, setting.head, lengths, device) for lengths in setting.lengths]
    template = model_of(size, setting.head, device)
    calls = {HF: call_of(copy.deepcopy(template), batches, setting.training, dtype)}
    wrong = {}
    for name, unpad in ((PATCHED, False), (UNPAD, True)):
        if unpad and not setting.padded:
            continue
        if reason := why_wrong(size, setting, device, dtype, unpad):
            wrong[name] = reason
            continue
        ours = copy.deepcopy(template)
        patch(ours, unpad=unpad)
        calls[name] = call_of(ours, batches, setting.training, dtype)
    if compiled:
        calls[HF_COMPILED] = call_of(torch.compile(copy.deepcopy(template)), batches, setting.training, dtype)
    # each call goes through all batches: their lengths differ
    rounds = {n: (lambda _, call=call: [call(i) for i in range(len(batches))]) for n, call in calls.items()}
    stats = interleave(rounds, device, repeats=repeats, warmup=1, seconds=seconds)
    ours = UNPAD if UNPAD in calls else PATCHED if PATCHED in calls else None
    tokens = sum(map(sum, setting.lengths))
    return {
        "op": "dropin", "case": setting.name, "dtype": dtype, "p": 0.1 if setting.training else 0.0,
        "direction": "step" if setting.training else "frozen forward",
        "sizes": {"L": size.layers, "C": size.hidden, "V": size.vocabulary, "B": len(setting.lengths[0]),
                  "S": max(map(max, setting.lengths))},
        "options": {}, "bytes": 0, "flops": 0, "tokens": tokens, "calls": len(batches),
        "padded_tokens": sum(len(lengths) * max(lengths) for lengths in setting.lengths),
        "ours": ours, "seconds": {name: s.as_dict() for name, s in stats.items()}, "absent": {}, "wrong": wrong,
        "speed_up": {name: ratio(stats, HF, name).as_dict() for name in calls},
        "ratios": {name: ratio(stats, name, ours).as_dict() for name in calls if name != ours} if ours else {},
    }  # fmt: skip


def table_rows(rows: Sequence[dict]) -> list[dict[str, object]]:
    """A line a candidate."""
    return [
        {
            "case": row["case"], "dtype": row["dtype"], "candidate": name,
            "ms": 1e3 * stats["median"] / row["calls"], "tokens/s": row["tokens"] / stats["median"],
            f"x {HF}": row["speed_up"][name]["median"],
            "p20": row["speed_up"][name]["p20"], "p80": row["speed_up"][name]["p80"],
        }
        for row in rows
        for name, stats in row["seconds"].items()
    ]  # fmt: skip


def report(result: dict) -> str:
    lines = [
        f"{row['case']} {row['dtype']}: {name}: {why}" for row in result["rows"] for name, why in row["wrong"].items()
    ]
    return "\n".join([table.text(table_rows(result["rows"])), *lines, *result["problems"]])


def parser(prog: str) -> Parser:
    made = Parser(prog=prog, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    add = made.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--size", choices=tuple(SIZES), help="default: base on a GPU, small on a CPU; quick shows that everything runs")
    add("--dtype", choices=tuple(DTYPES), nargs="+", help="default: bf16 on a GPU, fp32 and bf16 on a CPU")
    add("--compile", action="store_true", help="transformers compiled too")
    add("--repeats", type=int, default=12, help="most timed rounds of a setting (default 12)")
    add("--seconds", type=float, default=20.0, help="of a setting, after which no round begins (default 20)")
    add("--threads", type=int, help="CPU threads")
    add("--out", type=Path, metavar="DIR", help="write dropin.json there")
    add("--commit", metavar="SHA", help="of these sources, where they are a copy without their history")
    add("--json", action="store_true", help="print the result as one JSON object instead of a table")
    return made


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks dropin") -> int:
    options = parser(prog).parse_args(sys.argv[1:] if arguments is None else arguments)
    device = device_of(options.device)
    for name, least in (("repeats", 2), ("threads", 1)):
        if (given := getattr(options, name)) is not None and given < least:
            raise BadUse(f"--{name} must be at least {least}, got {given}")
    if not options.seconds > 0:
        raise BadUse(f"--seconds must be above 0, got {options.seconds:g}")
    name = options.size or ("base" if device == "cuda" else "small")
    size = SIZES[name]
    full = ON_GPU if device == "cuda" and name == "base" else size.full
    if options.threads:
        torch.set_num_threads(options.threads)
    make_folder(options.out)
    try:
        import transformers
    except ImportError:
        raise BadUse("transformers is not installed: pip install 'stackbert-kernels[hf]'") from None

    result = {
        "format": results_file.FORMAT, "kind": "dropin", "size": name, "transformers": transformers.__version__,
        "machine": machine.machine(device, options.commit), "rows": [], "problems": [],
    }  # fmt: skip
    for dtype in options.dtype or (["bf16"] if device == "cuda" else ["fp32", "bf16"]):
        for setting in settings(size, full):
            print(f"{setting.name} {dtype} ...", file=sys.stderr, flush=True)
            try:
                result["rows"].append(
                    measure(size, setting, device, dtype, compiled=options.compile, repeats=options.repeats, seconds=options.seconds)
                )  # fmt: skip
            except Exception as error:  # the next setting may work
                result["problems"].append(f"{setting.name} {dtype}: {type(error).__name__}: {error}"[:300])
            if options.out:
                results_file.write(options.out / "dropin.json", result)
    head = f"{table.header(result['machine'])}; transformers {transformers.__version__}, {name}"
    print(json.dumps(result, indent=1) if options.json else f"{head}\n\n{report(result)}")
    return FAILED if result["problems"] or any(row["wrong"] for row in result["rows"]) else DONE


if __name__ == "__main__":
    sys.exit(answered(main, sys.argv[1:], "python -m benchmarks.bench_dropin"))
