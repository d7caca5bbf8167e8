"""Row duplication by csrc/duplicate_layers."""

import torch
from torch import Tensor

from stackbert_kernels.ops._library import _C


def _rows(bank: Tensor) -> tuple[int, int, int]:
    """Address, bytes of a row, bytes from a row to the next."""
    return bank.data_ptr(), bank[0].numel() * bank.element_size(), bank.stride(0) * bank.element_size()


def duplicate_layers_cpu(bank: Tensor, layer_map: list[int]) -> None:
    if bank.numel():
        _C.duplicate_layers(*_rows(bank), layer_map, torch.get_num_threads())


def duplicate_layers_cuda(bank: Tensor, layer_map: list[int]) -> None:
    if bank.numel():
        stream = torch.cuda.current_stream(bank.device).cuda_stream
        _C.duplicate_layers_cuda(*_rows(bank), layer_map, bank.device.index, stream)
