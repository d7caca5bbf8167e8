"""duplicate_layers_: depth growth. Rows of a bank of layers become copies of lower rows, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops.duplicate_layers import native, reference

triton = library.lazy("stackbert_kernels.ops.duplicate_layers.triton_kernel", "duplicate_layers_")

TABLE = {
    "cpu": {"reference": reference.duplicate_layers_, "native": native.duplicate_layers_cpu, "triton": triton},
    "cuda": {"reference": reference.duplicate_layers_, "native": native.duplicate_layers_cuda, "triton": triton},
}


def _each(duplicate: Callable) -> Callable:
    def duplicate_banks(banks: list[Tensor], layer_map: list[int]) -> None:
        for bank in banks:
            duplicate(bank, layer_map)

    return duplicate_banks


BANKS = {device: {impl: _each(function) for impl, function in table.items()} for device, table in TABLE.items()}
BANKS["cuda"]["native"] = native.duplicate_banks_cuda  # one launch
MOST_TRITON_ROWS = 4096  # the triton kernel names a row by 12 bits


def _why_not(impl: str, *banks: Tensor) -> str | None:
    rows = max(bank.shape[0] for bank in banks)
    if impl == "triton" and rows > MOST_TRITON_ROWS:
        return f"triton takes banks of at most {MOST_TRITON_ROWS} rows, got {rows}"
    return None


OP = library.Op("duplicate_layers_", TABLE, _why_not, any_dtype=True)


def _check(bank: Tensor, layer_map: list[int], name: str = "bank") -> None:
    if bank.dim() == 0:
        raise ValueError(f"duplicate_layers_: {name} must be [L, ...], got a scalar")
    layers = bank.shape[0]
    if len(layer_map) > layers:
        raise ValueError(
            f"duplicate_layers_: layer_map must name at most the {layers} rows of {name}, got {len(layer_map)}"
        )
    for i, source in enumerate(layer_map):
        if not 0 <= source <= i:
            raise ValueError(f"duplicate_layers_: layer_map[{i}] must be in 0..{i}, got {source}")
    if bank.numel() and not (bank[0].is_contiguous() and (layers == 1 or bank.stride(0) >= bank[0].numel())):
        raise ValueError(
            f"duplicate_layers_: each row of {name} must be dense and apart from the others, "
            f"got shape {list(bank.shape)}, strides {list(bank.stride())}"
        )


def _check_banks(banks: list[Tensor], layer_map: list[int]) -> None:
    if not banks:
        raise ValueError("duplicate_layers_: banks must name at least one tensor, got none")
    for i, bank in enumerate(banks):
        _check(bank, layer_map, f"banks[{i}]")
        if bank.device != banks[0].device:
            raise ValueError(
                f"duplicate_layers_: banks[{i}] must be on {banks[0].device} as banks[0], got {bank.device}"
            )


def _check_no_grad(bank: Tensor, name: str = "bank") -> None:
    if bank.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"duplicate_layers_: {name} requires grad and has no gradient through this; call it under torch.no_grad()"
        )


# Not Library.impl: only custom_op(mutates_args=...) raises the version counter, by which autograd sees that saved rows changed.
@torch.library.custom_op(
    "stackbert::duplicate_layers_", mutates_args=("bank",), schema="(Tensor(a!) bank, int[] layer_map, str impl) -> ()"
)
def _duplicate_layers_(bank: Tensor, layer_map: list[int], impl: str) -> None:
    TABLE[bank.device.type][impl](bank, layer_map)


@_duplicate_layers_.register_fake
def _(bank: Tensor, layer_map: list[int], impl: str) -> None:
    _check(bank, layer_map)


def duplicate_layers_(bank: Tensor, layer_map: Sequence[int], *, impl: str = "auto") -> Tensor:
    """Row i of the bank becomes a copy of its old row layer_map[i], in place, without scratch memory.

        bank       [L, ...]  any dtype; each row dense (rows may be apart, as in a column slice of a wider bank)
        layer_map  n <= L integers, 0 <= layer_map[i] <= i; rows from n on keep what they hold
        returns    bank

    [0, 1, 2, 0, 1, 2] stacks three layers twice (Gong et al. 2019), [0, 0, 1, 1, 2, 2] interleaves them. A bank that requires
    grad is refused unless gradients are off, as torch does for other in-place changes of a leaf.

    Before:
        bank[:6] = bank[[0, 1, 2, 0, 1, 2]]
    After:
        sbk.ops.duplicate_layers_(bank, [0, 1, 2, 0, 1, 2])
    """
    layer_map = [index(source) for source in layer_map]
    _check(bank, layer_map)
    _check_no_grad(bank)
    _duplicate_layers_(bank, layer_map, OP.resolve(impl, bank))
    return bank


@torch.library.custom_op(
    "stackbert::duplicate_banks_",
    mutates_args=("banks",),
    schema="(Tensor(a!)[] banks, int[] layer_map, str impl) -> ()",
)
def _duplicate_banks_(banks: list[Tensor], layer_map: list[int], impl: str) -> None:
    BANKS[banks[0].device.type][impl](banks, layer_map)


@_duplicate_banks_.register_fake
def _(banks: list[Tensor], layer_map: list[int], impl: str) -> None:
    _check_banks(banks, layer_map)


def duplicate_banks_(banks: Sequence[Tensor], layer_map: Sequence[int], *, impl: str = "auto") -> None:
    """duplicate_layers_ by one map on several banks of any dtypes: weights, moments, step counts, a copy in bfloat16.

    No bank overlaps another one. The CUDA kernel does up to eight of them in one launch.

    Before:
        for bank in banks:
            bank[:6] = bank[[0, 0, 1, 1, 2, 2]]
    After:
        sbk.ops.duplicate_banks_(banks, [0, 0, 1, 1, 2, 2])
    """
    banks, layer_map = list(banks), [index(source) for source in layer_map]
    _check_banks(banks, layer_map)
    for i, bank in enumerate(banks):
        _check_no_grad(bank, f"banks[{i}]")
    _duplicate_banks_(banks, layer_map, OP.resolve(impl, *banks))
