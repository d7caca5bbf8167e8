"""What the tests of this folder call: for each op small awkward sizes, and on a GPU BERT's.

Values are exact in bfloat16 and float16, so that the exact result is the same for every dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from stackbert_kernels import doctor, ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEED, STEP = 2**40 + 7, 2**33 + 5  # of the masks; both halves of each word matter


@dataclass(frozen=True, eq=False)
class Case:
    """`call(tensors, integers, rng, impl)` is the op; `make` gives its tensors, which get gradients."""

    op: str
    name: str
    make: Callable[[], dict[str, Tensor]]
    call: Callable[[dict[str, Tensor], dict[str, Tensor], Tensor, str], Tensor]
    integers: dict[str, Tensor] = field(default_factory=dict)
    wide: tuple[str, ...] = ()  # stay float32 whatever the dtype
    random: bool = False  # the result depends on the rng
    static: bool = True  # nothing is copied from the host in a call
    big: bool = False

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return self.make()


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = (scale * torch.randn(*shape, generator=generator)).bfloat16()
    return torch.where(values.abs() < 2**-12, 0, values).double()  # smaller ones are not exact in float16


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def running(lengths) -> Tensor:
    return int32(0, *torch.tensor(lengths).cumsum(0).tolist())


SITE = 2**31 + 5


def packed(name: str, lengths, heads: int, head_dim: int, p: float) -> Case:
    T, longest = sum(lengths), max(lengths)
    return Case(
        "attention", name, lambda: {n: normal(i, T, heads, head_dim) for i, n in enumerate("qkv")},
        lambda t, n, rng, impl: ops.attention_varlen(
            t["q"], t["k"], t["v"], n["cu"], longest, dropout_p=p, rng=rng, site=SITE, impl=impl
        ),
        {"cu": running(lengths)}, random=p > 0,
    )  # fmt: skip


def fused(name: str, lengths, heads: int, head_dim: int, p: float) -> Case:
    T, longest = sum(lengths), max(lengths)
    return Case(
        "attention", name, lambda: {"qkv": normal(3, T, 3, heads, head_dim)},
        lambda t, n, rng, impl: ops.attention_qkv_varlen(
            t["qkv"], n["cu"], longest, dropout_p=p, rng=rng, site=SITE, impl=impl
        ),
        {"cu": running(lengths)}, random=p > 0,
    )  # fmt: skip


def padded(name: str, longest: int, lengths, heads: int, head_dim: int, p: float) -> Case:
    return Case(
        "attention", name, lambda: {n: normal(i, len(lengths), longest, heads, head_dim) for i, n in enumerate("qkv")},
        lambda t, n, rng, impl: ops.attention(
            t["q"], t["k"], t["v"], n["lengths"], dropout_p=p, rng=rng, site=SITE, scale=0.3, impl=impl
        ),
        {"lengths": int32(*lengths)}, random=p > 0,
    )  # fmt: skip


def layer_norm(name: str, rows: int, columns: int, offset: float = 0.0) -> Case:
    return Case(
        "layer_norm", name,
        lambda: {
            "x": (normal(0, rows, columns) + offset).bfloat16().double(),
            "weight": normal(1, columns),
            "bias": normal(2, columns),
        },
        lambda t, n, rng, impl: ops.layer_norm(t["x"], t["weight"], t["bias"], 1e-12, impl=impl),
        wide=("weight", "bias") if columns >= 768 else (),
    )  # fmt: skip


def add_norm(name: str, rows: int, columns: int, p: float, x_bias: bool = True) -> Case:
    shapes = {"x": (rows, columns), "residual": (rows, columns), "weight": (columns,), "bias": (columns,)}
    shapes |= {"x_bias": (columns,)} if x_bias else {}
    return Case(
        "dropout_add_layer_norm", name, lambda: {n: normal(i, *shape) for i, (n, shape) in enumerate(shapes.items())},
        lambda t, n, rng, impl: ops.dropout_add_layer_norm(**t, dropout_p=p, rng=rng, site=SITE, impl=impl),
        wide=("weight", "bias", "x_bias") if columns >= 768 else (), random=p > 0,
    )  # fmt: skip


def add(name: str, rows: int, columns: int, p: float, x_bias: bool = True) -> Case:
    shapes = {"x": (rows, columns), "residual": (rows, columns)} | ({"x_bias": (columns,)} if x_bias else {})
    return Case(
        "dropout_add", name, lambda: {n: normal(i, *shape) for i, (n, shape) in enumerate(shapes.items())},
        lambda t, n, rng, impl: ops.dropout_add(**t, dropout_p=p, rng=rng, site=SITE, impl=impl),
        wide=("x_bias",) if columns >= 768 else (), random=p > 0,
    )  # fmt: skip


def gelu(name: str, rows: int, columns: int, approximate: str) -> Case:
    return Case(
        "bias_gelu", name, lambda: {"x": normal(0, rows, columns), "bias": normal(1, columns)},
        lambda t, n, rng, impl: ops.bias_gelu(t["x"], t["bias"], approximate=approximate, impl=impl),
        wide=("bias",) if columns >= 768 else (),
    )  # fmt: skip


def dropout(name: str, rows: int, columns: int, p: float) -> Case:
    return Case(
        "dropout", name, lambda: {"x": normal(0, rows, columns)},
        lambda t, n, rng, impl: ops.dropout(t["x"], p, rng=rng, site=SITE, impl=impl), random=True,
    )  # fmt: skip


def loss(name: str, rows: int, columns: int, words: int, ignored: bool) -> Case:
    labels = torch.randint(0, words, (rows,), generator=torch.Generator().manual_seed(0))
    if ignored:
        labels[::4] = -100
    return Case(
        "masked_lm_loss", name,
        lambda: {
            "hidden": normal(0, rows, columns),
            "weight": normal(1, words, columns, scale=columns**-0.5),
            "bias": normal(2, words),
        },
        lambda t, n, rng, impl: ops.masked_lm_loss(t["hidden"], t["weight"], t["bias"], n["labels"], impl=impl),
        {"labels": labels}, wide=("weight", "bias") if columns >= 768 else (),
    )  # fmt: skip


def embedding(name: str, tokens: int, columns: int, rows: tuple[int, int, int], p: float) -> Case:
    """One word in four is the same, as [MASK] is."""
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.randint(0, r, (tokens,), generator=generator) for n, r in zip(INDICES, rows, strict=True)}
    drawn["ids"][::4] = rows[0] // 2
    return Case(
        "embedding_layer_norm", name,
        lambda: {n: normal(i, r, columns) for i, (n, r) in enumerate(zip(TABLES, rows, strict=True))}
        | {"weight": normal(3, columns), "bias": normal(4, columns)},
        lambda t, n, rng, impl: ops.embedding_layer_norm(**n, **t, dropout_p=p, rng=rng, site=SITE, impl=impl),
        drawn, wide=("weight", "bias") if columns >= 768 else (), random=p > 0,
    )  # fmt: skip


INDICES, TABLES = ("ids", "positions", "token_types"), ("word", "position", "token_type")


def adam(name: str, layers: int, columns: int, decay: int) -> Case:
    """On copies, each row at a step of its own; what is compared are the new weights and moments together."""

    def call(t, n, rng, impl):
        with torch.no_grad():
            weights, exp_avg, exp_avg_sq = t["weights"].clone(), t["exp_avg"].clone(), t["exp_avg_sq"].abs()
            ops.adamw_(
                [weights], [t["grads"]], [exp_avg], [exp_avg_sq], [n["steps"].clone()], [decay],
                lr=0.1, weight_decay=0.5, norm=n["norm"], max_norm=1.0, impl=impl,
            )  # fmt: skip
            return torch.stack([weights, exp_avg, exp_avg_sq])

    def make() -> dict[str, Tensor]:
        return {name: normal(i, layers, columns) for i, name in enumerate(named)}

    steps = torch.arange(layers, dtype=torch.float32) * 7
    named = ("weights", "grads", "exp_avg", "exp_avg_sq")
    return Case("adamw_", name, make, call, {"steps": steps, "norm": torch.tensor(3.0)}, wide=named)


def layerwise(op: str, layers: int, parts: list[int], decay: int) -> Case:
    """LAMB and LANS, on copies as adam()."""

    def call(t, n, rng, impl):
        with torch.no_grad():
            weights, exp_avg, exp_avg_sq = t["weights"].clone(), t["exp_avg"].clone(), t["exp_avg_sq"].abs()
            getattr(ops, op)(
                [weights], [t["grads"]], [exp_avg], [exp_avg_sq], [n["steps"].clone()], [decay], [parts],
                lr=0.1, weight_decay=0.5, norm=n["norm"], impl=impl,
            )  # fmt: skip
            return torch.stack([weights, exp_avg, exp_avg_sq])

    def make() -> dict[str, Tensor]:
        return {name: normal(i, layers, sum(parts)) for i, name in enumerate(named)}

    steps = torch.arange(layers, dtype=torch.float32) * 7
    named = ("weights", "grads", "exp_avg", "exp_avg_sq")
    name = f"{layers} x {len(parts)} parts"
    return Case(op, name, make, call, {"steps": steps, "norm": torch.tensor(3.0)}, wide=named)


def duplication(name: str, rows: int, columns: int, layer_map: list[int], apart: int = 0) -> Case:
    """On a copy, which has `apart` more columns: rows that are not one behind the other. Its gradient is the copy's, by torch."""

    def call(t, n, rng, impl):
        with torch.no_grad():
            bank = torch.cat([t["bank"], t["bank"][:, :apart]], 1)[:, :columns]
            return ops.duplicate_layers_(bank, layer_map, impl=impl)

    return Case("duplicate_layers_", name, lambda: {"bank": normal(0, rows, columns)}, call)


