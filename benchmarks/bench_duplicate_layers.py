"""duplicate_layers_: depth growth L -> 2 L by [0..L-1, 0..L-1] of the weights and both moments, three banks [2 L, P] of float32 by
one call, as growth does it."""

from __future__ import annotations

from dataclasses import replace

import torch

from stackbert_kernels import ops

from .harness import STEP, Bench, Call, Case, Inputs, Peer

BASE, LARGE = 7_087_872, 12_596_224  # parameters of an encoder layer of BERT-base and -large
CHECKED_ELEMENTS = 1 << 18  # of a row, in float64: copying is exact
BANKS = ("weights", "exp_avg", "exp_avg_sq")


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [_case(3, 64)]
    if device == "cpu":
        return [_case(3, BASE), _case(6, 200_000)]
    return [_case(6, BASE, main=True), _case(3, BASE), _case(12, LARGE)]


def _case(L: int, P: int, **rest) -> Case:
    return Case(f"{L} to {2 * L} layers of {P}", {"L": L, "P": P}, torch.float32, directions=(STEP,), **rest)


def checked(case: Case) -> Case:
    return replace(case, sizes={**case.sizes, "P": min(case["P"], CHECKED_ELEMENTS)})


def inputs(case: Case, device: str) -> Inputs:
    return {bank: torch.randn(2 * case["L"], case["P"], device=device) for bank in BANKS}


def ours(case: Case, t: Inputs, impl: str) -> Call:
    layer_map = list(range(case["L"])) * 2
    banks = [t[bank] for bank in BANKS]

    def call():
        ops.duplicate_banks_(banks, layer_map, impl=impl)
        return t

    return call


def halves(case: Case, t: Inputs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    L = case["L"]
    return [t[bank][L:] for bank in BANKS], [t[bank][:L] for bank in BANKS]


def copies(case: Case, t: Inputs) -> Call:
    def call():
        for upper, lower in zip(*halves(case, t), strict=True):
            upper.copy_(lower)
        return t

    return call


def foreach(case: Case, t: Inputs) -> Call:
    upper, lower = halves(case, t)

    def call():
        torch._foreach_copy_(upper, lower)
        return t

    return call


def bytes_moved(case: Case, direction: str) -> int:
    """The lower rows are read, the upper ones written."""
    return len(BANKS) * 2 * case["L"] * case["P"] * 4


DUPLICATE_LAYERS = Bench(
    op="duplicate_layers_",
    folder="duplicate_layers",
    cases=cases,
    inputs=inputs,
    ours=ours,
    peers=(Peer("torch", copies), Peer("torch foreach", foreach)),
    bytes_moved=bytes_moved,
    flops=lambda case, direction: 0,
    test="python_tests/ops/test_duplicate_layers.py",
    checked=checked,
)

BENCHES = (DUPLICATE_LAYERS,)
