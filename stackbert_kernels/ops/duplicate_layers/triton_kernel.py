"""Row duplication in Triton: one launch for every 32 rows that change. Rows are moved as 16-byte units, whatever they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from stackbert_kernels.ops import _triton

MOVES = 32  # of a launch
WORDS = {16: (tl.int32, 4), 8: (tl.int32, 2), 4: (tl.int32, 1), 2: (tl.int16, 1), 1: (tl.int8, 1)}  # bytes of a unit


@triton.jit(do_not_specialize=["stride", "units"])
def duplicate_layers_kernel(bank_ptr, stride, units, moves, WORDS_A_UNIT: tl.constexpr, UNITS: tl.constexpr):
    # A program does all moves of its own columns, last row first, each thread its own units: nothing of another one is read or written.
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)[:, None]
    inside = unit < units
    c = unit * WORDS_A_UNIT + tl.arange(0, WORDS_A_UNIT)[None, :]
    for i in tl.static_range(len(moves)):
        to, source = moves[i] >> 16, (moves[i] >> 4) & 0xFFF
        if to != source:
            held = tl.load(bank_ptr + (source.to(tl.int64) * stride * WORDS_A_UNIT + c), mask=inside)
            tl.store(bank_ptr + (to.to(tl.int64) * stride * WORDS_A_UNIT + c), held, mask=inside)


@dataclass(frozen=True)
class Configuration:
    units: int  # of a row that a program moves
    num_warps: int


CANDIDATES = (
    Configuration(1024, 8),
    Configuration(1024, 4),
    Configuration(512, 4),
)  # 4, 8 and 4 loads under way a thread
CONFIGURATIONS = {80: CANDIDATES[0], 90: CANDIDATES[0], 100: CANDIDATES[0]}


def _move(to: int, source: int) -> int:
    """The low bits keep it from being 1 or a multiple of 16, which Triton would compile apart."""
    return to << 16 | source << 4 | 3


def duplicate_layers_(bank: Tensor, layer_map: list[int]) -> None:
    moves = [_move(i, source) for i, source in reversed(list(enumerate(layer_map))) if source != i]
    if not moves or bank.numel() == 0:
        return
    size = bank.element_size()
    row, stride = bank[0].numel() * size, bank.stride(0) * size
    unit = math.gcd(16, bank.data_ptr(), row, stride)
    word, words = WORDS[unit]
    chosen = _triton.configuration(CONFIGURATIONS, bank.device)
    grid = (triton.cdiv(row // unit, chosen.units),)
    with _triton.on(bank.device):
        for first in range(0, len(moves), MOVES):  # a launch begins when the one before has ended
            some = moves[first : first + MOVES]
            duplicate_layers_kernel[grid](
                triton.reinterpret(bank, word), stride // unit, row // unit, (*some, *[_move(0, 0)] * (MOVES - len(some))),
                WORDS_A_UNIT=words, UNITS=chosen.units, num_warps=chosen.num_warps,
            )  # fmt: skip


def compilations(arch: int) -> list[_triton.Compilation]:
    chosen = CONFIGURATIONS[arch]
    return [
        _triton.Compilation(
            name="duplicate_layers_ 16-byte units",
            kernel=duplicate_layers_kernel,
            signature={"bank_ptr": "*i32:16", "stride": "i32", "units": "i32", "moves": ("i32",) * MOVES},
            constants={"WORDS_A_UNIT": 4, "UNITS": chosen.units},
            num_warps=chosen.num_warps,
            max_registers=40,
        )
    ]