# The first of an op is tiny: Triton's interpreter takes that one alone.
SMALL = (
    packed("few", (3, 0, 17), 2, 32, 0.1),
    packed("packed", (0, 1, 37, 65, 130), 2, 64, 0.1),
    fused("fused", (70, 3, 64), 3, 32, 0.1),
    padded("padded", 70, (70, 0, 33), 2, 40, 0.3),
    padded("tiles", 260, (129, 0, 260, 33), 2, 96, 0.1),
    packed("p=0", (5, 129), 1, 128, 0.0),
    layer_norm("odd", 5, 20),
    layer_norm("one", 1, 1),
    layer_norm("offset", 33, 769, offset=30.0),
    add_norm("odd", 5, 20, 0.1),
    add_norm("no bias", 5, 1000, 0.3, x_bias=False),
    add_norm("p=0", 7, 33, 0.0),
    add("odd", 5, 20, 0.1),
    add("no bias", 5, 1000, 0.3, x_bias=False),
    add("p=0", 7, 33, 0.0),
    gelu("erf", 5, 20, "none"),
    gelu("tanh", 5, 1001, "tanh"),
    dropout("odd", 5, 20, 0.1),
    dropout("wide", 3, 1001, 0.5),
    loss("ignored", 19, 72, 150, True),
    loss("odd", 3, 33, 1001, False),
    duplication("stack", 6, 50, [0, 1, 2, 0, 1, 2]),
    embedding("odd", 5, 20, (7, 5, 2), 0.1),
    embedding("p=0", 70, 33, (3, 70, 1), 0.0),
    adam("bank", 3, 75, 60),
    *(layerwise(op, 2, [7, 20], 7) for op in ("lamb_", "lans_")),
    *(layerwise(op, 3, [40, 20, 15], 60) for op in ("lamb_", "lans_")),
    duplication("interleave", 6, 1003, [0, 0, 1, 1, 2, 2], apart=5),
)


