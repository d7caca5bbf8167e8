"""A patched torch.nn.TransformerEncoder beside the same one as PyTorch runs it.

    python -m benchmarks torch_encoder [--out DIR] [--repeats 20]

In training, forward and backward with dropout: full sequences, post-LN and pre-LN, and natural lengths padded to the longest of the batch;
in evaluation with and without padding, where PyTorch has its fused layer. On a GPU BERT-base in bfloat16, on a CPU two layers in float32.
What is wrong gets no time: without dropout, the error of outputs at tokens and of every gradient against float64 must be at most four times
that of PyTorch's worst one.
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
from .lengths import equal, natural

TORCH, OURS = "torch", "ours patched"


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    heads: int
    tokens: int
    seq_len: int
    dtype: torch.dtype


SIZES = {
    "cuda": Size(12, 768, 12, 32768, 512, torch.bfloat16),
    "cpu": Size(2, 256, 4, 2048, 256, torch.float32),
    "quick": Size(1, 16, 2, 512, 128, torch.float32),
}


@dataclass(frozen=True)
class Setting:
    name: str
    training: bool
    lengths: tuple[int, ...]
    norm_first: bool = False
    activation: str = "gelu"
    unpad: bool = False  # whether patched with it


def settings(size: Size) -> list[Setting]:
    full, mixed = tuple(equal(size.tokens, size.seq_len)), tuple(natural(size.tokens // 2, size.seq_len))
    return [
        Setting("training, full length", True, full),
        Setting("training, full length, pre-LN", True, full, norm_first=True),
        Setting("training, full length, ReLU", True, full, activation="relu"),
        Setting("training, natural lengths, unpad", True, mixed, unpad=True),
        Setting("training, natural lengths", True, mixed),
        Setting("evaluation, full length", False, full),
        Setting("evaluation, natural lengths, unpad", False, mixed, unpad=True),
        Setting("evaluation, natural lengths", False, mixed),
    ]


def encoder(size: Size, setting: Setting, device: str, p: float) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        size.hidden, size.heads, 4 * size.hidden, p, setting.activation, batch_first=True, norm_first=setting.norm_first
    )
    made = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=not setting.norm_first)
    return made.to(device).train(setting.training)


def batch(size: Size, lengths: Sequence[int], device: str) -> tuple[Tensor, Tensor | None]:
    """x [B, S, C] and its padding [B, S], None where there is none."""
    longest = max(lengths)
    x = torch.randn(len(lengths), longest, size.hidden, device=device)
    padding = torch.arange(longest, device=device) >= torch.tensor(lengths, device=device)[:, None]
    return x, padding if min(lengths) < longest else None


def loss_of(model: nn.Module, x: Tensor, padding: Tensor | None) -> Tensor:
    """Of tokens; unlike the square, it changes with what stands before a layer norm."""
    y = model(x, src_key_padding_mask=padding)
    y = y if padding is None else y[~padding]
    return (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype, device=y.device)).mean()


def results(model: nn.Module, x: Tensor, padding: Tensor | None, training: bool) -> dict[str, Tensor]:
    """What is compared: gradients in training, else the output at tokens."""
    if not training:
        with torch.no_grad():
            y = model(x, src_key_padding_mask=padding)
        return {"output": y if padding is None else y[~padding]}
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss_of(model, x, padding), parameters), strict=True))


def why_wrong(size: Size, setting: Setting, device: str) -> str | None:
    """On two sequences, without dropout."""
    model = encoder(size, setting, device, p=0.0)
    x, padding = batch(size, (max(setting.lengths), min(setting.lengths)), device)
    exact = results(copy.deepcopy(model).double(), x.double(), padding, setting.training)
    model, x = model.to(size.dtype), x.to(size.dtype)
    baseline = results(model, x, padding, setting.training)
    patch(model, unpad=setting.unpad)
    actual = results(model, x, padding, setting.training)

    def error(given: dict[str, Tensor], name: str) -> float:
        return float((given[name] - exact[name]).abs().max() / exact[name].abs().max())

    allowed = 4 * max(torch.finfo(size.dtype).eps, *(error(baseline, name) for name in exact))
    for name in exact:
        if not error(actual, name) <= allowed:
            return (
                f"{name} is off by {error(actual, name):.3g} of its largest element, at most {allowed:.3g} is rounding"
            )
    return None


def call_of(model: nn.Module, x: Tensor, padding: Tensor | None, training: bool) -> Callable[[int], None]:
    if not training:
        return torch.no_grad()(lambda _: model(x, src_key_padding_mask=padding))

    def step(_: int) -> None:
        model.zero_grad(set_to_none=True)
        loss_of(model, x, padding).backward()

    return step


def measure(size: Size, setting: Setting, device: str, *, repeats: int = 20, seconds: float = 5.0) -> dict:
    """The row of a setting."""
    torch.manual_seed(0)
    p = 0.1 if setting.training else 0.0
    wrong = why_wrong(size, setting, device)
    theirs = encoder(size, setting, device, p).to(size.dtype)
    x, padding = batch(size, setting.lengths, device)
    x = x.to(size.dtype)
    calls = {TORCH: call_of(theirs, x, padding, setting.training)}
    if wrong is None:
        ours = copy.deepcopy(theirs)
        patch(ours, unpad=setting.unpad)
        calls[OURS] = call_of(ours, x, padding, setting.training)
    stats = interleave(calls, device, repeats=repeats, warmup=1, seconds=seconds)
    return {
        "op": "torch_encoder", "case": setting.name, "dtype": str(size.dtype).removeprefix("torch."), "p": p,
        "direction": "step" if setting.training else "frozen forward",
        "sizes": {"L": size.layers, "C": size.hidden, "B": len(setting.lengths), "S": max(setting.lengths)},
        "options": {"unpad": True} if setting.unpad else {}, "bytes": 0, "flops": 0,
        "tokens": sum(setting.lengths), "padded_tokens": len(setting.lengths) * max(setting.lengths),
        "ours": OURS if wrong is None else None, "seconds": {name: s.as_dict() for name, s in stats.items()},
        "absent": {}, "wrong": {OURS: wrong} if wrong else {},
        "ratios": {} if wrong else {TORCH: ratio(stats, TORCH, OURS).as_dict()},
    }  # fmt: skip


def table_rows(rows: Sequence[dict]) -> list[dict[str, object]]:
    return [
        {
            "case": row["case"], "dtype": row["dtype"], "p": row["p"], "tokens": row["tokens"], "with padding": row["padded_tokens"],
            "torch ms": 1e3 * row["seconds"][TORCH]["median"],
            "patched ms": 1e3 * row["seconds"][OURS]["median"] if row["ours"] else None,
            "times as fast": row["ratios"][TORCH]["median"] if row["ours"] else None,
        }
        for row in rows
    ]  # fmt: skip


def parser(prog: str) -> Parser:
    made = Parser(prog=prog, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    add = made.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--quick", action="store_true", help="tiny sizes: shows that everything runs, not how fast")
    add("--repeats", type=int, default=20, help="most timed rounds of a setting (default 20)")
    add("--seconds", type=float, default=5.0, help="of a setting, after which no round begins (default 5)")
    add("--threads", type=int, help="CPU threads")
    add("--out", type=Path, metavar="DIR", help="write torch_encoder.json there")
    add("--commit", metavar="SHA", help="of these sources, where they are a copy without their history")
    add("--json", action="store_true", help="print the result as one JSON object instead of a table")
    return made


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks torch_encoder") -> int:
    options = parser(prog).parse_args(sys.argv[1:] if arguments is None else arguments)
    device = device_of(options.device)
    for name, least in (("repeats", 2), ("threads", 1)):
        if (given := getattr(options, name)) is not None and given < least:
            raise BadUse(f"--{name} must be at least {least}, got {given}")
    if not options.seconds > 0:
        raise BadUse(f"--seconds must be above 0, got {options.seconds:g}")
    if options.threads:
        torch.set_num_threads(options.threads)
    make_folder(options.out)
    size = SIZES["quick" if options.quick else device]
    result = {
        "format": results_file.FORMAT, "kind": "torch_encoder", "machine": machine.machine(device, options.commit),
        "rows": [], "problems": [],
    }  # fmt: skip
    for setting in settings(size):
        print(f"{setting.name} ...", file=sys.stderr, flush=True)
        result["rows"].append(measure(size, setting, device, repeats=options.repeats, seconds=options.seconds))
        if options.out:
            results_file.write(options.out / "torch_encoder.json", result)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        lines = [table.header(result["machine"]), "", table.text(table_rows(result["rows"]))]
        print("\n".join([*lines, *table.left_out(result["rows"])]))
    return FAILED if any(row["wrong"] for row in result["rows"]) else DONE


if __name__ == "__main__":
    sys.exit(answered(main, sys.argv[1:], "python -m benchmarks.bench_torch_encoder"))
