"""What a step works on, as tables in device memory that the kernels of triton_kernel.py and csrc/optimizer/*.cu read.

One has a line for each row (of a bank; a tensor that counts its steps as one is one row): its addresses, how many elements it has and
how many of them decay. The other says which line each block works on. Both are made when addresses or sizes change, which within a
stage they seldom do, and kept.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# A line of the table: int64 each.
ADDRESSES = range(6)  # weights, grads, exp_avg, exp_avg_sq, copies (0 = none), step
SIZES = range(
    6, 10
)  # elements; those that decay; first block; how many blocks are whole, at addresses for 16-byte accesses
FIELDS = 10
KEPT = 64
ADAPTED, COUNTS = (
    1,
    2,
)  # flags of a part: it has weight decay and a trust ratio; it is the one of its row that counts the step

Entry = tuple[int, ...]  # the addresses of a tensor's line, of its first row; rows, size, decay
Parts = tuple[int, ...]  # the sizes of a row's parts


def tables(
    weights: list[Tensor],
    grads: list[Tensor],  # dense
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    copies: list[Tensor],
    steps: list[Tensor],
    decay: list[int],
    elements: int,  # of a block
) -> tuple[Tensor, Tensor]:
    """[rows, FIELDS] int64 and [blocks] int32, for kernels on the current stream."""
    device = weights[0].device
    tensors = zip(weights, grads, exp_avg, exp_avg_sq, copies or [None] * len(weights), steps, decay, strict=True)
    entries = tuple(
        (
            w.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), 0 if c is None else c.data_ptr(), t.data_ptr(),
            t.numel(), w.numel() // max(1, t.numel()), d,
        )
        for w, g, m, v, c, t, d in tensors
    )  # fmt: skip
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    lines = _lines(tuple(entry[6:8] for entry in entries), elements, device, stream)
    return _table(entries, elements, device, stream), lines


def parts_of(op: str, weights: list[Tensor], steps: list[Tensor], sizes: list[int]) -> list[Parts]:
    """The sizes of the parts of a row of each tensor, of all sizes one after another; (0,) where a row has no elements."""
    found, i = [], 0
    for w, t in zip(weights, steps, strict=True):
        size, first, left = w.numel() // max(1, t.numel()), i, w.numel() // max(1, t.numel())
        while left > 0 and i < len(sizes):
            left -= sizes[i]
            i += 1
        if left:
            raise ValueError(f"{op}: the parts of a row must sum to {size}, its elements, got {list(sizes[first:i])}")
        found.append(tuple(sizes[first:i]) or (0,))
    return found


def part_tables(
    weights: list[Tensor],
    grads: list[Tensor],  # dense
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    copies: list[Tensor],
    steps: list[Tensor],
    decay: list[int],
    parts: list[Parts],
    elements: int,
) -> tuple[Tensor, Tensor]:
    """[parts, FIELDS] int64 as above, a line for each part of each row, with flags in place of `decay`; and [blocks] int32."""
    device = weights[0].device
    tensors = zip(
        weights, grads, exp_avg, exp_avg_sq, copies or [None] * len(weights), steps, decay, parts, strict=True
    )
    entries = tuple(
        (
            w.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), 0 if c is None else c.data_ptr(), t.data_ptr(),
            t.numel(), d, sizes,
        )
        for w, g, m, v, c, t, d, sizes in tensors
    )  # fmt: skip
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    lines = _part_lines(tuple((entry[6], entry[8]) for entry in entries), elements, device, stream)
    return _part_table(entries, elements, device, stream), lines


def norm_tables(tensors: list[Tensor], elements: int) -> tuple[Tensor, Tensor]:
    """[tensors, 4] int64: address, elements, first block, whole blocks as above; and [blocks] int32."""
    device = tensors[0].device
    entries = tuple((t.data_ptr(), t.numel()) for t in tensors)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    lines = _lines(tuple((1, size) for _, size in entries), elements, device, stream)
    return _norm_table(entries, elements, device, stream), lines


def _blocks(size: int, elements: int) -> int:
    return -(-size // elements)


@lru_cache(maxsize=KEPT)
def _lines(sizes: tuple[tuple[int, int], ...], elements: int, device: torch.device, stream: int) -> Tensor:
    """(rows, size) of each tensor -> [blocks] int32, on the device."""
    rows = [size for rows, size in sizes for _ in range(rows)]
    blocks = torch.tensor([_blocks(size, elements) for size in rows], dtype=torch.int64)
    return _sent(torch.arange(len(rows), dtype=torch.int32).repeat_interleave(blocks), device)


@lru_cache(maxsize=KEPT)
def _table(entries: tuple[Entry, ...], elements: int, device: torch.device, stream: int) -> Tensor:
    """[rows, FIELDS] int64, on the device."""
    lines, first = [], 0
    for *addresses, copies, step, rows, size, decay in entries:
        for row in range(rows):
            at = [a + 4 * row * size for a in addresses] + [copies + 2 * row * size if copies else 0]
            blocks, wide = _blocks(size, elements), size // elements if all(a % 16 == 0 for a in at) else 0
            lines.append([*at, step + 4 * row, size, decay, first, wide])
            first += blocks
    return _sent(torch.tensor(lines, dtype=torch.int64).view(-1, FIELDS), device)


@lru_cache(maxsize=KEPT)
def _part_lines(sizes: tuple[tuple[int, Parts], ...], elements: int, device: torch.device, stream: int) -> Tensor:
    return _lines(tuple((1, size) for rows, parts in sizes for size in parts * rows), elements, device, stream)


@lru_cache(maxsize=KEPT)
def _part_table(entries: tuple[tuple, ...], elements: int, device: torch.device, stream: int) -> Tensor:
    lines, first = [], 0
    for *addresses, copies, step, rows, decay, parts in entries:
        for row in range(rows):
            begin = 0
            for i, size in enumerate(parts):
                e = row * sum(parts) + begin
                at = [a + 4 * e for a in addresses] + [copies + 2 * e if copies else 0]
                blocks, wide = _blocks(size, elements), size // elements if all(a % 16 == 0 for a in at) else 0
                flags = (ADAPTED if begin < decay else 0) | (COUNTS if i == 0 else 0)
                lines.append([*at, step + 4 * row, size, flags, first, wide])
                begin, first = begin + size, first + blocks
    return _sent(torch.tensor(lines, dtype=torch.int64).view(-1, FIELDS), device)


@lru_cache(maxsize=KEPT)
def _norm_table(entries: tuple[Entry, ...], elements: int, device: torch.device, stream: int) -> Tensor:
    lines, first = [], 0
    for address, size in entries:
        lines.append([address, size, first, size // elements if address % 16 == 0 else 0])
        first += _blocks(size, elements)
    return _sent(torch.tensor(lines, dtype=torch.int64), device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for work on its current stream; the host does not wait."""
    if device.type != "cuda":
        return tensor
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "optimizer: a CUDA graph can capture a step or a norm only after a call with the same tensors on the same stream, which makes its table"
        )
    return tensor.pin_memory().to(device, non_blocking=True)