# BERT's sizes, on a GPU only. The largest numbers of rows pass 65,535, which a grid's second dimension cannot.
LARGE = tuple(
    replace(case, big=True)
    for case in (
        packed("base", (512, 384, 512, 128), 12, 64, 0.1),
        fused("natural", tuple(range(8, 416, 17)), 12, 64, 0.1),
        layer_norm("base", 8192, 768),
        layer_norm("many rows", 70_000, 72),
        add_norm("large", 8192, 1024, 0.1),
        add_norm("many rows", 70_000, 72, 0.1),
        add("base", 8192, 768, 0.1),
        add("many rows", 70_000, 72, 0.1),
        gelu("base", 8192, 3072, "none"),
        gelu("large", 4096, 4096, "tanh"),
        dropout("base", 8192, 768, 0.1),
        loss("base", 1229, 768, 30_528, False),
        embedding("base", 8192, 768, (30_522, 512, 2), 0.1),
        adam("base", 12, 1 << 16, 60_000),
        *(layerwise(op, 12, [40_000, 20_000, 5_536], 60_000) for op in ("lamb_", "lans_")),
        duplication("base", 12, 1 << 18, [0, 1, 2, 3, 4, 5] * 2),
    )
)


@cache
def from_doctor(op: str) -> Case:
    """An op that has no case here is called as the doctor's self-test calls it."""
    tensors, call = doctor.cases()[op]
    return Case(
        op,
        "doctor",
        lambda: {str(i): t for i, t in enumerate(tensors)},
        lambda t, n, rng, impl: call(*t.values(), impl=impl),
        static=False,
    )


def cases(op: str, kind: str) -> list[Case]:
    """Those of an op on a kind of device."""
    return [case for case in (*SMALL, *(LARGE if kind == "cuda" else ())) if case.op == op] or [from_doctor(op)]


def rng_on(device: str, step: int = STEP) -> Tensor:
    return ops.new_rng(SEED, step, device=device)


def inputs(case: Case, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return {n: t.to(device, wide if n in case.wide else dtype).requires_grad_() for n, t in case.tensors.items()}


def integers(case: Case, device: str) -> dict[str, Tensor]:
    return {name: t.to(device) for name, t in case.integers.items()}


def incoming(y: Tensor) -> Tensor:
    """A gradient: exact in every dtype, of both signs, not the same everywhere; made on the device, as a graph's capture wants."""
    return ((torch.arange(y.numel(), device=y.device) * 3 % 8) - 3.5).to(y.dtype).reshape(y.shape)


def results(
    case: Case, tensors: dict[str, Tensor], whole: dict[str, Tensor], rng: Tensor, impl: str
) -> dict[str, Tensor]:
    """The output and the gradient of every tensor, by name."""
    y = case.call(tensors, whole, rng, impl)
    if not y.requires_grad:
        return {"output": y}
    gradients = torch.autograd.grad(y, list(tensors.values()), incoming(y))
    return {"output": y.detach(), **{f"d{name}": g for name, g in zip(tensors, gradients, strict=True)}}


@cache
def exact(case: Case, device: str) -> dict[str, Tensor]:
    """By the reference in float64: on the CPU for small cases, so that nothing of a GPU is in it."""
    where = device if case.big else "cpu"
    tensors = inputs(case, where, torch.float64)
    found = results(case, tensors, integers(case, where), rng_on(where), "reference")
    return {name: result.cpu() for name, result in found.items()}
