"""Row duplication by csrc/duplicate_layers."""

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops._library import _C


def _rows(bank: Tensor) -> dict[str, int]:
    """Address, bytes of a row, bytes from a row to the next."""
    size = bank.element_size()
    return {"bank": bank.data_ptr(), "row_bytes": bank[0].numel() * size, "row_stride": bank.stride(0) * size}


def duplicate_layers_cpu(bank: Tensor, layer_map: list[int]) -> None:
    if bank.numel():
        _C.duplicate_layers(**_rows(bank), map=layer_map, threads=torch.get_num_threads())


def duplicate_layers_cuda(bank: Tensor, layer_map: list[int]) -> None:
    duplicate_banks_cuda([bank], layer_map)


def duplicate_banks_cuda(banks: list[Tensor], layer_map: list[int]) -> None:
    rows = [tuple(_rows(bank).values()) for bank in banks if bank.numel()]
    if rows:
        library.launch("duplicate_layers_cuda", banks[0], banks=rows, map=layer_map)
