"""Every `Before:` and `After:` of a public docstring is run on the CPU: they compute the same, and change the same."""

from __future__ import annotations

import copy
import inspect
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stackbert_kernels as sbk

B, S, C, H, D, R, V = 2, 5, 16, 2, 8, 10, 11
WITHOUT = {"Explanation", "available", "explain", "new_rng"}  # nothing in PyTorch that they replace
DOCUMENTED = {
    f"{part}.{name}": getattr(getattr(sbk, part), name)
    for part in ("ops", "nn")
    for name in getattr(sbk, part).__all__
    if name not in WITHOUT
}
BLOCK = re.compile(r"^( *)(Before|After):\n((?:\1 +.*\n|\n)+)", re.MULTILINE)


def example(documented: object) -> dict[str, str]:
    """The code of the two blocks in a docstring."""
    text = inspect.getdoc(documented) + "\n"
    return {kind: textwrap.dedent(code) for _, kind, code in BLOCK.findall(text)}


def parameter(*shape: int) -> Tensor:
    return (torch.randn(shape) / 2).requires_grad_()


def given(name: str) -> dict[str, object]:
    """The variables that the example of `name` reads. Without dropout: two draws could not be compared."""
    ids = {key: torch.randint(0, 4, (B, S)) for key in ("ids", "positions", "token_types")}
    tables = {key: parameter(4, C) for key in ("word", "position", "token_type")}
    row = {"h": parameter(R, C), "residual": parameter(R, C), "dense": parameter(C, C), "x_bias": parameter(C)}
    packed = {"cu_seqlens": torch.tensor([0, 3, R], dtype=torch.int32), "max_seqlen": R - 3}
    projection = {"in_proj_weight": parameter(3 * C, C), "in_proj_bias": parameter(3 * C)}
    norm = {"weight": parameter(C), "bias": parameter(C)}
    x = {"x": parameter(R, C), **norm}
    q, k, v = (parameter(B, S, H, D) for _ in range(3))
    tokens = {key: parameter(R, H, D) for key in ("q", "k", "v")}
    labels = torch.randint(0, V, (R,)).index_fill(0, torch.tensor([0, 4]), -100)
    decoder = {"hidden": parameter(R, C), "weight": parameter(V, C), "bias": parameter(V), "labels": labels}
    weights = [parameter(3, C), parameter(C)]
    for w in weights:
        w.grad = torch.randn_like(w)
    batch = {"x": parameter(B, S, C), "padding": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}
    module = {"p": 0.0, "residual": parameter(B, S, C), **batch}
    return {
        "ops.layer_norm": {**x, "eps": 1e-5},
        "ops.dropout_add_layer_norm": {**norm, **row, "eps": 1e-5, "p": 0.0},
        "ops.dropout_add": {**row, "p": 0.0},
        "ops.bias_gelu": {**norm, **row},
        "ops.dropout": {**x, "p": 0.0},
        "ops.attention": {"q": q, "k": k, "v": v, "lengths": torch.tensor([5, 2], dtype=torch.int32), "p": 0.0},
        "ops.attention_varlen": {**tokens, **packed, "p": 0.0},
        "ops.attention_qkv_varlen": {**x, **projection, **packed, "p": 0.0},
        "ops.masked_lm_loss": decoder,
        "ops.masked_lm_predictions": decoder,
        "ops.embedding_layer_norm": {**ids, **tables, **norm, "eps": 1e-12, "p": 0.0},
        "ops.adamw_": {"weights": weights, "max_norm": 1.0, "lr": 0.1},
        "ops.lamb_": {"weights": weights, "lr": 0.1},
        "ops.lans_": {"weights": weights, "lr": 0.1},
        "ops.global_norm": {"tensors": [w.grad for w in weights]},
        "ops.duplicate_layers_": {"bank": torch.randn(8, C)},
        "ops.duplicate_banks_": {"banks": [torch.randn(8, C), torch.arange(7)]},
        "nn.LayerNorm": module,
        "nn.DropoutAddLayerNorm": module,
        "nn.BiasGELU": module,
        "nn.MultiHeadAttention": module,
    }[name]


def run(code: str, inputs: dict[str, object]) -> dict[str, object]:
    names = {"torch": torch, "nn": nn, "F": F, "sbk": sbk, "C": C, "H": H, "D": D, **copy.deepcopy(inputs)}
    torch.manual_seed(0)  # modules of both sides draw the same parameters
    exec(code, names)
    return names


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, list) else []


def test_the_extractor_reads_both_blocks():
    def documented():
        """What it does.

            x  [C]

        Before:
            y = f(
                x)

            z = 1
        After:
            y = g(x)
        """

    assert example(documented) == {"Before": "y = f(\n    x)\n\nz = 1\n", "After": "y = g(x)\n"}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_before_and_after(name):
    """float32, sums of a few dozen terms: 1e-5 is some hundred roundings. How accurate an op is, its own tests say."""
    code = example(DOCUMENTED[name])
    assert set(code) == {"Before", "After"}, f"{name}: its docstring lacks a Before: or an After:"
    assert "sbk." not in code["Before"] and f"sbk.{name}(" in code["After"]
    inputs = given(name)
    before, after = run(code["Before"], inputs), run(code["After"], inputs)

    results = [key for key in before if key in after and key not in inputs and tensors(before[key])]
    changed = [
        key
        for key, value in inputs.items()
        if any(not torch.equal(a, b) for a, b in zip(tensors(value), tensors(before[key]), strict=True))
    ]
    assert results or changed, f"{name}: nothing to compare"
    places = ~inputs["padding"] if name == "nn.MultiHeadAttention" else ...  # its output at padding means nothing
    for key in [*results, *(key for key in inputs if tensors(before[key]))]:
        for wanted, got in zip(tensors(before[key]), tensors(after[key]), strict=True):
            if key in results:
                wanted, got = wanted[places], got[places]
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

    if changed or not any(t.requires_grad for key in results for t in tensors(after[key])):
        return
    for names in (before, after):
        sum((t[places] ** 2).sum() for key in results for t in tensors(names[key]) if t.requires_grad).backward()
    for key in inputs:
        for wanted, got in zip(tensors(before[key]), tensors(after[key]), strict=True):
            if wanted.requires_grad and wanted.grad is not None:
                torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-4)
