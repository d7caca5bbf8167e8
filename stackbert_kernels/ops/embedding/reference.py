"""embedding_layer_norm in plain PyTorch. T tokens, C columns.

Everything is computed in float32, in float64 for float64 tables, and rounded once at the end.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stackbert_kernels.ops import philox
from stackbert_kernels.ops.layer_norm import reference as norm

NAMES = ("ids", "positions", "token_types")


def check_values(indices: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
    """On the CPU an index out of range is an error; elsewhere a look at the values would wait for the device."""
    for name, index, table in zip(NAMES, indices, tables, strict=True):
        low, high = (int(value) for value in index.aminmax()) if index.numel() else (0, 0)
        if low < 0 or high >= len(table):
            raise ValueError(
                f"embedding_layer_norm: {name} must be in [0, {len(table)}), got {low if low < 0 else high}"
            )


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index] in the wide dtype; NaN where the index is out of range, which no memory is read for."""
    inside = (index >= 0) & (index < len(table))
    rows = table.index_select(0, index.clamp(0, len(table) - 1)).to(torch.promote_types(table.dtype, torch.float32))
    return rows if index.device.type == "cpu" else rows.masked_fill(~inside[:, None], torch.nan)


def _sum(indices: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> Tensor:
    if indices[0].device.type == "cpu":
        check_values(indices, tables)
    word, position, token_type = (_rows(table, index) for table, index in zip(tables, indices, strict=True))
    return word + position + token_type


def embedding_layer_norm_fwd(
    ids: Tensor,
    positions: Tensor,
    token_types: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    rng: Tensor,
    site: int,
    threshold: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    z = _sum((ids, positions, token_types), (word, position, token_type))
    y, mean, rstd = norm.layer_norm_fwd(z, weight, bias, eps)
    if threshold:
        y = y * philox.row_factors(rng, site, threshold, y)
    return y.to(dtype), mean, rstd


def embedding_layer_norm_forward_only(*arguments) -> Tensor:
    return embedding_layer_norm_fwd(*arguments)[0]


def embedding_layer_norm_bwd(
    dy: Tensor,
    ids: Tensor,
    positions: Tensor,
    token_types: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor,
    site: int,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    indices, tables = (ids, positions, token_types), (word, position, token_type)
    z = _sum(indices, tables)
    dy = dy.contiguous().to(z.dtype)
    if threshold:
        dy = dy * philox.row_factors(rng, site, threshold, dy)
    dz, dweight, dbias = norm.layer_norm_bwd(dy, z, weight, bias, mean, rstd)
    dtables = (_sum_by_row(index, dz, table) for index, table in zip(indices, tables, strict=True))
    return *dtables, dweight, dbias


def _sum_by_row(index: Tensor, dz: Tensor, table: Tensor) -> Tensor:
    """The gradient of the table: row r is the sum of dz where index is r, in the order of the tokens."""
    inside = (index >= 0) & (index < len(table))
    # A row behind the table takes what belongs to none.
    total = dz.new_zeros(len(table) + 1, dz.shape[1])
    total.index_put_((torch.where(inside, index, len(table)),), dz, accumulate=True)  # sorts: no atomics on a GPU
    return total[:-1].to(table.dtype)
