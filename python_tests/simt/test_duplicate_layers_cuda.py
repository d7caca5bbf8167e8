"""The CUDA row duplication on the host: every map, element sizes that choose the vector, and columns that fill no block."""

from __future__ import annotations

import pytest
import torch
from simt.twin import SEEDS, Device

from stackbert_kernels.ops.duplicate_layers import native

MAPS = [[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [0, 0, 0, 0], [0, 1, 2], [0]]


@pytest.mark.parametrize("layer_map", MAPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("columns", [1, 3, 8, 1024, 4100])
def test_rows_are_those_of_the_map(twin, layer_map, dtype, columns):
    torch.manual_seed(columns)
    start = torch.randint(0, 256, (len(layer_map) + 1, columns * dtype.itemsize), dtype=torch.uint8)
    for seed in SEEDS:
        with Device(twin, seed, {}):
            apart = start.shape[1] // 16 * 16 + 32  # a guard band behind every row, and the next on 16 bytes
            held = torch.zeros(start.shape[0], apart, dtype=torch.uint8)
            bank = held[:, : start.shape[1]]
            bank.copy_(start)
            native.duplicate_layers_cuda(bank.view(dtype)[: len(layer_map)], layer_map)
        assert torch.equal(bank, start[[*layer_map, len(layer_map)]]) and not held[:, start.shape[1] :].any()


def test_more_rows_than_a_launch_takes(twin):
    start = torch.arange(300.0)[:, None].repeat(1, 4)
    with Device(twin, 0, {}):
        bank = start.clone()
        native.duplicate_layers_cuda(bank, [i // 2 for i in range(300)])
    assert torch.equal(bank, start[[i // 2 for i in range(300)]])


@pytest.mark.parametrize("layer_map", MAPS, ids=str)
def test_several_banks_at_once(twin, layer_map):
    """Rows of 16-byte, 4-byte and 1-byte units, one of a few bytes, more banks than a launch takes."""
    torch.manual_seed(0)
    widths = [
        (4100, torch.float32),
        (8200, torch.bfloat16),
        (),
        (5, torch.float32),
        (3, torch.uint8),
        *[(4, torch.float32)] * 6,
    ]
    rows = len(layer_map) + 1
    starts = [
        torch.randint(0, 100, (rows, *width[:1])).to(width[1]) if width else torch.randn(rows) for width in widths
    ]
    for seed in SEEDS:
        with Device(twin, seed, {}):
            banks = [start.clone() for start in starts]
            native.duplicate_banks_cuda([bank[: len(layer_map)] for bank in banks], layer_map)
        for bank, start in zip(banks, starts, strict=True):
            assert torch.equal(bank, start[[*layer_map, len(layer_map)]])
